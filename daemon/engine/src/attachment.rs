//! One attachment: its device, whom it belongs to, and where it stands.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use loopd_common::{Lifetime, State};
use tokio::sync::Notify;

use super::attach::microseconds_now;
use super::quota::Permit;
use crate::kernel::{Device, DiskSequence, FileSystem, Kernel, Partition, ProbeResult};
use crate::mount_table::MountTable;

/// A client: the unique name of its bus connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(pub String);

impl std::fmt::Display for ClientId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What makes an attachment ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The uid that attached it.
    pub uid: u32,
    /// The connection that it is bound to.
    pub client: Option<ClientId>,
    /// When it ends.
    pub lifetime: Lifetime,
    /// When it was attached: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// Whether one that ends with its last mount has been mounted.
    pub mounted: bool,
    /// When it ends although it has not been mounted, its client being gone: as `since`.
    pub grace_ends: Option<u64>,
}

impl Ownership {
    /// Of one that has just been attached by this uid.
    #[must_use]
    pub fn new(uid: u32, client: Option<ClientId>, lifetime: Lifetime) -> Self {
        Self { uid, client, lifetime, since: microseconds_now(), mounted: false, grace_ends: None }
    }
}

/// What the world may know of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionSnapshot {
    /// Its node, and its entry in the table.
    pub partition: Partition,
    /// What udev found on it.
    pub file_system: FileSystem,
    /// Where it is mounted.
    pub mount_points: Vec<PathBuf>,
}

/// What the world may know of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The disk sequence of the attach: what its object is named by.
    pub id: DiskSequence,
    /// The device.
    pub device: Device,
    /// `None` where loopd did not attach it.
    pub ownership: Option<Ownership>,
    /// Where it stands.
    pub state: State,
    /// What udev found on the whole device.
    pub file_system: FileSystem,
    /// Where the whole device is mounted.
    pub mount_points: Vec<PathBuf>,
    /// Its partitions, by number.
    pub partitions: Vec<PartitionSnapshot>,
}

/// What is different of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// What its object is named by.
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
    /// What became of an attachment; `None` if it looks the same.
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
    /// The uid that it belongs to.
    pub(super) fn owner(&self) -> Option<u32> {
        self.ownership.as_ref().map(|ownership| ownership.uid)
    }

    fn is_same_apart_from_partitions(&self, other: &Self) -> bool {
        let Self { id, device, ownership, state, file_system, mount_points, partitions: _ } = self;
        (*id, device, ownership, *state) == (other.id, &other.device, &other.ownership, other.state)
            && (file_system, mount_points) == (&other.file_system, &other.mount_points)
    }
}

#[cfg(test)]
thread_local! {
    static SHOWN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// How many snapshots of partitions were made, to be shown or compared, on this thread.
#[cfg(test)]
pub(super) fn partitions_shown() -> usize {
    SHOWN.get()
}

#[cfg(test)]
impl Snapshot {
    /// Takes what is different.
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

    /// Of a device that nothing else is known of.
    pub(super) fn of_device(device: Device) -> Self {
        Record::<crate::simulated::Simulated>::foreign(device, FileSystem::default())
            .snapshot(DiskSequence(1), &MountTable::default())
    }
}

/// A partition as the engine keeps it.
pub(super) struct PartitionRecord {
    pub partition: Partition,
    pub file_system: FileSystem,
    /// Whether udev has processed it.
    pub processed: bool,
}

impl PartitionRecord {
    /// A partition that was not there before, and what udev has said of it meanwhile.
    pub fn new(partition: &Partition, found: Option<ProbeResult>) -> Self {
        let mut record =
            Self { partition: partition.clone(), file_system: FileSystem::default(), processed: false };
        if let Some(found) = found {
            record.take(&found);
        }
        record
    }

    /// Takes what the table says now.
    pub fn read_again(&mut self, partition: &Partition) {
        if !partition.entry.table.is_empty() {
            self.partition.entry = partition.entry.clone();
        }
    }

    /// Takes what udev found; what it does not tell stays as it was read from the table. What it
    /// said of an earlier partition with this number is passed over.
    pub fn take(&mut self, found: &ProbeResult) {
        if found.start.is_some_and(|start| start != self.partition.node.start) {
            return;
        }
        self.processed = true;
        self.file_system = found.file_system.clone();
        if !found.entry.table.is_empty() {
            self.partition.entry = found.entry.clone();
        }
    }
}

/// Whether the world was told of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its attach is still under way.
    Pending {
        /// Who asked for it.
        client: ClientId,
        /// Whether that client vanished meanwhile.
        abandoned: bool,
    },
    /// It is on the bus.
    Published,
}

/// An attachment as the engine keeps it.
pub(super) struct Record<K: Kernel> {
    pub device: Device,
    pub ownership: Option<Ownership>,
    pub state: State,
    pub file_system: FileSystem,
    /// By number.
    pub partitions: BTreeMap<u32, PartitionRecord>,
    /// How many of them udev has not processed.
    pub unprocessed: usize,
    /// Whether they were looked at, and made where that is for us to do.
    pub partitioned: bool,
    /// Partitions are looked at by one task at a time.
    pub partitioning: Arc<tokio::sync::Mutex<()>>,
    /// Keeps an autoclear device alive.
    pub hold: Option<K::Hold>,
    /// Whether the world was told of it.
    pub stage: Stage,
    /// Whether udev has processed this disk sequence.
    pub processed: bool,
    /// Whether the device node is to be removed with it.
    pub node_made: bool,
    /// Wakes whoever waits for a change of this attachment.
    pub changed: Arc<Notify>,
    /// One operation on a device at a time.
    pub operation: Arc<tokio::sync::Mutex<()>>,
    /// Whether its backing file is being replaced, and its disk sequence with it.
    pub replacing: bool,
    /// Counts against its owner's limit.
    pub permit: Option<Permit>,
    /// So do its partitions.
    pub partition_permit: Option<Permit>,
}

impl<K: Kernel> Record<K> {
    pub fn foreign(device: Device, file_system: FileSystem) -> Self {
        Self {
            device,
            ownership: None,
            state: State::Attached,
            file_system,
            partitions: BTreeMap::new(),
            unprocessed: 0,
            partitioned: false,
            partitioning: Arc::default(),
            hold: None,
            stage: Stage::Published,
            processed: true,
            node_made: false,
            changed: Arc::default(),
            operation: Arc::default(),
            replacing: false,
            permit: None,
            partition_permit: None,
        }
    }

    pub fn snapshot(&self, id: DiskSequence, mounts: &MountTable) -> Snapshot {
        let partitions = self.partitions.values().map(|partition| self.show(partition, mounts)).collect();
        Snapshot { partitions, ..self.outline(id, mounts) }
    }

    /// A snapshot without the partitions: what it costs does not depend on how many there are.
    pub fn outline(&self, id: DiskSequence, mounts: &MountTable) -> Snapshot {
        Snapshot {
            id,
            device: self.device.clone(),
            ownership: self.ownership.clone(),
            state: self.state,
            file_system: self.file_system.clone(),
            mount_points: mounts.of(self.device.device_number).to_vec(),
            partitions: Vec::new(),
        }
    }

    /// A snapshot of one partition.
    pub fn show(&self, record: &PartitionRecord, mounts: &MountTable) -> PartitionSnapshot {
        #[cfg(test)]
        SHOWN.set(SHOWN.get() + 1);
        let node = &record.partition.node;
        PartitionSnapshot {
            partition: record.partition.clone(),
            file_system: record.file_system.clone(),
            mount_points: mounts.of(node.device_number).to_vec(),
        }
    }

    /// Changes a partition; gives what it looks like before and after.
    pub fn change_partition(
        &mut self,
        number: u32,
        mounts: &MountTable,
        change: impl FnOnce(&mut PartitionRecord),
    ) -> Option<(PartitionSnapshot, PartitionSnapshot)> {
        let before = self.show(self.partitions.get(&number)?, mounts);
        let partition = self.partitions.get_mut(&number)?;
        let was_processed = partition.processed;
        change(partition);
        if !was_processed && partition.processed {
            self.unprocessed -= 1;
        }
        Some((before, self.show(self.partitions.get(&number)?, mounts)))
    }

    /// Whether udev has processed the device and each partition.
    pub fn is_processed(&self) -> bool {
        self.processed && self.unprocessed == 0
    }

    /// To be called after a change of the partitions.
    pub fn count_unprocessed(&mut self) {
        self.unprocessed = self.partitions.values().filter(|partition| !partition.processed).count();
    }

    /// Whether it or a partition of it is among these devices.
    pub fn is_among(&self, devices: &HashSet<(u32, u32)>) -> bool {
        let mut partitions = self.partitions.values().map(|partition| partition.partition.node.device_number);
        devices.contains(&self.device.device_number) || partitions.any(|device| devices.contains(&device))
    }

    /// The client that it ends with, or that waits for its attach.
    pub fn client(&self) -> Option<&ClientId> {
        let owner = self.ownership.as_ref().and_then(|ownership| ownership.client.as_ref());
        match &self.stage {
            Stage::Pending { client, .. } => Some(client),
            Stage::Published => owner,
        }
    }

    /// Whether nobody is taking it down.
    pub fn is_attached(&self) -> bool {
        self.state == State::Attached
    }

    /// Whether the world was told of it.
    pub fn is_published(&self) -> bool {
        self.stage == Stage::Published
    }

    /// Notes that this client vanished, where it waits for the attach.
    pub fn abandon(&mut self, vanished: &ClientId) {
        if matches!(&self.stage, Stage::Pending { client, .. } if client == vanished) {
            self.abort_calls();
        }
    }

    /// Has its attach fail, where it is under way.
    pub fn abort_calls(&mut self) {
        if let Stage::Pending { abandoned, .. } = &mut self.stage {
            *abandoned = true;
            self.changed.notify_waiters();
        }
    }

    /// Whether its client vanished while its attach was under way.
    pub fn is_abandoned(&self) -> bool {
        matches!(self.stage, Stage::Pending { abandoned: true, .. })
    }

    /// Whether it is published and ends with this client; `None` is one that a restarted daemon does
    /// not know any more.
    pub fn ends_with(&self, client: Option<&ClientId>) -> bool {
        let ended = |ownership: &Ownership| {
            ownership.lifetime == Lifetime::Client && ownership.client.as_ref() == client
        };
        self.is_published() && self.state == State::Attached && self.ownership.as_ref().is_some_and(ended)
    }
}
