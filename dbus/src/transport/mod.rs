//! The socket of a connection to the bus, which lets in only what the library can read.
//!
//! The library ends a connection when a message cannot be parsed, and allocates what a header says that
//! a message is long. Anybody on the bus can send such messages. So each message is judged by its header
//! before it is received: its length is bounded, its descriptors are taken only where the member has a use
//! for them, and what cannot be parsed is answered with an error, or fails the call that it answers.
//!
//! Calls of a user other than root that come faster than [`loopd_common::Pace`] allows wait in a queue, so
//! that a flood of theirs is no delay for the calls of others: these, and answers to our own calls, pass by.

mod calls;
mod descriptors;
mod header;
mod policy;
mod queue;
mod reader;
mod stream;
mod values;
mod writer;

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};
use zbus::Address;
use zbus::address::Transport as Way;
use zbus::address::transport::UnixSocket;
use zbus::connection::socket::{Socket, Split};

use calls::Calls;
pub use descriptors::Descriptors;
pub use policy::{CallPolicy, Policy, Users};
pub use queue::Backlog;
pub use reader::Reader;
pub use writer::{LONGEST_SENT, Writer};

/// How many answers to refused calls may wait to be sent. Beyond it a caller gets none.
const MOST_REFUSALS: usize = 256;

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
