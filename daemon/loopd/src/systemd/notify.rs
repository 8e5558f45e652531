//! Notifications to the service manager (`sd_notify(3)`). Without a service manager they do nothing.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::unix::pipe;
use tracing::warn;

/// How long to wait until the service manager has processed its notifications, which takes milliseconds.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a service manager started this daemon and accepts notifications.
#[must_use]
pub fn is_available() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Sends a notification. A failure is logged.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("cannot notify the service manager: {error}");
    }
}

/// Stores a copy of a descriptor in the service manager's file descriptor store under this name. The
/// next daemon receives it. Returns whether the notification was sent.
pub fn store_fd(name: &str, descriptor: BorrowedFd<'_>) -> bool {
    // A loop device never polls as hung up: nothing to watch.
    let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    let sent = sd_notify::notify_with_fds(&state, &[descriptor]);
    if let Err(error) = &sent {
        warn!("cannot store {name} in the service manager, it ends with this daemon: {error}");
    }
    sent.is_ok()
}

/// Removes the descriptors with this name from the store, which closes the copies.
pub fn remove_fd(name: &str) {
    notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Waits until the service manager has processed all notifications sent so far.
pub async fn barrier() {
    if is_available() && tokio::time::timeout(BARRIER_TIMEOUT, wait_for_barrier()).await.is_err() {
        warn!("the service manager does not process notifications");
    }
}

/// The service manager closes the write end of the pipe when it processes `BARRIER=1`.
async fn wait_for_barrier() {
    let Ok((sender, receiver)) = pipe::pipe() else { return };
    let sent = sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sender.as_fd()]);
    if let Err(error) = sent {
        return warn!("cannot notify the service manager: {error}");
    }
    drop(sender);
    while receiver.readable().await.is_ok() {
        match receiver.try_read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
