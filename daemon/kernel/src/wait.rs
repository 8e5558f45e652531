//! Waits for events of inotify(7) instead of polling.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};

/// How long another process may keep a device open for a moment, as probes of udev and mkfs do.
const PATIENCE: Duration = Duration::from_secs(1);
/// Much longer than the kernel takes from the event of a close to the release of the device: it sends the
/// event first (`__fput`, fs/file_table.c).
const RELEASE: Duration = Duration::from_millis(1);

/// An inotify instance without watches. Closing one that has had a watch takes the kernel 20 ms.
pub fn watcher() -> nix::Result<Inotify> {
    Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
}

/// Blocks until a matching event arrives; false if none does before the deadline, or events cannot be read. Discards
/// the events that are read together with it.
pub fn for_event(watcher: &Inotify, deadline: Instant, matches: impl Fn(&InotifyEvent) -> bool) -> bool {
    for_event_of(watcher, || watcher.read_events(), deadline, matches)
}

/// [`for_event`] with the call that reads the events of `file`.
fn for_event_of(
    file: &impl AsFd,
    read_events: impl Fn() -> nix::Result<Vec<InotifyEvent>>,
    deadline: Instant,
    matches: impl Fn(&InotifyEvent) -> bool,
) -> bool {
    loop {
        match read_events() {
            Ok(events) if events.iter().any(&matches) => return true,
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return false,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Repeats a call that fails with `EBUSY` at each close of the node, and once more after a second. Gives up
/// as soon as `may_end` finds a user that will not close the node soon.
///
/// # Errors
/// The error of the last call; `EBUSY` if the node cannot be watched.
pub fn while_busy<T>(
    node: &Path,
    mut call: impl FnMut() -> nix::Result<T>,
    may_end: impl Fn() -> bool,
) -> nix::Result<T> {
    let mut call = || match call() {
        Err(Errno::EBUSY) if may_end() => None,
        result => Some(result),
    };
    if let Some(result) = call() {
        return result;
    }
    let deadline = Instant::now() + PATIENCE;
    let Ok(watcher) = watch_closes(node) else { return Err(Errno::EBUSY) };
    let mut is_early = true;
    while is_early {
        if let Some(result) = call() {
            return result;
        }
        is_early = for_event(&watcher, deadline, |_| true);
        std::thread::sleep(RELEASE);
    }
    call().unwrap_or(Err(Errno::EBUSY))
}

fn watch_closes(node: &Path) -> nix::Result<Inotify> {
    let watcher = watcher()?;
    watcher.add_watch(node, AddWatchFlags::IN_CLOSE)?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;

    use super::*;

    #[test]
    fn a_call_that_succeeds_is_made_once() {
        let calls = Cell::new(0);
        let call = || Ok(calls.replace(calls.get() + 1));
        assert_eq!(while_busy(Path::new("/nonexistent"), call, || true), Ok(0));
    }

    #[test]
    fn a_call_is_repeated_when_the_node_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let node = directory.path().join("node");
        let user = Cell::new(Some(File::create(&node).unwrap()));
        let calls = Cell::new(0);
        // Closed after the watch was added, so that only its event can end the wait early.
        let call = || match calls.replace(calls.get() + 1) {
            0 => Err(Errno::EBUSY),
            1 => {
                drop(user.take());
                Err(Errno::EBUSY)
            }
            _ => Ok(()),
        };
        let start = Instant::now();
        assert_eq!(while_busy(&node, call, || true), Ok(()));
        assert!(start.elapsed() < PATIENCE);
    }

    #[test]
    fn a_node_that_stays_open_is_busy_after_the_deadline() {
        let node = tempfile::NamedTempFile::new().unwrap();
        let start = Instant::now();
        assert_eq!(while_busy(node.path(), || Err::<(), _>(Errno::EBUSY), || true), Err(Errno::EBUSY));
        assert!(start.elapsed() >= PATIENCE);
    }

    #[test]
    fn a_user_that_stays_is_not_waited_for() {
        let node = tempfile::NamedTempFile::new().unwrap();
        let start = Instant::now();
        assert_eq!(while_busy(node.path(), || Err::<(), _>(Errno::EBUSY), || false), Err(Errno::EBUSY));
        assert!(start.elapsed() < PATIENCE);
    }

    /// A file that is always ready, as an inotify instance with events.
    fn ready_file() -> File {
        File::open("/dev/zero").unwrap()
    }

    #[test]
    fn an_error_of_a_read_ends_the_wait() {
        let reads = Cell::new(0);
        let read = || {
            // The first error is transient.
            let errno = [Errno::EAGAIN, Errno::EINTR, Errno::EIO].get(reads.replace(reads.get() + 1));
            Err(*errno.expect("it reads again after an error"))
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        assert!(!for_event_of(&ready_file(), read, deadline, |_| true));
        assert_eq!(reads.get(), 3);
    }

    #[test]
    fn other_events_do_not_extend_the_wait() {
        let deadline = Instant::now() + Duration::from_millis(10);
        let read = || {
            assert!(Instant::now() < deadline + Duration::from_secs(5), "it reads after the deadline");
            Ok(Vec::new())
        };
        assert!(!for_event_of(&ready_file(), read, deadline, |_| true));
    }

    #[test]
    fn a_node_that_cannot_be_watched_is_busy() {
        let call = || Err::<(), _>(Errno::EBUSY);
        assert_eq!(while_busy(Path::new("/nonexistent"), call, || true), Err(Errno::EBUSY));
    }
}
