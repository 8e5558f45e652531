//! The engine's records of attachments and their partitions.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use loopd_common::{Lifetime, State};
use tokio::sync::Notify;

use crate::cleartext::{CleartextSnapshot, SavedCleartext};
use crate::client::ClientId;
use crate::findings::{self, FileEnd, Findings};
use crate::kernel::{Device, DiskSequence, FileSystem, Kernel, Mapping, Partition, ProbeResult};
use crate::lifecycle::Lifecycle;
use crate::mount_table::MountTable;
use crate::ownership::Ownership;
use crate::quota::Permit;
use crate::snapshot::{PartitionSnapshot, Snapshot};
use crate::warning::Silence;

/// The record of a partition.
pub(super) struct PartitionRecord {
    pub partition: Partition,
    pub file_system: FileSystem,
    /// Whether udev has processed it.
    pub processed: bool,
}

impl PartitionRecord {
    /// A new partition, with udev's result if there is one already.
    pub fn new(partition: &Partition, found: Option<ProbeResult>) -> Self {
        let mut record =
            Self { partition: partition.clone(), file_system: FileSystem::default(), processed: false };
        if let Some(found) = found {
            record.take(&found);
        }
        record
    }

    /// Updates the entry in the table after a scan.
    pub fn read_again(&mut self, partition: &Partition) {
        if !partition.entry.table.is_empty() {
            self.partition.entry = partition.entry.clone();
        }
    }

    /// Takes udev's result. An entry in the table that udev does not have stays as it was read from the table. A
    /// result for an earlier partition with this number is ignored.
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

#[cfg(test)]
thread_local! {
    static SHOWN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// How many snapshots of partitions were made, to be shown or compared, on this thread.
#[cfg(test)]
pub(super) fn partitions_shown() -> usize {
    SHOWN.get()
}

/// The record of a cleartext.
pub(super) struct CleartextRecord<K: Kernel> {
    pub mapping: Mapping,
    /// When it was unlocked: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// The user who unlocked it.
    pub uid: u32,
    pub file_system: FileSystem,
    /// Keeps a mapping that is closed at its last close.
    pub hold: Option<K::Hold>,
    /// Whether it is closed with its last user, and not held any more.
    pub closing: bool,
    /// Counts against the user's limit.
    pub _permit: Permit,
}

impl<K: Kernel> CleartextRecord<K> {
    /// What clients can see of the cleartext.
    pub fn show(&self, mounts: &MountTable) -> CleartextSnapshot {
        CleartextSnapshot {
            mapping: self.mapping.clone(),
            since: self.since,
            file_system: self.file_system.clone(),
            mount_points: mounts.of(self.mapping.device_number).to_vec(),
        }
    }

    /// What is to be saved of it.
    pub fn saved(&self, partition: Option<u32>) -> SavedCleartext {
        let Self { mapping: Mapping { disk_sequence, kind, .. }, since, uid, closing, .. } = *self;
        SavedCleartext { partition, disk_sequence, since, uid, closing, kind: Some(kind) }
    }
}

/// The record of an attachment.
pub(super) struct Record<K: Kernel> {
    pub device: Device,
    pub ownership: Option<Ownership>,
    pub lifecycle: Lifecycle,
    pub file_system: FileSystem,
    /// By number.
    pub partitions: BTreeMap<u32, PartitionRecord>,
    /// The cleartexts of partitions, and of the whole device (`None`).
    pub cleartexts: BTreeMap<Option<u32>, CleartextRecord<K>>,
    /// What was found in the image at the last scan of the partitions.
    pub findings: Findings,
    /// What was found at the end of the backing file when loopd had it.
    pub file_end: FileEnd,
    /// Whether and why nothing was heard of udev.
    pub silence: Option<Silence>,
    /// How many partitions udev has not processed.
    pub unprocessed: usize,
    /// Whether the partitions were scanned, and made if that is loopd's task.
    pub partitioned: bool,
    /// Whether neither the kernel nor loopd can make the partitions of the table.
    pub unmade: bool,
    /// Locked during a scan of the partitions.
    pub partitioning: Arc<tokio::sync::Mutex<()>>,
    /// Keeps an autoclear device attached.
    pub hold: Option<K::Hold>,
    /// Whether udev has processed this disk sequence.
    pub processed: bool,
    /// Whether the device node is to be removed at the end.
    pub node_made: bool,
    /// Wakes the tasks that wait for a change of this attachment.
    pub changed: Arc<Notify>,
    /// Locked during an operation on the device.
    pub operation: Arc<tokio::sync::Mutex<()>>,
    /// How often `device` was changed, or loopd has changed the device. A state that was read before is not taken after it.
    pub changes: u64,
    /// Counts against its owner's limit.
    pub permit: Option<Permit>,
    /// Counts the partitions against their owner's limit.
    pub partition_permit: Option<Permit>,
}

impl<K: Kernel> Record<K> {
    /// The record of a device that another program attached.
    pub fn foreign(device: Device, file_system: FileSystem) -> Self {
        Self {
            device,
            ownership: None,
            lifecycle: Lifecycle::Attached,
            file_system,
            partitions: BTreeMap::new(),
            cleartexts: BTreeMap::new(),
            findings: Findings::default(),
            file_end: FileEnd::default(),
            silence: None,
            unprocessed: 0,
            partitioned: false,
            unmade: false,
            partitioning: Arc::default(),
            hold: None,
            processed: true,
            node_made: false,
            changed: Arc::default(),
            operation: Arc::default(),
            changes: 0,
            permit: None,
            partition_permit: None,
        }
    }

    /// What clients can see of the attachment.
    pub fn snapshot(&self, id: DiskSequence, mounts: &MountTable) -> Snapshot {
        let partitions = self.partitions.values().map(|partition| self.show(partition, mounts)).collect();
        Snapshot { partitions, ..self.outline(id, mounts) }
    }

    /// A snapshot without the partitions: its cost does not depend on their number.
    pub fn outline(&self, id: DiskSequence, mounts: &MountTable) -> Snapshot {
        Snapshot {
            id,
            device: self.shown_device(),
            ownership: self.ownership.clone(),
            state: self.lifecycle.state(),
            file_system: self.file_system.clone(),
            mount_points: mounts.of(self.device.device_number).to_vec(),
            cleartext: self.show_cleartext(None, mounts),
            partitions: Vec::new(),
            warnings: findings::warnings(&self.device, &self.findings, self.file_end, self.silence),
            file_end: self.file_end,
            saved_cleartexts: self
                .cleartexts
                .iter()
                .map(|(part, cleartext)| cleartext.saved(*part))
                .collect(),
        }
    }

    fn show_cleartext(&self, partition: Option<u32>, mounts: &MountTable) -> Option<CleartextSnapshot> {
        self.cleartexts.get(&partition).map(|cleartext| cleartext.show(mounts))
    }

    /// Without partition scan if that makes no partitions.
    fn shown_device(&self) -> Device {
        Device { partition_scan: self.device.partition_scan && !self.unmade, ..self.device.clone() }
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
            cleartext: self.show_cleartext(Some(node.number), mounts),
        }
    }

    /// Changes a partition; returns its snapshots before and after.
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

    /// Counts again how many partitions udev has not processed: to be called after a change of the partitions.
    pub fn count_unprocessed(&mut self) {
        self.unprocessed = self.partitions.values().filter(|partition| !partition.processed).count();
    }

    /// Whether these device numbers include that of the device, of a partition or of a cleartext.
    pub fn is_among(&self, devices: &HashSet<(u32, u32)>) -> bool {
        self.device_numbers().any(|device| devices.contains(&device))
    }

    /// The numbers of the device, its partitions and its cleartexts.
    fn device_numbers(&self) -> impl Iterator<Item = (u32, u32)> {
        let partitions = self.partitions.values().map(|record| record.partition.node.device_number);
        let cleartexts = self.cleartexts.values().map(|cleartext| cleartext.mapping.device_number);
        std::iter::once(self.device.device_number).chain(partitions).chain(cleartexts)
    }

    /// The client that the attachment ends with, or that waits for the attach.
    pub fn client(&self) -> Option<&ClientId> {
        let owner = self.ownership.as_ref().and_then(|ownership| ownership.client.as_ref());
        self.lifecycle.waiting_client().or(owner)
    }

    /// Whether the device is attached and not being detached.
    pub fn is_attached(&self) -> bool {
        self.lifecycle.state() == State::Attached
    }

    /// Whether clients see it.
    pub fn is_published(&self) -> bool {
        self.lifecycle.is_published()
    }

    /// Makes the attach fail, if this client waits for it.
    pub fn cancel_for(&mut self, disconnected: &ClientId) {
        if self.lifecycle.waiting_client() == Some(disconnected) {
            self.cancel();
        }
    }

    /// Makes the attach fail, if it is in progress.
    pub fn cancel(&mut self) {
        if self.lifecycle.cancel() {
            self.changed.notify_waiters();
        }
    }

    /// Whether it is published and ends with this client; `None` is a client that a restarted daemon does not
    /// know any more.
    pub fn ends_with(&self, client: Option<&ClientId>) -> bool {
        let ended = |ownership: &Ownership| {
            ownership.lifetime == Lifetime::Client && ownership.client.as_ref() == client
        };
        self.is_published() && self.is_attached() && self.ownership.as_ref().is_some_and(ended)
    }

    /// Records whether the attachment is mounted; returns whether it ends with its last mount now.
    pub fn note_mounts(&mut self, mounts: &MountTable) -> bool {
        let is_mounted = self.is_mounted(mounts);
        let ends_with_mount = self.ownership.as_mut().filter(|owner| owner.lifetime == Lifetime::Mount);
        if let Some(ownership) = ends_with_mount.filter(|_| is_mounted) {
            ownership.mounted = true;
            ownership.grace_ends = None;
            ownership.client = None;
        }
        self.has_lost_last_mount(mounts)
    }

    /// Whether the attachment ends with its last mount, and that is gone.
    pub fn has_lost_last_mount(&self, mounts: &MountTable) -> bool {
        let was_mounted =
            self.ownership.as_ref().is_some_and(|owner| owner.lifetime == Lifetime::Mount && owner.mounted);
        was_mounted && self.is_attached() && !self.is_mounted(mounts)
    }

    fn is_mounted(&self, mounts: &MountTable) -> bool {
        self.device_numbers().any(|device| !mounts.of(device).is_empty())
    }

    /// Whether the attachment belongs to this client and waits for its first mount.
    pub fn awaits_mount_with(&self, client: &ClientId) -> bool {
        let waits = self.ownership.as_ref().is_some_and(|owner| {
            owner.lifetime == Lifetime::Mount && !owner.mounted && owner.client.as_ref() == Some(client)
        });
        waits && self.is_published() && self.is_attached()
    }
}
