//! The connections to the bus, and the limits on what they receive.

use std::sync::Arc;

use loopd_common::Pace;
use loopd_dbus::names::TAKES_DESCRIPTORS;
use loopd_dbus::transport::{self, Backlog, CallPolicy, Descriptors, Policy, Transport, Users};
use zbus::Connection;
use zbus::connection::Builder;
use zbus::export::async_trait::async_trait;
use zbus::fdo::DBusProxy;
use zbus::names::BusName;
use zbus::proxy::CacheProperties;

use super::clients::Clients;
use crate::platform;
use loopd_engine::ClientId;

/// The size limit of a call in bytes: enough for fourteen file names and all other options.
const MAX_CALL_SIZE: usize = 64 << 10;
/// The size limit of a signal from the bus, polkit or the service manager in bytes.
const MAX_SIGNAL_SIZE: usize = 64 << 10;
/// The size limit of their replies in bytes.
const MAX_REPLY_SIZE: usize = 1 << 20;

/// How many calls of a uid other than root are served in a second, and how many at once after a rest. Each
/// costs the bus at least two messages, and loopd some hundred microseconds. One with descriptors counts as ten.
const CALLS_PER_SECOND: u32 = 1000;
const CALLS_AT_ONCE: u32 = 256;

/// The uid to which calls of uids outside the user database are charged. No process can have it.
const UNKNOWN_USER: u32 = u32::MAX;

/// The connection for the service.
pub struct Link {
    /// The connection.
    pub connection: Connection,
    /// The descriptors of received calls.
    pub descriptors: Descriptors,
    /// The calls that wait in the transport.
    pub backlog: Backlog,
}

/// Connects to the bus.
///
/// # Errors
/// It cannot be reached.
pub async fn connect(clients: &Clients) -> zbus::Result<Link> {
    // The sender's uid is needed before a call with descriptors is received, and so on another connection.
    let queries = open(Policy::QUESTIONS).await?;
    let users = BusUsers { bus: proxy(&queries).await?, clients: clients.clone() };
    let (descriptors, backlog) = (Descriptors::default(), Backlog::default());
    let policy = Policy {
        longest_reply: MAX_REPLY_SIZE,
        longest_signal: MAX_SIGNAL_SIZE,
        calls: Some(CallPolicy {
            longest: MAX_CALL_SIZE,
            takes_descriptors,
            users: Arc::new(users),
            descriptors: descriptors.clone(),
            pace: Arc::new(Pace::new(CALLS_PER_SECOND, CALLS_AT_ONCE)),
            backlog: backlog.clone(),
        }),
    };
    Ok(Link { connection: open(policy).await?, descriptors, backlog })
}

/// A proxy of the bus itself.
///
/// # Errors
/// The connection failed.
pub async fn proxy(connection: &Connection) -> zbus::Result<DBusProxy<'static>> {
    DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

async fn open(policy: Policy) -> zbus::Result<Connection> {
    let socket = transport::connect(&platform::bus_address()?)
        .map_err(|error| zbus::Error::Failure(error.to_string()))?;
    Builder::socket(Transport::new(socket, policy)?).build().await
}

fn takes_descriptors(interface: &str, member: &str) -> u32 {
    let known = TAKES_DESCRIPTORS.iter().find(|known| (known.0, known.1) == (interface, member));
    known.map_or(0, |(_, _, count)| *count)
}

/// Asks the bus for the uids of senders.
struct BusUsers {
    bus: DBusProxy<'static>,
    clients: Clients,
}

#[async_trait]
impl Users for BusUsers {
    async fn uid(&self, sender: &str) -> Option<u32> {
        // Watched, so that the uid is still known when the call is handled.
        let watch = self.clients.watch(ClientId(sender.to_owned()));
        if let Some(uid) = watch.known_uid() {
            return Some(uid);
        }
        let uid = self.bus.get_connection_unix_user(BusName::try_from(sender).ok()?).await.ok()?;
        watch.learn_uid(uid);
        Some(uid)
    }

    /// All uids outside the user database share one pace: each user has 65,536 subordinate uids.
    fn payer(&self, uid: u32) -> u32 {
        if self.clients.is_unknown_uid(uid) { UNKNOWN_USER } else { uid }
    }
}
