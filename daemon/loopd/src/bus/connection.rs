//! The connections to the bus.

use std::sync::Arc;

use loopd_common::Pace;
use loopd_dbus::names::TAKES_DESCRIPTORS;
use loopd_dbus::transport::{self, Backlog, CallPolicy, Descriptors, Policy, Transport, Users};
use zbus::connection::Builder;
use zbus::export::async_trait::async_trait;
use zbus::fdo::DBusProxy;
use zbus::names::BusName;
use zbus::{Address, Connection};

use crate::clients::Clients;
use loopd_engine::ClientId;

/// The longest call: fourteen names of files, and room for everything else.
const LONGEST_CALL: usize = 64 << 10;
/// The longest signal of the bus, polkit or the service manager.
const LONGEST_SIGNAL: usize = 64 << 10;
/// The longest answer of theirs.
const LONGEST_REPLY: usize = 1 << 20;

/// How many calls of a uid other than root are served a second, and how many at once after a rest. Each
/// costs the bus two messages at least, and us some hundred microseconds.
const CALLS_A_SECOND: u32 = 1000;
const CALLS_AT_ONCE: u32 = 256;

/// The uid in whose name the calls of all uids count that the user database does not know: the one that
/// nobody can have.
const NO_USER: u32 = u32::MAX;

/// The connection that the daemon serves on.
pub struct Link {
    /// The connection.
    pub connection: Connection,
    /// The descriptors that come with its calls.
    pub descriptors: Descriptors,
    /// The calls that wait for their turn.
    pub backlog: Backlog,
}

/// Connects to the system bus.
///
/// # Errors
/// It cannot be reached.
pub async fn connect(clients: &Clients) -> zbus::Result<Link> {
    // Whose descriptors a call brings is asked before it is received, and so over another connection.
    let questions = open(Policy::QUESTIONS).await?;
    let users = Callers { bus: super::proxy(&questions).await?, clients: clients.clone() };
    let (descriptors, backlog) = (Descriptors::default(), Backlog::default());
    let policy = Policy {
        longest_reply: LONGEST_REPLY,
        longest_signal: LONGEST_SIGNAL,
        calls: Some(CallPolicy {
            longest: LONGEST_CALL,
            takes_descriptors,
            users: Arc::new(users),
            descriptors: descriptors.clone(),
            pace: Arc::new(Pace::new(CALLS_A_SECOND, CALLS_AT_ONCE)),
            backlog: backlog.clone(),
        }),
    };
    Ok(Link { connection: open(policy).await?, descriptors, backlog })
}

async fn open(policy: Policy) -> zbus::Result<Connection> {
    let socket =
        transport::connect(&Address::system()?).map_err(|error| zbus::Error::Failure(error.to_string()))?;
    Builder::socket(Transport::new(socket, policy)?).build().await
}

fn takes_descriptors(interface: &str, member: &str) -> u32 {
    let known = TAKES_DESCRIPTORS.iter().find(|known| (known.0, known.1) == (interface, member));
    known.map_or(0, |(_, _, count)| *count)
}

/// Asks the bus who a caller is.
struct Callers {
    bus: DBusProxy<'static>,
    clients: Clients,
}

#[async_trait]
impl Users for Callers {
    async fn uid(&self, sender: &str) -> Option<u32> {
        // Watched, so that what is learned holds for the call as well.
        let watch = self.clients.watch(ClientId(sender.to_owned()));
        if let Some(uid) = watch.known_uid() {
            return Some(uid);
        }
        let uid = self.bus.get_connection_unix_user(BusName::try_from(sender).ok()?).await.ok()?;
        watch.learn_uid(uid);
        Some(uid)
    }

    /// Subordinate uids share one pace: a user has 65,536 of them.
    fn payer(&self, uid: u32) -> u32 {
        if self.clients.is_no_user(uid) { NO_USER } else { uid }
    }
}
