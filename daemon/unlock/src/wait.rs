//! Waits for descriptors, until loopd closes its end or the time is over.

use std::io::Result;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// One of the descriptors can be read, or its other end is closed.
    Ready,
    /// loopd has closed its end.
    Abandoned,
    /// The time is over.
    TimedOut,
}

/// Waits until one of the files can be read.
///
/// # Errors
/// The system has no memory.
pub fn until_readable(
    files: &[BorrowedFd<'_>],
    loopd: Option<BorrowedFd<'_>>,
    end: Instant,
) -> Result<Woken> {
    let mut polled: Vec<_> =
        files.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)).collect();
    // Without a flag, only the hang-up is reported.
    polled.extend(loopd.map(|loopd| PollFd::from_borrowed_fd(loopd, PollFlags::empty())));
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match poll(&mut polled, Some(&Timespec::try_from(left).unwrap_or_default())) {
            Ok(0) if left.is_zero() => return Ok(Woken::TimedOut),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => {
                let is_abandoned = polled[files.len()..].iter().any(|loopd| !loopd.revents().is_empty());
                return Ok(if is_abandoned { Woken::Abandoned } else { Woken::Ready });
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}
