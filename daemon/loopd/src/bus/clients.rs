//! Watches clients: notices when one disconnects from the bus.
//!
//! No disconnect is missed. A client is watched first. Then either its uid is known, so the signal of its
//! disconnect is still to come, or the bus is asked for the uid, which fails if the client has disconnected.
//!
//! One match rule serves all clients: dbus-daemon allows 512 rules for a connection.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_lite::StreamExt;
use tokio::sync::{Notify, watch};
use zbus::message::Type;
use zbus::{Connection, MatchRule, MessageStream};

use loopd_engine::ClientId;

/// How many uids outside the user database are remembered.
const MAX_UNKNOWN_UIDS: usize = 4096;

/// The clients with a call in progress, and the uids of connected clients that made a call.
#[derive(Clone, Default)]
pub struct Clients {
    known: Arc<Mutex<Known>>,
    idle: Arc<Notify>,
}

/// Behind one lock, so that a disconnect changes all of it at once.
#[derive(Default)]
struct Known {
    watched: HashMap<ClientId, Watched>,
    /// The uids of connected clients: a unique name is never reused.
    uids: HashMap<ClientId, u32>,
    /// The connected clients of each uid that is in the user database.
    users: HashMap<u32, HashSet<ClientId>>,
    /// Uids that are not in the user database.
    unknown_uids: HashSet<u32>,
}

impl Known {
    fn forget_uid(&mut self, client: &ClientId) {
        let Some(uid) = self.uids.remove(client) else { return };
        if let Some(clients) = self.users.get_mut(&uid) {
            clients.remove(client);
            if clients.is_empty() {
                self.users.remove(&uid);
            }
        }
    }
}

struct Watched {
    calls: usize,
    disconnected: watch::Sender<bool>,
}

/// Watches one client until it is dropped.
pub struct Watch {
    clients: Clients,
    client: ClientId,
    disconnected: watch::Receiver<bool>,
}

impl Clients {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch a client. One that disconnected before has no known uid: ask the bus for it.
    #[must_use]
    pub fn watch(&self, client: ClientId) -> Watch {
        let mut known = self.known();
        let entry = known
            .watched
            .entry(client.clone())
            .or_insert_with(|| Watched { calls: 0, disconnected: watch::channel(false).0 });
        entry.calls += 1;
        let disconnected = entry.disconnected.subscribe();
        drop(known);
        Watch { clients: self.clone(), client, disconnected }
    }

    /// Waits until no call is in progress.
    pub async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if self.known().watched.is_empty() {
                return;
            }
            idle.await;
        }
    }

    /// Whether a lookup has found that this uid is not in the user database.
    #[must_use]
    pub fn is_unknown_uid(&self, uid: u32) -> bool {
        self.known().unknown_uids.contains(&uid)
    }

    /// Remembers that this uid is not in the user database, until a later lookup finds it.
    pub fn learn_unknown_uid(&self, uid: u32) {
        let mut known = self.known();
        if known.unknown_uids.len() >= MAX_UNKNOWN_UIDS {
            known.unknown_uids.clear();
        }
        known.unknown_uids.insert(uid);
    }

    /// Records that a client has disconnected.
    pub fn disconnected(&self, client: &ClientId) {
        let mut known = self.known();
        known.forget_uid(client);
        if let Some(watched) = known.watched.get(client) {
            watched.disconnected.send_replace(true);
        }
    }
}

/// Calls a function for each client that disconnects, from now on. It must not block: a message stream that
/// is not polled stops the whole connection.
///
/// # Errors
/// The connection failed.
pub async fn watch_disconnects(
    connection: &Connection,
    mut disconnected: impl FnMut(&ClientId) + Send + 'static,
) -> zbus::Result<()> {
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender("org.freedesktop.DBus")
        .interface("org.freedesktop.DBus")
        .member("NameOwnerChanged")
        .arg(2, "")
        .build()?;
    let mut signals = MessageStream::for_match_rule(rule, connection, None).await?;
    tokio::spawn(async move {
        while let Some(Ok(signal)) = signals.next().await {
            let body = signal.body();
            let Ok((name, _, _)) = body.deserialize::<(&str, &str, &str)>() else { continue };
            if name.starts_with(':') {
                disconnected(&ClientId(name.to_owned()));
            }
        }
    });
    Ok(())
}

impl Watch {
    /// The watched client.
    #[must_use]
    pub fn client(&self) -> &ClientId {
        &self.client
    }

    /// The client's uid, if the bus was asked before.
    #[must_use]
    pub fn known_uid(&self) -> Option<u32> {
        self.clients.known().uids.get(&self.client).copied()
    }

    /// Remembers the uid that the bus returned for this client, until it disconnects.
    pub fn learn_uid(&self, uid: u32) {
        let mut known = self.clients.known();
        if !self.is_disconnected() {
            known.uids.insert(self.client.clone(), uid);
        }
    }

    /// Remembers that this client's uid is in the user database, until its last client disconnects.
    pub fn learn_user(&self, uid: u32) {
        let mut known = self.clients.known();
        known.unknown_uids.remove(&uid);
        if known.uids.get(&self.client) == Some(&uid) {
            known.users.entry(uid).or_default().insert(self.client.clone());
        }
    }

    /// Whether a lookup has found this uid in the user database.
    #[must_use]
    pub fn is_user(&self, uid: u32) -> bool {
        self.clients.known().users.contains_key(&uid)
    }

    /// Whether the client has disconnected.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        *self.disconnected.borrow()
    }

    /// Waits until the client disconnects.
    pub async fn wait_for_disconnect(&self) {
        let mut disconnected = self.disconnected.clone();
        // The sender exists as long as this watch.
        let _changed = disconnected.wait_for(|disconnected| *disconnected).await;
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
                self.clients.idle.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn unknown_uids_are_remembered_until_a_lookup_finds_them() {
        let clients = Clients::default();
        let watch = clients.watch(ClientId(":1.1".to_owned()));
        assert!(!clients.is_unknown_uid(7));
        clients.learn_unknown_uid(7);
        assert!(clients.is_unknown_uid(7) && !clients.is_unknown_uid(8));
        watch.learn_uid(7);
        watch.learn_user(7);
        assert!(!clients.is_unknown_uid(7));
        for uid in 0..100_000 {
            clients.learn_unknown_uid(uid);
        }
        assert!(clients.known().unknown_uids.len() <= MAX_UNKNOWN_UIDS);
    }

    #[tokio::test]
    async fn every_watch_of_a_client_notices_its_disconnect() {
        let clients = Clients::default();
        let name = |name: &str| ClientId(name.to_owned());
        let (first, second, other) =
            (clients.watch(name(":1.1")), clients.watch(name(":1.1")), clients.watch(name(":1.2")));
        drop(first);
        clients.disconnected(&name(":1.1"));
        second.wait_for_disconnect().await;
        assert!(second.is_disconnected());
        assert!(!other.is_disconnected());
        second.learn_uid(7);
        other.learn_uid(8);
        assert_eq!((second.known_uid(), other.known_uid()), (None, Some(8)));
        assert!(!other.is_user(8), "the user database was not asked");
        let third = clients.watch(name(":1.3"));
        third.learn_uid(8);
        for watch in [&other, &third, &third] {
            watch.learn_user(8);
        }
        clients.disconnected(&name(":1.3"));
        assert!(!other.is_user(7) && other.is_user(8));
        clients.disconnected(&name(":1.2"));
        assert!(!other.is_user(8));
        drop((second, other, third));
        assert!(clients.known().watched.is_empty());
        assert!(clients.known().uids.is_empty());
    }
}
