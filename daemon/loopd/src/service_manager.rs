//! What the service manager is told (`sd_notify(3)`). Without one nobody is, and nothing fails.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::unix::pipe;
use tracing::warn;

/// The service manager takes up a message within milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether there is one.
#[must_use]
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells it something.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("the service manager was not told: {error}");
    }
}

/// Gives it a copy of a descriptor to keep under this name; it passes it to the next daemon. Says
/// whether it was given.
pub fn keep(name: &str, descriptor: BorrowedFd<'_>) -> bool {
    // A loop device is always ready: there is nothing to watch.
    let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    let kept = sd_notify::notify_with_fds(&state, &[descriptor]);
    if let Err(error) = &kept {
        warn!("the service manager does not keep {name}, which ends with this daemon: {error}");
    }
    kept.is_ok()
}

/// Has it close its copies with this name.
pub fn abort_calls(name: &str) {
    notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Waits until it has taken up all that it was told.
pub async fn caught_up() {
    if is_there() && tokio::time::timeout(PATIENCE, barrier()).await.is_err() {
        warn!("the service manager does not answer");
    }
}

/// It closes the pipe's end when it comes to this message.
async fn barrier() {
    let Ok((sender, receiver)) = pipe::pipe() else { return };
    let told = sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sender.as_fd()]);
    if let Err(error) = told {
        return warn!("the service manager was not told: {error}");
    }
    drop(sender);
    while receiver.readable().await.is_ok() {
        match receiver.try_read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
