//! The socket of a connection to the bus, which lets in only what the library can read.
//!
//! The library ends a connection when a message cannot be parsed, and allocates what a header says that
//! a message is long. Anybody on the bus can send such messages. So each message is judged by its header
//! before it is received: its length is bounded, its descriptors are taken only where the member has a use
//! for them, and what cannot be parsed is answered with an error, or fails the call that it answers.
//!
//! Calls of a user other than root that come faster than [`Pace`] allows wait in a queue, so that a flood
//! of theirs is no delay for the calls of others: these, and answers to our own calls, pass by.

mod calls;
mod descriptors;
mod header;
mod queue;
mod reader;
mod stream;
mod values;
mod writer;

use std::fmt;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;

use loopd_common::Pace;
use tokio::sync::{Mutex, mpsc};
use zbus::Address;
use zbus::address::Transport as Way;
use zbus::address::transport::UnixSocket;
use zbus::connection::socket::{Socket, Split};
use zbus::export::async_trait::async_trait;

use calls::Calls;
pub use descriptors::Descriptors;
pub use queue::Backlog;
pub use reader::Reader;
pub use writer::{LONGEST_SENT, Writer};

/// How many answers to refused calls may wait to be sent. Beyond it a caller gets none.
const MOST_REFUSALS: usize = 256;

/// What a connection lets in.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The longest reply, in bytes.
    pub longest_reply: usize,
    /// The longest signal.
    pub longest_signal: usize,
    /// The calls. Without it they are ignored.
    pub calls: Option<CallPolicy>,
}

impl Policy {
    /// For a client: no calls, and whatever length the bus allows. What that costs is bounded by the number of
    /// values.
    pub const CLIENT: Self =
        Self { longest_reply: header::LONGEST_MESSAGE, longest_signal: header::LONGEST_MESSAGE, calls: None };

    /// For a daemon that serves no objects on this connection.
    pub const QUESTIONS: Self = Self { longest_reply: 1 << 20, longest_signal: 64 << 10, calls: None };
}

/// What calls a connection lets in.
#[derive(Clone)]
pub struct CallPolicy {
    /// The longest call, in bytes.
    pub longest: usize,
    /// How many descriptors a member of an interface takes.
    pub takes_descriptors: fn(interface: &str, member: &str) -> u32,
    /// Who the callers are.
    pub users: Arc<dyn Users>,
    /// Where the descriptors go.
    pub descriptors: Descriptors,
    /// How fast the calls of one user other than root follow each other. What comes faster waits.
    pub pace: Arc<Pace>,
    /// What waits.
    pub backlog: Backlog,
}

impl fmt::Debug for CallPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallPolicy").field("longest", &self.longest).finish_non_exhaustive()
    }
}

/// Knows the user behind a connection to the bus.
#[async_trait]
pub trait Users: Send + Sync {
    /// The uid of the connection with this unique name. Must not ask over the connection that it is asked
    /// for: that waits for the answer.
    async fn uid(&self, sender: &str) -> Option<u32>;

    /// The uid with whose calls those of this one are spaced out.
    fn payer(&self, uid: u32) -> u32 {
        uid
    }
}

/// A socket for [`zbus::connection::Builder::socket`].
#[derive(Debug)]
pub struct Transport {
    reader: Reader,
    writer: Writer,
}

impl Transport {
    /// Over a socket that is connected to the bus. Needs a runtime of tokio.
    ///
    /// # Errors
    /// The runtime cannot watch the socket.
    pub fn new(socket: UnixStream, policy: Policy) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let stream = Arc::new(tokio::net::UnixStream::from_std(socket)?);
        let calls = Arc::new(Calls::default());
        let descriptors = policy.calls.as_ref().map(|calls| calls.descriptors.clone()).unwrap_or_default();
        let turn = Arc::new(Mutex::new(()));
        let (refusals, refused) = mpsc::channel(MOST_REFUSALS);
        tokio::spawn(writer::refuse(Arc::clone(&stream), Arc::clone(&turn), refused));
        Ok(Self {
            reader: Reader::new(Arc::clone(&stream), policy, Arc::clone(&calls), refusals),
            writer: Writer::new(stream, turn, calls, descriptors),
        })
    }
}

impl Socket for Transport {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        Split::new(self.reader, self.writer)
    }
}

/// Why there is no socket to the bus.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address names something else than a Unix socket.
    #[error("{0} is no address of a Unix socket: unix:path= or unix:abstract= is needed")]
    NotASocket(Address),
    /// It cannot be connected to.
    #[error("{0}: {1}")]
    Unreachable(Address, #[source] io::Error),
}

/// Connects to the bus at this address, without a word yet.
///
/// # Errors
/// It is no Unix socket, or nobody listens.
pub fn connect(address: &Address) -> Result<UnixStream, ConnectError> {
    let unreachable = |error| ConnectError::Unreachable(address.clone(), error);
    let Way::Unix(unix) = address.transport() else {
        return Err(ConnectError::NotASocket(address.clone()));
    };
    let socket_address = match unix.path() {
        UnixSocket::File(path) => SocketAddr::from_pathname(path),
        UnixSocket::Abstract(name) => SocketAddr::from_abstract_name(name.as_bytes()),
        _ => return Err(ConnectError::NotASocket(address.clone())),
    };
    UnixStream::connect_addr(&socket_address.map_err(unreachable)?).map_err(unreachable)
}

#[cfg(test)]
mod tests;
