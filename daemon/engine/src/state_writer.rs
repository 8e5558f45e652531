//! Writes the state files of attachments that have changed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::clock::microseconds_now;
use crate::error::Error;
use crate::event::Event;
use crate::findings::FileEnd;
use crate::kernel::{DiskSequence, FileIdentity};
use crate::saved::{MountDirectory, SavedAttachment, SavedCleartext, Store};
use crate::snapshot::Snapshot;

/// Announces that a device is about to be made. It remains after an attach that was not finished: the next daemon
/// then finds the device by its mark.
#[must_use]
pub(super) struct Announcement {
    mark: u64,
}

impl Announcement {
    /// The mark of the device.
    pub fn mark(&self) -> u64 {
        self.mark
    }
}

/// Writes the state files of attachments that have changed.
pub(super) struct StateWriter {
    pub(super) store: Box<dyn Store>,
    written: Mutex<HashMap<DiskSequence, SavedAttachment>>,
    last_mark: Mutex<u64>,
}

impl StateWriter {
    pub fn new(store: Box<dyn Store>) -> Self {
        Self { store, written: Mutex::default(), last_mark: Mutex::default() }
    }

    /// Announces that a device is about to be made.
    pub fn announce(&self) -> Result<Announcement, Error> {
        let mark = {
            let mut last = self.last_mark.lock().unwrap_or_else(PoisonError::into_inner);
            // No earlier daemon has used this mark, since time has passed.
            *last = microseconds_now().max(*last + 1);
            *last
        };
        self.store.announce(mark)?;
        Ok(Announcement { mark })
    }

    /// Retracts an announcement: the device is saved, or there is none.
    pub fn retract(&self, announcement: Announcement) {
        self.store.retract(announcement.mark);
    }

    pub(super) fn written(&self) -> MutexGuard<'_, HashMap<DiskSequence, SavedAttachment>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self) -> Vec<SavedAttachment> {
        let all = self.store.read();
        *self.written() = all.iter().map(|saved| (saved.id, saved.clone())).collect();
        all
    }

    pub(super) fn write(&self, saved: SavedAttachment) -> Result<(), Error> {
        self.rewrite(saved.id, |_| Some(saved))
    }

    /// Changes the state file of an attachment; `None` leaves it.
    fn rewrite(
        &self,
        id: DiskSequence,
        change: impl FnOnce(Option<&SavedAttachment>) -> Option<SavedAttachment>,
    ) -> Result<(), Error> {
        let mut written = self.written();
        let before = written.get(&id);
        if let Some(now) = change(before).filter(|now| before != Some(now)) {
            self.store.write(&now)?;
            written.insert(id, now);
        }
        Ok(())
    }

    /// Saves the state that an event publishes; to be called before the event is published.
    pub fn follow(&self, event: &Event) {
        match event {
            Event::Added(snapshot) => self.save(snapshot),
            Event::Changed(changes) => {
                if let Some(snapshot) = &changes.attachment {
                    self.save(snapshot);
                }
            }
            Event::Removed(id) => self.end(*id),
            Event::Checkpoint(_) => {}
        }
    }

    fn save(&self, snapshot: &Snapshot) {
        if let Err(error) = self.rewrite(snapshot.id, |before| SavedAttachment::of(snapshot, before)) {
            warn!(device = snapshot.device.node(), disk_sequence = snapshot.id.0, "{error}");
        }
    }

    /// Saves the file that the attachment is about to show.
    pub fn begin_replacement(&self, id: DiskSequence, file: FileIdentity) -> Result<(), Error> {
        self.rewrite(id, |before| Some(SavedAttachment { next_file: Some(file), ..before?.clone() }))
    }

    /// Saves that no replacement is in progress, the disk sequence that the device has after it, and the end of the
    /// file if that is another one now.
    pub fn end_replacement(
        &self,
        id: DiskSequence,
        disk_sequence: DiskSequence,
        file_end: FileEnd,
    ) -> Result<(), Error> {
        self.rewrite(id, |before| {
            let before = before?.clone();
            let file_end = if before.disk_sequence == disk_sequence { before.file_end } else { file_end };
            Some(SavedAttachment { next_file: None, disk_sequence, file_end, ..before })
        })
    }

    /// Saves a new cleartext of an attachment. Does nothing for a foreign device.
    pub fn add_cleartext(&self, id: DiskSequence, cleartext: SavedCleartext) -> Result<(), Error> {
        self.rewrite(id, |before| {
            let before = before?.clone();
            let others = before.cleartexts.into_iter().filter(|known| known.partition != cleartext.partition);
            let cleartexts = others.chain([cleartext]).collect();
            Some(SavedAttachment { cleartexts, ..before })
        })
    }

    /// Saves a mount directory that is about to be made or announced.
    pub fn write_mount_directory(&self, directory: &MountDirectory) -> Result<(), Error> {
        self.store.write_mount_directory(directory)
    }

    /// Erases the state of a mount directory that was removed.
    pub fn erase_mount_directory(&self, path: &Path) {
        self.store.erase_mount_directory(path);
    }

    /// The saved mount directories of earlier daemons.
    pub fn read_mount_directories(&self) -> Vec<MountDirectory> {
        self.store.read_mount_directories()
    }

    /// Erases the state of an attachment that has ended.
    pub fn end(&self, id: DiskSequence) {
        if self.written().remove(&id).is_some() {
            self.store.erase(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulated::{Files, Simulated};
    use crate::tests::clock;

    #[tokio::test(start_paused = true)]
    async fn no_mark_is_used_twice_if_the_clock_stands_still() {
        clock::start(1000);
        let writer = StateWriter::new(Box::new(Files::on(&Simulated::new())));
        let marks: Vec<u64> = (0..3).map(|_| writer.announce().unwrap().mark()).collect();
        clock::stop();
        assert_eq!(marks, [1000, 1001, 1002]);
    }
}
