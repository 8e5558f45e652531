//! udev's watch on the node of a disk: when a writable descriptor is closed, udev issues BLKRRPART and processes
//! the disk again, even if nothing was written (`udev-watch.c`, systemd 249 and later). While udev processes the
//! disk it does not watch it. A descriptor that is closed then has no such effect, and no partition disappears
//! and returns after the reply to an attach.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::{fstat, major, minor};

use crate::wait;

/// Has a link for each watched device.
const DIRECTORY: &str = "/run/udev/watch";
/// How long to wait for udev, which starts in a fraction of this unless its queue is long.
const PATIENCE: Duration = Duration::from_millis(100);

/// Observes udev's watches.
pub struct NodeWatches {
    /// An inotify instance without watches, unless it is in use. It is kept, since closing one takes long;
    /// concurrent users create their own.
    idle: Mutex<Option<Inotify>>,
}

impl NodeWatches {
    /// Starts without a watch.
    pub fn new() -> Self {
        Self { idle: Mutex::new(wait::watcher().ok()) }
    }

    /// udev's watch on the node of an open disk; `None` if it has none.
    pub fn of(&self, disk: &OwnedFd) -> Option<NodeWatch<'_>> {
        let node = fstat(disk).ok()?.st_rdev;
        self.in_directory(Path::new(DIRECTORY), &format!("b{}:{}", major(node), minor(node))).ok().flatten()
    }

    fn in_directory(&self, directory: &Path, name: &str) -> nix::Result<Option<NodeWatch<'_>>> {
        let link = directory.join(name);
        if !link.is_symlink() {
            return Ok(None);
        }
        let idle = self.idle().take();
        let events = idle.map_or_else(wait::watcher, Ok)?;
        let descriptor = events.add_watch(directory, AddWatchFlags::IN_DELETE)?;
        let watch = NodeWatch { watches: self, events: Some(events), descriptor, link: name.into() };
        Ok(link.is_symlink().then_some(watch))
    }

    fn idle(&self) -> MutexGuard<'_, Option<Inotify>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// udev's watch on one node.
pub struct NodeWatch<'a> {
    watches: &'a NodeWatches,
    events: Option<Inotify>,
    descriptor: WatchDescriptor,
    link: OsString,
}

impl NodeWatch<'_> {
    /// Closes a writable descriptor of the node when udev has removed its watch, or after 100 ms.
    pub fn close_unnoticed(self, writable: OwnedFd) {
        self.wait_until_removed(PATIENCE);
        drop(writable);
    }

    /// Waits until the link has been removed, even if there is a new one since; false if it is not removed in
    /// time.
    fn wait_until_removed(&self, patience: Duration) -> bool {
        let Some(events) = &self.events else { return false };
        wait::for_event(events, Instant::now() + patience, |event| self.is_removal(event))
    }

    fn is_removal(&self, event: &InotifyEvent) -> bool {
        event.wd == self.descriptor && event.name.as_ref() == Some(&self.link)
    }
}

impl Drop for NodeWatch<'_> {
    fn drop(&mut self) {
        // Events that are still unread have a watch descriptor that is not used again.
        let events = self.events.take().filter(|events| events.rm_watch(self.descriptor).is_ok());
        let surplus = match &mut *self.watches.idle() {
            idle @ None => std::mem::replace(idle, events),
            Some(_) => events,
        };
        drop(surplus);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn there_is_no_watch_without_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let watches = NodeWatches::new();
        assert!(watches.in_directory(directory.path(), "b7:0").unwrap().is_none());
        assert!(watches.in_directory(&directory.path().join("none"), "b7:0").unwrap().is_none());
    }

    #[test]
    fn the_removal_of_a_watch_is_seen_repeatedly() {
        let directory = tempfile::tempdir().unwrap();
        let watches = NodeWatches::new();
        for _ in 0..2 {
            let [this, other] = ["b7:0", "b7:1"].map(|name| directory.path().join(name));
            symlink("1", &this).unwrap();
            symlink("2", &other).unwrap();
            let watch = watches.in_directory(directory.path(), "b7:0").unwrap().unwrap();
            std::fs::remove_file(other).unwrap();
            assert!(!watch.wait_until_removed(Duration::ZERO), "another watch was removed");
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| watch.wait_until_removed(Duration::from_secs(60)));
                std::fs::remove_file(&this).unwrap();
                symlink("3", &this).unwrap();
                assert!(waiting.join().unwrap());
            });
            drop(watch);
            assert!(watches.idle().is_some(), "the instance is kept");
            std::fs::remove_file(this).unwrap();
        }
    }

    #[test]
    fn a_watch_that_stays_ends_the_wait_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("b7:0");
        symlink("1", &link).unwrap();
        let watches = NodeWatches::new();
        let watch = watches.in_directory(directory.path(), "b7:0").unwrap().unwrap();
        assert!(!watch.wait_until_removed(Duration::from_millis(1)));
        assert!(link.is_symlink());
    }
}
