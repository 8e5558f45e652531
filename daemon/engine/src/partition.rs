//! The partitions of attachments: which there are, and what udev says of each.

use std::collections::BTreeMap;
use std::sync::Arc;

use loopd_common::text::printable;
use loopd_common::{Error, ErrorKind};
use tokio::time::Instant;
use tracing::warn;

use crate::engine::Engine;
use crate::event::Uevent;
use crate::kernel::{Device, DiskSequence, Kernel, Partition, Partitioning, ProbeResult, ScanReason};
use crate::operation::{busy, gone};
use crate::ownership::Ownership;
use crate::record::{PartitionRecord, Record};
use crate::scan_queue::ScanKind;

impl<K: Kernel> Engine<K> {
    /// Has the partition table read again, and makes the partitions what it says; returns when udev
    /// has processed them.
    ///
    /// # Errors
    /// `Busy` where a partition is in use, `NotSupported`, `Timeout`, `Kernel`.
    pub async fn rescan(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let deadline = Instant::now() + self.settings().wait_for_udev;
        self.update_outline(id, |record| record.processed = false);
        let seen = self.scan_partitions(id, ScanReason::Rescan).await;
        if !seen.as_ref().is_ok_and(|seen| seen.udev_rereads) {
            self.update_outline(id, |record| record.processed = true);
        }
        let seen = match seen {
            Err(error) if error.kind == ErrorKind::Busy => {
                return Err(self.partition_in_use(id, error).await);
            }
            other => other?,
        };
        if seen.unmade {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "this kernel reads no partition tables, and loopd may not add partitions itself: put partitions.conf \
                 from among loopd's documents into /etc/systemd/system/loopd.service.d",
            ));
        }
        if self.kernel.udev_runs() {
            self.await_udev(id, deadline, Record::is_processed).await?;
        }
        // udev does not say whether the kernel did what it was asked for.
        if seen.udev_rereads && self.scan_partitions(id, ScanReason::Foreign).await?.outdated {
            return Err(self.partition_in_use(id, gone(id)).await);
        }
        Ok(())
    }

    /// Why the partitions stay as they are, with who uses them; `otherwise` where they are gone.
    async fn partition_in_use(&self, id: DiskSequence, otherwise: Error) -> Error {
        let Some(attachment) = self.find(id) else { return otherwise };
        let users = self.kernel.users(attachment.device.number).await.unwrap_or_default();
        busy("read the partition table again of", &attachment, &users, "unmount or close it first")
    }

    /// Makes the partitions' nodes, where that is for us to do, and the record true.
    pub(super) async fn scan_partitions(
        self: &Arc<Self>,
        id: DiskSequence,
        reason: ScanReason,
    ) -> Result<Partitioning, Error> {
        let known = self.state().records.get(&id).map(|record| {
            (record.device.number, record.device.disk_sequence, Arc::clone(&record.partitioning))
        });
        let Some((number, sequence, partitioning)) = known else {
            return Ok(Partitioning::default());
        };
        let _alone = partitioning.lock().await;
        let seen = self.kernel.partition(number, sequence, reason).await?;
        let counted = self.take_partitions(id, &seen);
        if reason != ScanReason::Foreign {
            self.update_outline(id, |record| record.partitioned = true);
        }
        counted.map(|()| seen)
    }

    /// Makes the record say what was seen.
    ///
    /// # Errors
    /// `LimitExceeded`: the record has no more of them than its owner may have.
    pub(super) fn take_partitions(&self, id: DiskSequence, seen: &Partitioning) -> Result<(), Error> {
        let mut found: BTreeMap<u32, ProbeResult> = {
            let state = self.state();
            let Some(Device { number, disk_sequence, .. }) =
                state.records.get(&id).map(|record| &record.device)
            else {
                return Ok(());
            };
            let of = |partition: &Partition| {
                state.seen(*number, Some(partition.node.number), *disk_sequence).cloned()
            };
            seen.partitions
                .iter()
                .filter_map(|partition| Some((partition.node.number, of(partition)?)))
                .collect()
        };
        let mut counted = Ok(());
        self.update(id, |record| {
            let there = seen.partitions.len();
            let most = self.count_partitions(record, there);
            if most < there {
                counted = Err(self.too_many_partitions(record, there));
            }
            let mut before = std::mem::take(&mut record.partitions);
            for partition in seen.partitions.iter().take(most) {
                let number = partition.node.number;
                let known = before.remove(&number).filter(|known| known.partition.node == partition.node);
                let known = match known {
                    Some(mut known) => {
                        known.read_again(partition);
                        known
                    }
                    None => PartitionRecord::new(partition, found.remove(&number)),
                };
                record.partitions.insert(number, known);
            }
            if seen.unmade {
                record.device.partition_scan = false;
            }
        });
        counted
    }

    /// Counts the partitions against the owner's limit; gives how many there may be.
    fn count_partitions(&self, record: &mut Record<K>, there: usize) -> usize {
        let Some(Ownership { uid, .. }) = record.ownership else { return there };
        let none = || self.partition_quota.adopt_many(uid, 0);
        let permit = record.partition_permit.get_or_insert_with(none);
        permit.resize(there);
        permit.count()
    }

    fn too_many_partitions(&self, record: &Record<K>, there: usize) -> Error {
        let uid = record.ownership.as_ref().map(|ownership| ownership.uid).unwrap_or_default();
        let Error { kind, message } = self.partition_quota.refusal(uid);
        let file = printable(&record.device.backing_file);
        Error::new(kind, format!("{file} has {there} partitions, which are too many: {message}"))
    }

    /// ScanQueue at the partitions again where an event says that they may have changed.
    pub(super) fn follow_partitions(self: &Arc<Self>, id: DiskSequence, event: &Uevent) {
        let changed =
            self.state().records.get(&id).is_some_and(|record| self.may_have_changed(record, event));
        if changed {
            self.request_scan(event.number, ScanKind::Partitions);
        }
    }

    /// ScanQueue at nothing but the partition that the event names: each of the others has events of its own.
    fn may_have_changed(&self, record: &Record<K>, event: &Uevent) -> bool {
        if let Some(partition) = event.partition {
            let known = record.partitions.get(&partition).map(|known| &known.partition.node);
            return self.kernel.partition_node(event.number, partition).as_ref() != known;
        }
        // Where the kernel does not read tables, only reading one tells whether it has changed.
        let has_table = event.processed.as_ref().is_some_and(|found| found.has_table);
        let ours =
            record.is_published() && reason(record) == ScanReason::Changed && !self.kernel.scans_itself();
        ours && (has_table || !record.partitions.is_empty())
    }

    async fn rescan_partitions(self: &Arc<Self>, id: DiskSequence, reason: ScanReason) {
        if let Err(error) = self.scan_partitions(id, reason).await {
            warn!(disk_sequence = id.0, "its partitions cannot be looked at: {error}");
        }
    }

    /// ScanQueue at the partitions after a change of ours.
    pub(super) async fn partitions_may_have_changed(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let reason = self.state().records.get(&id).map(reason);
        match reason {
            Some(reason) => self.scan_partitions(id, reason).await.map(drop),
            None => Ok(()),
        }
    }

    /// After lost events.
    pub(super) async fn recover_partitions(self: &Arc<Self>, number: u32) {
        let known = {
            let state = self.state();
            let id = state.by_number.get(&number).copied();
            id.and_then(|id| Some((id, reason(state.records.get(&id)?))))
        };
        if let Some((id, reason)) = known {
            self.rescan_partitions(id, reason).await;
        }
    }
}

/// Nodes are made only for those who asked for it, on what is not being taken down.
fn reason<K: Kernel>(record: &Record<K>) -> ScanReason {
    let ours = record.ownership.is_some() && record.device.partition_scan && record.is_attached();
    // Its attach sees to the partitions first.
    if ours && record.partitioned { ScanReason::Changed } else { ScanReason::Foreign }
}
