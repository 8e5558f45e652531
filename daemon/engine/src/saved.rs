//! What a restart needs: attachments and mount directories in state files.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use loopd_common::{Error, State};

use crate::kernel::{Device, DiskSequence, FileIdentity};
use crate::ownership::Ownership;
use crate::snapshot::Snapshot;

/// How far an attachment has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody was told that it is there.
    Attaching,
    /// It was said to be there.
    Attached,
    /// It goes with its last user.
    Detaching,
}

impl Phase {
    /// The word for it in a file.
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

/// What a restart must know of an attachment, and the kernel does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAttachment {
    /// The disk sequence of the attach.
    pub id: DiskSequence,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The disk sequence that the device has now.
    pub disk_sequence: DiskSequence,
    /// Whose it is. Without a client where that one's bus is gone.
    pub ownership: Ownership,
    /// How far it has come.
    pub phase: Phase,
    /// Whether the device node is to be removed with it.
    pub node_made: bool,
    /// The backing file that it gets right now, and a new disk sequence with it.
    pub next_file: Option<FileIdentity>,
}

impl SavedAttachment {
    /// An attachment that the world is told of; `None` where it belongs to nobody.
    pub(super) fn of(snapshot: &Snapshot, before: Option<&Self>) -> Option<Self> {
        let disk_sequence = snapshot.device.disk_sequence;
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
        })
    }

    /// Whether this device is what was written, or became so as the daemon died.
    pub(super) fn is_of(&self, device: &Device) -> bool {
        let was_replaced = || {
            device.disk_sequence > self.disk_sequence && self.next_file.is_some_and(|file| device.shows(file))
        };
        device.disk_sequence == self.disk_sequence || was_replaced()
    }
}

/// A folder of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountDirectory {
    /// Where it is.
    pub path: PathBuf,
    /// The user that it was made for.
    pub uid: u32,
    /// Whether somebody was told of it. Until then, all that was done is to be undone.
    pub announced: bool,
}

/// Where it is written: a call returns when it is so, and a daemon that dies meanwhile leaves the old
/// or the new.
pub trait Store: Send + Sync + 'static {
    /// Writes this, in the place of what was written of the same attachment.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write(&self, saved: &SavedAttachment) -> Result<(), Error>;

    /// Forgets an attachment.
    fn erase(&self, id: DiskSequence);

    /// All that was written and not erased. What cannot be understood is set aside.
    fn read(&self) -> Vec<SavedAttachment>;

    /// Notes that a device with this mark is about to be made.
    ///
    /// # Errors
    /// The announcement cannot be written, or there is one with this mark.
    fn announce(&self, mark: u64) -> Result<(), Error>;

    /// Takes an announcement back.
    fn retract(&self, mark: u64);

    /// The announcements that were not taken back.
    fn announced(&self) -> Vec<u64>;

    /// Writes this, in the place of what was written of the same folder.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write_mount_directory(&self, directory: &MountDirectory) -> Result<(), Error>;

    /// Forgets a folder.
    fn erase_mount_directory(&self, path: &Path);

    /// All folders that were written and not erased.
    fn read_mount_directories(&self) -> Vec<MountDirectory>;
}

#[cfg(test)]
mod tests {
    use loopd_common::Lifetime;

    use super::*;

    #[test]
    fn phases_have_words_of_their_own() {
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
        }
    }

    fn device(sequence: u64, inode: u64) -> Device {
        Device { disk_sequence: DiskSequence(sequence), backing_inode: inode, ..Device::default() }
    }

    const NEXT: FileIdentity = FileIdentity { device: 0, inode: 9 };

    #[test]
    fn a_device_is_known_by_its_sequence_or_by_the_file_that_was_expected() {
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
