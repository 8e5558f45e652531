//! udev's watch on a disk's node: it answers the close of a writable descriptor with BLKRRPART and an
//! event of its own, also where nothing was written (`udev-watch.c`, systemd 249 and later). While it
//! processes the disk it does not watch: a descriptor that is closed then goes unnoticed, and no
//! partition goes and comes back behind the reply to an attach.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::{fstat, major, minor};

use super::inotify;

/// Has a link by the name of each watched device.
const FOLDER: &str = "/run/udev/watch";
/// udev starts within a fraction of it, unless it has much else to do.
const PATIENCE: Duration = Duration::from_millis(100);

/// Waits for udev's watches to go.
pub struct NodeWatches {
    /// Watches nothing, where nobody uses it. One is kept, since to close it takes long; those who need
    /// one at the same time make their own.
    idle: Mutex<Option<Inotify>>,
}

impl NodeWatches {
    /// Waits for no watch yet.
    pub fn new() -> Self {
        Self { idle: Mutex::new(inotify::new().ok()) }
    }

    /// udev's watch on the node of an open disk; `None` where it has none.
    pub fn of(&self, disk: &OwnedFd) -> Option<NodeWatch<'_>> {
        let node = fstat(disk).ok()?.st_rdev;
        self.in_folder(Path::new(FOLDER), &format!("b{}:{}", major(node), minor(node))).ok().flatten()
    }

    fn in_folder(&self, folder: &Path, name: &str) -> nix::Result<Option<NodeWatch<'_>>> {
        let link = folder.join(name);
        if !link.is_symlink() {
            return Ok(None);
        }
        let idle = self.idle().take();
        let events = idle.map_or_else(inotify::new, Ok)?;
        let descriptor = events.add_watch(folder, AddWatchFlags::IN_DELETE)?;
        let watch = NodeWatch { watches: self, events: Some(events), descriptor, link: name.into() };
        Ok(link.is_symlink().then_some(watch))
    }

    fn idle(&self) -> MutexGuard<'_, Option<Inotify>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch on one node.
pub struct NodeWatch<'a> {
    watches: &'a NodeWatches,
    events: Option<Inotify>,
    descriptor: WatchDescriptor,
    link: OsString,
}

impl NodeWatch<'_> {
    /// Closes a writable descriptor of the node when udev has taken its watch off, or has had the time
    /// to do so.
    pub fn close_unnoticed(self, writable: OwnedFd) {
        self.wait_until_off(PATIENCE);
        drop(writable);
    }

    /// Returns when the link has gone since the watch was looked at, even where there is a new one.
    /// False where it has not in time.
    fn wait_until_off(&self, patience: Duration) -> bool {
        let Some(events) = &self.events else { return false };
        inotify::comes(events, Instant::now() + patience, |event| self.is_end(event))
    }

    fn is_end(&self, event: &InotifyEvent) -> bool {
        event.wd == self.descriptor && event.name.as_ref() == Some(&self.link)
    }
}

impl Drop for NodeWatch<'_> {
    fn drop(&mut self) {
        // What is left to be read names a watch that is not used again.
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
    fn where_udev_does_not_watch_nothing_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let watches = NodeWatches::new();
        assert!(watches.in_folder(folder.path(), "b7:0").unwrap().is_none());
        assert!(watches.in_folder(&folder.path().join("none"), "b7:0").unwrap().is_none());
    }

    #[test]
    fn the_end_of_this_watch_is_waited_for_time_and_again() {
        let folder = tempfile::tempdir().unwrap();
        let watches = NodeWatches::new();
        for _ in 0..2 {
            let [this, other] = ["b7:0", "b7:1"].map(|name| folder.path().join(name));
            symlink("1", &this).unwrap();
            symlink("2", &other).unwrap();
            let watch = watches.in_folder(folder.path(), "b7:0").unwrap().unwrap();
            std::fs::remove_file(other).unwrap();
            assert!(!watch.wait_until_off(Duration::ZERO), "it was another that ended");
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| watch.wait_until_off(Duration::from_secs(60)));
                std::fs::remove_file(&this).unwrap();
                symlink("3", &this).unwrap();
                assert!(waiting.join().unwrap());
            });
            drop(watch);
            assert!(watches.idle().is_some(), "it is used again");
            std::fs::remove_file(this).unwrap();
        }
    }

    #[test]
    fn a_watch_that_stays_is_not_waited_for_long() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("b7:0");
        symlink("1", &link).unwrap();
        let watches = NodeWatches::new();
        let watch = watches.in_folder(folder.path(), "b7:0").unwrap().unwrap();
        assert!(!watch.wait_until_off(Duration::from_millis(1)));
        assert!(link.is_symlink());
    }
}
