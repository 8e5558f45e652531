//! Tells when a bus name is gone.
//!
//! None slips through: a client is watched first, and then either its uid is known, so that its end
//! is still to come, or the bus is asked for it, which fails where the client is gone.
//!
//! One match rule serves all clients: dbus-daemon allows 512 rules a connection.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use loopd_engine::ClientId;

/// How many uids that are no user's are remembered.
const NO_USERS: usize = 4096;

/// The clients that have a call under way, and the uids of those that had one.
#[derive(Clone, Default)]
pub struct Clients {
    known: Arc<Mutex<Known>>,
    nobody: Arc<Notify>,
}

/// Under one lock, so that an end is seen by both or by neither.
#[derive(Default)]
struct Known {
    watched: HashMap<ClientId, Watched>,
    /// A unique name is never used twice, so what the bus said of it holds until it is gone.
    uids: HashMap<ClientId, u32>,
    /// The clients whose uid the user database knows, by uid.
    of_users: HashMap<u32, HashSet<ClientId>>,
    /// The uids that it was found not to know.
    no_users: HashSet<u32>,
}

impl Known {
    fn forget_uid(&mut self, client: &ClientId) {
        let Some(uid) = self.uids.remove(client) else { return };
        if let Some(clients) = self.of_users.get_mut(&uid) {
            clients.remove(client);
            if clients.is_empty() {
                self.of_users.remove(&uid);
            }
        }
    }
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
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch a client. One that vanished before has no known uid: ask the bus for it.
    #[must_use]
    pub fn watch(&self, client: ClientId) -> Watch {
        let mut known = self.known();
        let entry = known
            .watched
            .entry(client.clone())
            .or_insert_with(|| Watched { calls: 0, gone: watch::channel(false).0 });
        entry.calls += 1;
        let gone = entry.gone.subscribe();
        drop(known);
        Watch { clients: self.clone(), client, gone }
    }

    /// Resolves when no call is under way.
    pub async fn idle(&self) {
        loop {
            let nobody = self.nobody.notified();
            tokio::pin!(nobody);
            nobody.as_mut().enable();
            if self.known().watched.is_empty() {
                return;
            }
            nobody.await;
        }
    }

    /// Whether the user database was found not to know this uid.
    #[must_use]
    pub fn is_no_user(&self, uid: u32) -> bool {
        self.known().no_users.contains(&uid)
    }

    /// Remembers that the user database does not know this uid, until it does.
    pub fn learn_no_user(&self, uid: u32) {
        let mut known = self.known();
        if known.no_users.len() >= NO_USERS {
            known.no_users.clear();
        }
        known.no_users.insert(uid);
    }

    /// The bus says that this name is gone.
    pub fn vanished(&self, client: &ClientId) {
        let mut known = self.known();
        known.forget_uid(client);
        if let Some(watched) = known.watched.get(client) {
            watched.gone.send_replace(true);
        }
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
        self.clients.known().uids.get(&self.client).copied()
    }

    /// Keeps the uid that the bus has told of this client, until it vanishes.
    pub fn learn_uid(&self, uid: u32) {
        let mut known = self.clients.known();
        if !self.is_gone() {
            known.uids.insert(self.client.clone(), uid);
        }
    }

    /// Keeps that the user database knows this client's uid, until its last client vanishes.
    pub fn learn_user(&self, uid: u32) {
        let mut known = self.clients.known();
        known.no_users.remove(&uid);
        if known.uids.get(&self.client) == Some(&uid) {
            known.of_users.entry(uid).or_default().insert(self.client.clone());
        }
    }

    /// Whether the user database was found to know this uid.
    #[must_use]
    pub fn is_user(&self, uid: u32) -> bool {
        self.clients.known().of_users.contains_key(&uid)
    }

    /// Whether it vanished.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Resolves when it vanishes.
    pub async fn disconnected(&self) {
        let mut gone = self.gone.clone();
        // The sender lives as long as this watch is counted.
        let _changed = gone.wait_for(|gone| *gone).await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut known = self.clients.known();
        if let Some(entry) = known.watched.get_mut(&self.client) {
            entry.calls -= 1;
            if entry.calls == 0 {
                known.watched.remove(&self.client);
            }
            if known.watched.is_empty() {
                self.clients.nobody.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn uids_of_nobody_are_remembered_until_they_are_a_users() {
        let clients = Clients::default();
        let watch = clients.watch(ClientId(":1.1".to_owned()));
        assert!(!clients.is_no_user(7));
        clients.learn_no_user(7);
        assert!(clients.is_no_user(7) && !clients.is_no_user(8));
        watch.learn_uid(7);
        watch.learn_user(7);
        assert!(!clients.is_no_user(7));
        for uid in 0..100_000 {
            clients.learn_no_user(uid);
        }
        assert!(clients.known().no_users.len() <= NO_USERS);
    }

    #[tokio::test]
    async fn every_call_of_a_client_hears_of_its_end() {
        let clients = Clients::default();
        let name = |name: &str| ClientId(name.to_owned());
        let (first, second, other) =
            (clients.watch(name(":1.1")), clients.watch(name(":1.1")), clients.watch(name(":1.2")));
        drop(first);
        clients.vanished(&name(":1.1"));
        second.disconnected().await;
        assert!(second.is_gone());
        assert!(!other.is_gone());
        second.learn_uid(7);
        other.learn_uid(8);
        assert_eq!((second.known_uid(), other.known_uid()), (None, Some(8)));
        assert!(!other.is_user(8), "the bus knows it, the user database was not asked");
        let third = clients.watch(name(":1.3"));
        third.learn_uid(8);
        for watch in [&other, &third, &third] {
            watch.learn_user(8);
        }
        clients.vanished(&name(":1.3"));
        assert!(!other.is_user(7) && other.is_user(8));
        clients.vanished(&name(":1.2"));
        assert!(!other.is_user(8));
        drop((second, other, third));
        assert!(clients.known().watched.is_empty());
        assert!(clients.known().uids.is_empty());
    }
}
