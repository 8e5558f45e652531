//! The attachments and mount directories in state files, for a restart.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use loopd_common::State;

use crate::error::Error;
use crate::findings::FileEnd;
use crate::kernel::{Device, DiskSequence, FileIdentity};
use crate::ownership::Ownership;
use crate::snapshot::Snapshot;

/// The phase of a saved attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its attach is in progress: it is not published.
    Attaching,
    /// It is published.
    Attached,
    /// It is detached at its last close.
    Detaching,
}

impl Phase {
    /// The name in a state file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
        }
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let all = [Self::Attaching, Self::Attached, Self::Detaching];
        all.into_iter().find(|phase| phase.as_str() == word).ok_or_else(|| format!("no phase is {word:?}"))
    }
}

/// The state of an attachment that the kernel does not keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAttachment {
    /// The disk sequence of the attach.
    pub id: DiskSequence,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The disk sequence that the device has now.
    pub disk_sequence: DiskSequence,
    /// Its owner and lifetime. Without a client if the bus of that client is gone.
    pub ownership: Ownership,
    /// Its phase.
    pub phase: Phase,
    /// Whether the device node is to be removed at the end.
    pub node_made: bool,
    /// The new backing file while a replacement is in progress, which also changes the disk sequence.
    pub next_file: Option<FileIdentity>,
    /// The end of the backing file, which cannot be read through the device.
    pub file_end: FileEnd,
    /// The cleartexts of its volumes.
    pub cleartexts: Vec<SavedCleartext>,
}

/// What neither the kernel nor udev knows of a cleartext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedCleartext {
    /// N of `/dev/loop0pN`; `None` for the whole device.
    pub partition: Option<u32>,
    /// The disk sequence of the mapping.
    pub disk_sequence: DiskSequence,
    /// When it was unlocked: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// The user who unlocked it.
    pub uid: u32,
    /// Whether it was locked lazily: it is closed with its last user.
    pub closing: bool,
}

impl SavedAttachment {
    /// The state of a published attachment; `None` for a foreign device.
    pub(super) fn of(snapshot: &Snapshot, before: Option<&Self>) -> Option<Self> {
        // The end of a replacement is saved before the events of the time before it.
        let saved = before.map_or(DiskSequence::default(), |before| before.disk_sequence);
        let disk_sequence = saved.max(snapshot.device.disk_sequence);
        let newer = before.filter(|before| before.disk_sequence > snapshot.device.disk_sequence);
        let unchanged = before.filter(|before| before.disk_sequence == disk_sequence);
        Some(Self {
            id: snapshot.id,
            number: snapshot.device.number,
            disk_sequence,
            ownership: snapshot.ownership.clone()?,
            phase: match snapshot.state {
                State::Attached => Phase::Attached,
                State::Detaching => Phase::Detaching,
            },
            node_made: before.is_some_and(|before| before.node_made),
            next_file: unchanged.and_then(|before| before.next_file),
            file_end: newer.map_or(snapshot.file_end, |before| before.file_end),
            cleartexts: snapshot.saved_cleartexts.clone(),
        })
    }

    /// Whether this device belongs to the saved attachment, also if its backing file was replaced as the daemon died.
    pub(super) fn is_of(&self, device: &Device) -> bool {
        let was_replaced = || {
            device.disk_sequence > self.disk_sequence && self.next_file.is_some_and(|file| device.shows(file))
        };
        device.disk_sequence == self.disk_sequence || was_replaced()
    }
}

/// A mount directory that loopd made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountDirectory {
    /// The path.
    pub path: PathBuf,
    /// The user that it was made for.
    pub uid: u32,
    /// Whether the path was returned to a caller. Until then the mount is undone by the next daemon.
    pub announced: bool,
}

/// The state files. A call returns when the file is written; a daemon that dies during a call leaves the old or the
/// new file.
pub trait Store: Send + Sync + 'static {
    /// Writes the state of an attachment, and replaces an existing one.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write(&self, saved: &SavedAttachment) -> Result<(), Error>;

    /// Erases the state of an attachment.
    fn erase(&self, id: DiskSequence);

    /// All saved attachments. An invalid file is moved aside.
    fn read(&self) -> Vec<SavedAttachment>;

    /// Announces that a device with this mark is about to be made.
    ///
    /// # Errors
    /// The announcement cannot be written, or there is one with this mark.
    fn announce(&self, mark: u64) -> Result<(), Error>;

    /// Retracts an announcement.
    fn retract(&self, mark: u64);

    /// The announcements that were not retracted.
    fn announced(&self) -> Vec<u64>;

    /// Writes the state of a mount directory, and replaces an existing one.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write_mount_directory(&self, directory: &MountDirectory) -> Result<(), Error>;

    /// Erases the state of a mount directory.
    fn erase_mount_directory(&self, path: &Path);

    /// All saved mount directories.
    fn read_mount_directories(&self) -> Vec<MountDirectory>;
}

#[cfg(test)]
mod tests {
    use loopd_common::Lifetime;

    use super::*;

    #[test]
    fn phases_are_read_back_by_name() {
        let words: Vec<_> = [Phase::Attaching, Phase::Attached, Phase::Detaching].map(Phase::as_str).into();
        assert_eq!(words, ["attaching", "attached", "detaching"]);
        for phase in [Phase::Attaching, Phase::Attached, Phase::Detaching] {
            assert_eq!(phase.as_str().parse(), Ok(phase));
        }
        assert!("flying".parse::<Phase>().is_err());
    }

    fn saved(next_file: Option<FileIdentity>) -> SavedAttachment {
        SavedAttachment {
            id: DiskSequence(5),
            number: 0,
            disk_sequence: DiskSequence(5),
            ownership: Ownership::new(7, None, Lifetime::Persistent),
            phase: Phase::Attached,
            node_made: true,
            next_file,
            file_end: FileEnd::default(),
            cleartexts: Vec::new(),
        }
    }

    fn device(sequence: u64, inode: u64) -> Device {
        Device { disk_sequence: DiskSequence(sequence), backing_inode: inode, ..Device::default() }
    }

    const NEXT: FileIdentity = FileIdentity { device: 0, inode: 9 };

    #[test]
    fn a_device_is_recognized_by_its_sequence_or_the_expected_file() {
        for (next_file, sequence, inode, expected) in [
            (None, 5, 1, true),
            (None, 6, 1, false),
            (None, 4, 1, false),
            (Some(NEXT), 5, 1, true),
            (Some(NEXT), 6, 9, true),
            (Some(NEXT), 6, 1, false),
            (Some(NEXT), 4, 9, false),
        ] {
            let is_of = saved(next_file).is_of(&device(sequence, inode));
            assert_eq!(is_of, expected, "{next_file:?}, {sequence}, {inode}");
        }
    }

    #[test]
    fn an_expected_file_is_kept_until_the_sequence_changes() {
        let before = saved(Some(NEXT));
        for (sequence, expected) in [(5, Some(NEXT)), (6, None)] {
            let mut snapshot = Snapshot::of_device(device(sequence, 1));
            snapshot.ownership = Some(before.ownership.clone());
            let after = SavedAttachment::of(&snapshot, Some(&before)).unwrap();
            assert_eq!((after.next_file, after.node_made), (expected, true), "{sequence}");
        }
    }
}
