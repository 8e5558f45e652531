//! Sends messages to the bus.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc};
use tracing::warn;
use zbus::Message;
use zbus::connection::socket::WriteHalf;
use zbus::export::async_trait::async_trait;
use zbus::message::Type;

use super::calls::Calls;
use super::descriptors::Descriptors;
use super::{header, stream};

/// The longest message that is sent. On the system bus, dbus-daemon disconnects a client that sends more
/// than 32 MiB.
pub const LONGEST_SENT: usize = 31 << 20;

/// Sends messages, and drops replies that the caller does not expect.
#[derive(Debug)]
pub struct Writer {
    stream: Arc<UnixStream>,
    /// Serializes the messages, including the replies to refused calls.
    turn: Arc<Mutex<()>>,
    calls: Arc<Calls>,
    descriptors: Descriptors,
}

impl Writer {
    pub(super) fn new(
        stream: Arc<UnixStream>,
        turn: Arc<Mutex<()>>,
        calls: Arc<Calls>,
        descriptors: Descriptors,
    ) -> Self {
        Self { stream, turn, calls, descriptors }
    }

    /// Whether the caller expects this reply. Ends the call.
    fn ends_call(&self, message: &Message) -> bool {
        let Some((caller, serial)) = header::answered(message) else { return true };
        let Some(call) = self.calls.end(&caller, serial) else { return true };
        self.descriptors.release(&call.descriptors);
        call.wants_reply
    }

    async fn send_all(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> zbus::Result<()> {
        let _turn = self.turn.lock().await;
        Ok(stream::send_all(&self.stream, bytes, descriptors).await?)
    }
}

/// The error to send instead of a message that is too long; `None` if no reply is expected.
fn too_long(message: &Message) -> zbus::Result<Option<Vec<u8>>> {
    let length = message.data().len();
    warn!("a message of {length} bytes was not sent: the bus takes {LONGEST_SENT} at most");
    match message.message_type() {
        Type::MethodReturn | Type::Error => Ok(header::answered(message).map(|(caller, serial)| {
            let text = format!("the answer has {length} bytes; the bus takes {LONGEST_SENT} at most");
            header::error(serial, Some(&caller), "org.freedesktop.DBus.Error.LimitsExceeded", &text)
        })),
        Type::MethodCall => Err(zbus::Error::ExcessData),
        Type::Signal => Ok(None),
    }
}

#[async_trait]
impl WriteHalf for Writer {
    async fn send_message(&mut self, message: &Message) -> zbus::Result<()> {
        if matches!(message.message_type(), Type::MethodReturn | Type::Error) && !self.ends_call(message) {
            return Ok(());
        }
        let data = message.data();
        if data.len() > LONGEST_SENT {
            return match too_long(message)? {
                Some(error) => self.send_all(&error, &[]).await,
                None => Ok(()),
            };
        }
        let descriptors: Vec<_> = data.fds().iter().map(AsFd::as_fd).collect();
        self.send_all(data.bytes(), &descriptors).await
    }

    async fn sendmsg(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let _turn = self.turn.lock().await;
        stream::send(&self.stream, bytes, descriptors).await
    }

    async fn close(&mut self) -> io::Result<()> {
        Ok(shutdown(&*self.stream, Shutdown::Both)?)
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

/// Sends the replies to refused calls.
pub(super) async fn refuse(
    stream: Arc<UnixStream>,
    turn: Arc<Mutex<()>>,
    mut refusals: mpsc::Receiver<Vec<u8>>,
) {
    while let Some(refusal) = refusals.recv().await {
        let _turn = turn.lock().await;
        if stream::send_all(&stream, &refusal, &[]).await.is_err() {
            // The connection is closed, which the reader reports.
            return;
        }
    }
}
