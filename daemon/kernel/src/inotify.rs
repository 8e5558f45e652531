//! Waiting for what inotify(7) tells, without asking again and again.

use std::os::fd::AsFd as _;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{InitFlags, Inotify, InotifyEvent};

/// Watches nothing yet. To close one that has watched takes the kernel 20 ms.
pub fn new() -> nix::Result<Inotify> {
    Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
}

/// Blocks until such an event comes; false where none came in time. Those before it are used up.
pub fn comes(events: &Inotify, deadline: Instant, is_it: impl Fn(&InotifyEvent) -> bool) -> bool {
    loop {
        if events.read_events().is_ok_and(|events| events.iter().any(&is_it)) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return false,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
