//! The socket of a connection to the bus, which passes only messages that the library can parse.
//!
//! The library closes the connection if a message cannot be parsed, and allocates the length that a header
//! claims. Any process on the bus can send such messages. So each message is checked by its header before
//! it is received: its length is limited, and descriptors are accepted only if the member takes them. A call
//! that cannot be parsed is answered with an error; a reply that cannot be parsed fails its call.
//!
//! If calls of a user other than root come faster than [`loopd_common::Pace`] allows, they wait in a queue.
//! Calls of other users, and replies to our own calls, overtake them, so a flood does not delay others.

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
pub use reader::{Reader, USED_TWICE};
pub use writer::{LONGEST_SENT, Writer};

/// How many replies to refused calls may wait to be sent. Beyond that a caller gets no reply.
const MOST_REFUSALS: usize = 256;

/// A socket for [`zbus::connection::Builder::socket`].
#[derive(Debug)]
pub struct Transport {
    reader: Reader,
    writer: Writer,
}

impl Transport {
    /// Wraps a socket that is connected to the bus. Needs a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot register the socket.
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

/// Why connecting to the bus failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is not one of a Unix socket.
    #[error("{0} is not the address of a Unix socket: unix:path= or unix:abstract= is needed")]
    NotASocket(Address),
    /// The connection failed.
    #[error("{0}: {1}")]
    Unreachable(Address, #[source] io::Error),
}

/// Connects to the bus at this address, and sends nothing.
///
/// # Errors
/// The address is not one of a Unix socket, or no bus listens there.
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
