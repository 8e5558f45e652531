//! Tells when a bus name is gone.
//!
//! One match rule serves all clients: dbus-daemon allows 512 rules a connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::engine::ClientId;

/// The clients that have a call under way, and the uids of those that had one.
#[derive(Clone, Default)]
pub struct Clients {
    watched: Arc<Mutex<HashMap<ClientId, Watched>>>,
    /// A unique name is never used twice, so what the bus said of it holds until it is gone.
    uids: Arc<Mutex<HashMap<ClientId, u32>>>,
}

struct Watched {
    calls: usize,
    gone: watch::Sender<bool>,
}

/// Watches one client for as long as it lives.
pub struct Watch {
    clients: Clients,
    client: ClientId,
    gone: watch::Receiver<bool>,
}

impl Clients {
    fn watched(&self) -> MutexGuard<'_, HashMap<ClientId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch a client. One that vanished before is not noticed: ask the bus as well.
    #[must_use]
    pub fn watch(&self, client: ClientId) -> Watch {
        let mut watched = self.watched();
        let entry = watched
            .entry(client.clone())
            .or_insert_with(|| Watched { calls: 0, gone: watch::channel(false).0 });
        entry.calls += 1;
        let gone = entry.gone.subscribe();
        drop(watched);
        Watch { clients: self.clone(), client, gone }
    }

    fn uids(&self) -> MutexGuard<'_, HashMap<ClientId, u32>> {
        self.uids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bus says that this name is gone.
    pub fn vanished(&self, client: &ClientId) {
        if let Some(watched) = self.watched().get(client) {
            watched.gone.send_replace(true);
        }
        // After the line above, so that a uid learnt meanwhile does not stay.
        self.uids().remove(client);
    }
}

impl Watch {
    /// The watched client.
    #[must_use]
    pub fn client(&self) -> &ClientId {
        &self.client
    }

    /// The client's uid, where the bus was asked before.
    #[must_use]
    pub fn known_uid(&self) -> Option<u32> {
        self.clients.uids().get(&self.client).copied()
    }

    /// Keeps the uid that the bus has told of this client, until it vanishes.
    pub fn learn_uid(&self, uid: u32) {
        let mut uids = self.clients.uids();
        if !self.is_gone() {
            uids.insert(self.client.clone(), uid);
        }
    }

    /// Whether it vanished.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Resolves when it vanishes.
    pub async fn gone(&self) {
        let mut gone = self.gone.clone();
        // The sender lives as long as this watch is counted.
        let _changed = gone.wait_for(|gone| *gone).await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.clients.watched();
        if let Some(entry) = watched.get_mut(&self.client) {
            entry.calls -= 1;
            if entry.calls == 0 {
                watched.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_call_of_a_client_hears_of_its_end() {
        let clients = Clients::default();
        let name = |name: &str| ClientId(name.to_owned());
        let (first, second, other) =
            (clients.watch(name(":1.1")), clients.watch(name(":1.1")), clients.watch(name(":1.2")));
        drop(first);
        clients.vanished(&name(":1.1"));
        second.gone().await;
        assert!(second.is_gone());
        assert!(!other.is_gone());
        second.learn_uid(7);
        other.learn_uid(8);
        assert_eq!((second.known_uid(), other.known_uid()), (None, Some(8)));
        clients.vanished(&name(":1.2"));
        drop((second, other));
        assert!(clients.watched().is_empty());
        assert!(clients.uids().is_empty());
    }
}
