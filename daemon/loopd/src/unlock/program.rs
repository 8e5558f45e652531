//! The program `loopd-unlock` in a transient unit, and the channel to it.

use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use loopd_engine::Error;
use loopd_unlock::{Reply, channel};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::sandbox;
use crate::systemd::{JobError, Units};

/// How long the unit may take to start, and the program to report that it runs.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running program. It notices if this is dropped, and undoes what is not kept.
pub struct Program {
    /// A socket that the program has made. Only the program has its other end.
    channel: UnixStream,
}

impl Program {
    /// Starts the program, which may open the volume with this node. `operation` completes "cannot" in the texts of errors.
    ///
    /// # Errors
    /// `NotSupported` without a service manager; `Busy` if the unit exists already; `Timeout`; `Kernel`.
    pub async fn start(
        units: &Units,
        unit: &str,
        volume: Option<&str>,
        operation: &str,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Io { operation: operation.to_owned(), source };
        let program = program().map_err(failed)?;
        let (ours, theirs) = channel::pair().map_err(failed)?;
        let socket = stream(ours).map_err(failed)?;
        let properties = sandbox::properties(&program, volume, theirs.as_fd(), operation);
        units
            .start(unit, &properties, START_TIMEOUT)
            .await
            .map_err(|error| not_started(&error, operation, unit))?;
        drop(properties);
        drop(theirs);
        let hello = receive(&socket, START_TIMEOUT, operation).await?;
        let channel = hello.and_then(|(_, files)| files.into_iter().next()).ok_or_else(|| Error::Failed {
            operation: operation.to_owned(),
            reason: format!("{unit} has ended early; see \"journalctl -u '{unit}'\""),
        })?;
        Ok(Self { channel: stream(channel).map_err(failed)? })
    }

    /// Sends a message with descriptors and returns the reply; `None` if the program has ended.
    ///
    /// # Errors
    /// `Timeout` if there is no reply in time; `Kernel`.
    pub async fn call(
        &self,
        text: &str,
        files: &[BorrowedFd<'_>],
        timeout: Duration,
        operation: &str,
    ) -> Result<Option<Reply>, Error> {
        let send = || channel::send(&self.channel, text, files);
        match self.channel.async_io(Interest::WRITABLE, send).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(None),
            Err(source) => return Err(Error::Io { operation: operation.to_owned(), source }),
        }
        let Some((text, _)) = receive(&self.channel, timeout, operation).await? else { return Ok(None) };
        Reply::decode(&text).map(Some).ok_or_else(|| Error::Failed {
            operation: operation.to_owned(),
            reason: "loopd-unlock has sent an unknown reply; its version is not that of loopd".to_owned(),
        })
    }
}

/// The program is beside the daemon's. After an upgrade the daemon's own file is deleted, its directory is not.
fn program() -> std::io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("loopd-unlock"))
}

fn stream(socket: OwnedFd) -> std::io::Result<UnixStream> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

async fn receive(
    socket: &UnixStream,
    timeout: Duration,
    operation: &str,
) -> Result<Option<channel::Message>, Error> {
    let received = socket.async_io(Interest::READABLE, || channel::receive(socket));
    match tokio::time::timeout(timeout, received).await {
        Ok(Ok(message)) => Ok(message),
        // The program has ended with something unread.
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
        Ok(Err(source)) => Err(Error::Io { operation: operation.to_owned(), source }),
        Err(_) => Err(Error::Timeout {
            operation: operation.to_owned(),
            reason: "loopd-unlock does not answer; see \"systemctl status 'loopd-unlock-*'\"".to_owned(),
        }),
    }
}

fn not_started(error: &JobError, operation: &str, unit: &str) -> Error {
    match error {
        JobError::Exists(_) => Error::Busy {
            operation: operation.to_owned(),
            reason: format!(
                "the last attempt has not ended yet, perhaps since a file of its caller does not answer (\"systemctl \
                 status {unit}\"); try again later"
            ),
        },
        error => error.to_error(operation, unit, ""),
    }
}
