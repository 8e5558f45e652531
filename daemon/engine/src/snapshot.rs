//! What clients can see of an attachment, and how it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use loopd_common::State;

use crate::cleartext::CleartextSnapshot;
use crate::findings::FileEnd;
use crate::kernel::{Device, DiskSequence, FileSystem, Partition};
use crate::ownership::{Ownership, is_root};
use crate::saved::SavedCleartext;
use crate::warning::Warning;

/// What clients can see of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionSnapshot {
    /// Its node, and its entry in the table.
    pub partition: Partition,
    /// What udev found on it.
    pub file_system: FileSystem,
    /// Where it is mounted.
    pub mount_points: Vec<PathBuf>,
    /// Its cleartext, if it is unlocked.
    pub cleartext: Option<CleartextSnapshot>,
}

/// What clients can see of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The disk sequence of the attach, which names its object.
    pub id: DiskSequence,
    /// The device.
    pub device: Device,
    /// `None` for a foreign device.
    pub ownership: Option<Ownership>,
    /// Its state.
    pub state: State,
    /// What udev found on the whole device.
    pub file_system: FileSystem,
    /// Where the whole device is mounted.
    pub mount_points: Vec<PathBuf>,
    /// The cleartext of the whole device, if it is unlocked.
    pub cleartext: Option<CleartextSnapshot>,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionSnapshot>,
    /// What is unusual about it, at most [`MOST_WARNINGS`](loopd_common::limits::MOST_WARNINGS).
    pub warnings: Vec<Warning>,
    /// What was found at the end of the backing file; to be saved.
    pub file_end: FileEnd,
    /// What is to be saved of its cleartexts, and of those of its partitions.
    pub saved_cleartexts: Vec<SavedCleartext>,
}

/// The changes of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The disk sequence that names its object.
    pub id: DiskSequence,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The attachment without its partitions, if it is different itself.
    pub attachment: Option<Snapshot>,
    /// The partitions that are new or different.
    pub partitions: Vec<PartitionSnapshot>,
    /// The numbers of the partitions that are gone.
    pub gone: Vec<u32>,
}

impl Changes {
    /// The changes between two snapshots; `None` if there are none.
    pub(super) fn between(before: &Snapshot, mut after: Snapshot) -> Option<Self> {
        let by_number = |snapshot: &PartitionSnapshot| snapshot.partition.node.number;
        let (now, known) = (std::mem::take(&mut after.partitions), &before.partitions);
        let numbers: BTreeSet<u32> = now.iter().map(by_number).collect();
        let known_as: BTreeMap<u32, &PartitionSnapshot> =
            known.iter().map(|snapshot| (by_number(snapshot), snapshot)).collect();
        let changes = Self {
            id: after.id,
            number: after.device.number,
            partitions: now
                .into_iter()
                .filter(|snapshot| known_as.get(&by_number(snapshot)).is_none_or(|known| *known != snapshot))
                .collect(),
            gone: known_as.into_keys().filter(|number| !numbers.contains(number)).collect(),
            attachment: Some(after).filter(|after| !after.is_same_apart_from_partitions(before)),
        };
        (!changes.is_empty()).then_some(changes)
    }

    fn is_empty(&self) -> bool {
        self.attachment.is_none() && self.partitions.is_empty() && self.gone.is_empty()
    }
}

impl Snapshot {
    /// The cleartext of a partition, or of the whole device (`None`).
    pub(super) fn cleartext_of(&self, partition: Option<u32>) -> Option<&CleartextSnapshot> {
        let Some(number) = partition else { return self.cleartext.as_ref() };
        let found = self.partitions.iter().find(|shown| shown.partition.node.number == number);
        found.and_then(|shown| shown.cleartext.as_ref())
    }

    /// The cleartexts of the whole device and of its partitions, each with the number of the partition.
    pub(super) fn cleartexts(&self) -> impl Iterator<Item = (Option<u32>, &CleartextSnapshot)> {
        let of_partitions = self
            .partitions
            .iter()
            .filter_map(|shown| Some((Some(shown.partition.node.number), shown.cleartext.as_ref()?)));
        self.cleartext.iter().map(|cleartext| (None, cleartext)).chain(of_partitions)
    }

    /// The first cleartext of a volume that shares its bytes with a partition, or with the whole device (`None`), with
    /// the number of the partition and the node of that volume.
    pub(super) fn unlocked_with(
        &self,
        partition: Option<u32>,
    ) -> Option<(Option<u32>, String, &CleartextSnapshot)> {
        let shares = |of: &Option<u32>| of.is_none() || partition.is_none() || *of == partition;
        let (of, cleartext) = self.cleartexts().find(|(of, _)| shares(of))?;
        let node = of.map_or_else(|| self.device.node(), |number| self.device.partition_node(number));
        Some((of, node, cleartext))
    }

    /// A mount that shares its bytes with a partition, or with the whole device (`None`): the node and the directory.
    pub(super) fn mounted_with(&self, partition: Option<u32>) -> Option<(String, &Path)> {
        let whole = self.mount_points.first().map(|path| (self.device.node(), path.as_path()));
        whole.or_else(|| {
            let shown = self
                .partitions
                .iter()
                .filter(|shown| partition.is_none_or(|number| number == shown.partition.node.number));
            shown.into_iter().find_map(|shown| {
                let node = self.device.partition_node(shown.partition.node.number);
                Some((node, shown.mount_points.first()?.as_path()))
            })
        })
    }

    /// The uid that it belongs to.
    pub(super) fn owner(&self) -> Option<u32> {
        self.ownership.as_ref().map(|ownership| ownership.uid)
    }

    fn is_same_apart_from_partitions(&self, other: &Self) -> bool {
        let Self {
            id,
            device,
            ownership,
            state,
            file_system,
            mount_points,
            cleartext,
            partitions: _,
            warnings,
            file_end,
            saved_cleartexts,
        } = self;
        (*id, device, ownership, *state) == (other.id, &other.device, &other.ownership, other.state)
            && (file_system, mount_points, cleartext)
                == (&other.file_system, &other.mount_points, &other.cleartext)
            && (warnings, file_end, saved_cleartexts)
                == (&other.warnings, &other.file_end, &other.saved_cleartexts)
    }
}

impl Snapshot {
    /// Whether this user is its owner. A foreign device has no owner.
    #[must_use]
    pub fn is_owned_by(&self, uid: u32) -> bool {
        self.ownership.as_ref().is_some_and(|ownership| ownership.uid == uid)
    }

    /// Whether this user may change it without authorization: its owner, or root.
    #[must_use]
    pub fn may_be_changed_by(&self, uid: u32) -> bool {
        is_root(uid) || self.is_owned_by(uid)
    }
}

#[cfg(test)]
impl Snapshot {
    /// Applies changes.
    pub(super) fn apply(&mut self, changes: Changes) {
        if let Some(attachment) = changes.attachment {
            let partitions = std::mem::take(&mut self.partitions);
            *self = Self { partitions, ..attachment };
        }
        let number = |snapshot: &PartitionSnapshot| snapshot.partition.node.number;
        let replaced = |known: &PartitionSnapshot| {
            changes.gone.contains(&number(known))
                || changes.partitions.iter().any(|new| number(new) == number(known))
        };
        self.partitions.retain(|known| !replaced(known));
        self.partitions.extend(changes.partitions);
        self.partitions.sort_unstable_by_key(number);
    }

    /// The snapshot of a device with default values for everything else.
    pub(super) fn of_device(device: Device) -> Self {
        crate::record::Record::<crate::simulated::Simulated>::foreign(device, FileSystem::default())
            .snapshot(DiskSequence(1), &crate::mount_table::MountTable::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ownership;
    use crate::kernel::Device;
    use loopd_common::Lifetime;

    #[test]
    fn an_attachment_may_be_changed_by_its_owner_and_root() {
        let mut attachment = Snapshot::of_device(Device::default());
        let changes = |attachment: &Snapshot| [0, 1000, 1001].map(|uid| attachment.may_be_changed_by(uid));
        assert_eq!(changes(&attachment), [true, false, false], "a foreign device is root's to change");
        assert!(!attachment.is_owned_by(0), "and has no owner");
        attachment.ownership = Some(Ownership::new(1000, None, Lifetime::Persistent));
        assert_eq!(changes(&attachment), [true, true, false]);
        assert_eq!([0, 1000].map(|uid| attachment.is_owned_by(uid)), [false, true]);
    }
}
