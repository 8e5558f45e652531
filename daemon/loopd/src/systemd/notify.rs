//! Notifications to the service manager (`sd_notify(3)`). Without a service manager they do nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
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

/// Blocks until the service manager has processed all notifications sent so far, at most two seconds.
pub fn barrier() {
    if is_available() && !wait_for_barrier() {
        warn!("the service manager does not process notifications");
    }
}

/// The service manager closes the write end of the pipe when it processes `BARRIER=1`. False if it does not in time.
fn wait_for_barrier() -> bool {
    let Ok((receiver, sender)) = std::io::pipe() else { return true };
    let sent = sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sender.as_fd()]);
    if let Err(error) = sent {
        warn!("cannot notify the service manager: {error}");
        return true;
    }
    drop(sender);
    let deadline = Instant::now() + BARRIER_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            processed => return processed != Ok(0),
        }
    }
}
