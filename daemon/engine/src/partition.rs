//! The partitions of attachments: scans them, and records what udev found on each.

use std::collections::BTreeMap;
use std::sync::Arc;

use loopd_common::ErrorKind;
use loopd_common::text::printable;
use tokio::time::Instant;
use tracing::warn;

use crate::clock::microseconds_now;
use crate::engine::Engine;
use crate::error::Error;
use crate::event::Uevent;
use crate::kernel::{Device, DiskSequence, Kernel, Partition, Partitioning, ProbeResult, ScanReason};
use crate::operation::{gone, in_use};
use crate::ownership::Ownership;
use crate::record::{PartitionRecord, Record};
use crate::scan_queue::ScanKind;

impl<K: Kernel> Engine<K> {
    /// Makes the kernel read the partition table again, and makes the partitions match it. Returns when udev has
    /// processed them.
    ///
    /// # Errors
    /// `Busy` if a partition is in use, `NotSupported`, `Timeout`, `Kernel`.
    pub async fn rescan(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let (begun, deadline) = (microseconds_now(), Instant::now() + self.settings().wait_for_udev);
        self.update_outline(id, |record| record.processed = false);
        let seen = self.scan_partitions(id, ScanReason::Rescan).await;
        if !seen.as_ref().is_ok_and(|seen| seen.udev_rereads) {
            self.update_outline(id, |record| record.processed = true);
        }
        let seen = match seen {
            Err(error) if error.kind() == ErrorKind::Busy => {
                return Err(self.partition_in_use(id, error).await);
            }
            other => other?,
        };
        self.update_outline(id, |record| record.unmade = seen.unmade);
        if seen.unmade {
            return Err(self.partitions_unmade(id));
        }
        if self.kernel.udev_runs() {
            self.await_udev(id, begun, deadline, Record::is_processed).await?;
        }
        // udev does not report whether the kernel has read the table again.
        if seen.udev_rereads && self.scan_partitions(id, ScanReason::Foreign).await?.outdated {
            return Err(self.partition_in_use(id, gone(id)).await);
        }
        Ok(())
    }

    /// Error for partitions that cannot change, with their users; `otherwise` if the attachment is gone.
    async fn partition_in_use(self: &Arc<Self>, id: DiskSequence, otherwise: Error) -> Error {
        let Some(attachment) = self.find(id) else { return otherwise };
        let users = self.users_of(&attachment).await;
        in_use("read the partition table again of", &attachment, users, "unmount or close it first")
    }

    /// Error for partitions that neither the kernel nor loopd can make.
    fn partitions_unmade(&self, id: DiskSequence) -> Error {
        let Some(attachment) = self.find(id) else { return gone(id) };
        let reason = "this kernel reads no partition tables, and loopd may not add partitions itself: install \
                      partitions.conf, one of loopd's documents, in /etc/systemd/system/loopd.service.d";
        Error::NotSupported {
            operation: format!("read the partition table of {} again", attachment.device.node()),
            reason: reason.to_owned(),
        }
    }

    /// Scans the partitions, makes their nodes if that is loopd's task, and updates the record.
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

    /// Updates the record after a scan.
    ///
    /// # Errors
    /// `LimitExceeded`: the record has only as many partitions as its owner may have.
    pub(super) fn take_partitions(&self, id: DiskSequence, seen: &Partitioning) -> Result<(), Error> {
        let mut found: BTreeMap<u32, ProbeResult> = {
            let state = self.state();
            let Some(Device { number, disk_sequence, .. }) =
                state.records.get(&id).map(|record| &record.device)
            else {
                return Ok(());
            };
            let of =
                |partition: &Partition| state.seen(*number, partition.node.number, *disk_sequence).cloned();
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
            record.findings = seen.findings.clone();
            record.unmade |= seen.unmade;
        });
        counted
    }

    /// Counts the partitions against the owner's limit; returns how many it may have.
    fn count_partitions(&self, record: &mut Record<K>, there: usize) -> usize {
        let Some(Ownership { uid, .. }) = record.ownership else { return there };
        let none = || self.partition_quota.adopt_many(uid, 0);
        let permit = record.partition_permit.get_or_insert_with(none);
        permit.resize(there);
        permit.count()
    }

    fn too_many_partitions(&self, record: &Record<K>, there: usize) -> Error {
        let uid = record.ownership.as_ref().map(|ownership| ownership.uid).unwrap_or_default();
        Error::TooManyPartitions {
            file: printable(&record.device.backing_file),
            count: there,
            source: Box::new(self.partition_quota.refusal(uid)),
        }
    }

    /// Requests a scan of the partitions if they may have changed with this event.
    pub(super) fn follow_partitions(self: &Arc<Self>, id: DiskSequence, event: &Uevent) {
        let changed =
            self.state().records.get(&id).is_some_and(|record| self.may_have_changed(record, event));
        if changed {
            self.request_scan(event.number, ScanKind::Partitions);
        }
    }

    /// Checks only the partition that the event names: the others have their own events.
    fn may_have_changed(&self, record: &Record<K>, event: &Uevent) -> bool {
        if let Some(partition) = event.partition {
            let known = record.partitions.get(&partition).map(|known| &known.partition.node);
            let there = self.kernel.partition_node(event.number, partition);
            return there.map_or(true, |there| there.as_ref() != known);
        }
        // If the kernel does not read tables, loopd has to read one to know whether it has changed.
        let has_table = event.processed.as_ref().is_some_and(|found| found.has_table);
        let ours =
            record.is_published() && reason(record) == ScanReason::Changed && !self.kernel.scans_itself();
        ours && (has_table || !record.partitions.is_empty())
    }

    /// Scans the partitions if no caller waits for the result: an error is logged.
    pub(super) async fn scan_partitions_or_log(self: &Arc<Self>, id: DiskSequence, reason: ScanReason) {
        if let Err(error) = self.scan_partitions(id, reason).await {
            warn!(disk_sequence = id.0, "its partitions cannot be scanned: {error}");
        }
    }

    /// Scans the partitions after a change of the device by loopd.
    pub(super) async fn partitions_may_have_changed(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let reason = self.state().records.get(&id).map(reason);
        match reason {
            Some(reason) => self.scan_partitions(id, reason).await.map(drop),
            None => Ok(()),
        }
    }

    /// Scans the partitions of a number after events were lost.
    pub(super) async fn recover_partitions(self: &Arc<Self>, number: u32) {
        let known = {
            let state = self.state();
            let id = state.by_number.get(&number).copied();
            id.and_then(|id| Some((id, reason(state.records.get(&id)?))))
        };
        if let Some((id, reason)) = known {
            self.scan_partitions_or_log(id, reason).await;
        }
    }
}

/// Nodes are made only if the request had partition scan, and not while the device is being detached.
fn reason<K: Kernel>(record: &Record<K>) -> ScanReason {
    let ours =
        record.ownership.is_some() && record.device.partition_scan && !record.unmade && record.is_attached();
    // The attach makes the partitions first.
    if ours && record.partitioned { ScanReason::Changed } else { ScanReason::Foreign }
}
