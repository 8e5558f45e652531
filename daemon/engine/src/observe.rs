//! Observes events of udev, of the kernel and of the mount table, and loop devices of other programs.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::engine::Engine;
use crate::error::Error;
use crate::event::{Event, Uevent};
use crate::hearing::Hearing;
use crate::kernel::{Device, DiskSequence, Kernel, ProbeResult, ScanReason};
use crate::limiter::Limiter;
use crate::mount_table::MountTable;
use crate::record::Record;
use crate::scan_queue::ScanKind;
use crate::snapshot::{Changes, Snapshot};

/// A device whose state takes longer to read hangs.
pub(super) const HUNG_AFTER: Duration = Duration::from_secs(5);

impl<K: Kernel> Engine<K> {
    /// Handles an event.
    pub fn observe(self: &Arc<Self>, event: Uevent) {
        if self.is_doubtful(&event) {
            return self.request_scan(event.number, ScanKind::Database);
        }
        let Ok(peek) = self.kernel.peek(event.number) else {
            return self.request_scan(event.number, ScanKind::Everything);
        };
        self.remember(&event, peek.bound.is_some());
        match self.reconcile(event.number, peek.bound) {
            Some(id) => {
                self.note_processed(id, &event);
                self.follow_partitions(id, &event);
            }
            None if peek.bound.is_some() && !peek.claimed => {
                self.request_scan(event.number, ScanKind::Device);
            }
            None if peek.bound.is_none() => self.forget_pending(event.number),
            None => {}
        }
    }

    /// Keeps udev's result, unless nothing is attached: a later attach has another disk sequence.
    fn remember(&self, event: &Uevent, is_bound: bool) {
        let device = (event.number, event.partition);
        let mut state = self.state();
        if !is_bound {
            state.forget_seen(event.number);
        }
        if event.removed {
            state.processed.remove(&device);
            return;
        }
        if let (Some(sequence), Some(found)) = (event.disk_sequence, &event.processed) {
            if is_bound {
                state.processed.insert(device, (sequence, found.clone()));
            }
            state.hearing = Hearing { last: Some(Instant::now()), is_gone: false };
        }
    }

    fn note_processed(self: &Arc<Self>, id: DiskSequence, event: &Uevent) {
        if event.resized {
            self.request_scan(event.number, ScanKind::Device);
        }
        let Some(found) = event.processed.as_ref().filter(|_| !event.removed) else { return };
        let is_current = |record: &Record<K>| event.disk_sequence == Some(record.device.disk_sequence);
        if !self.state().records.get(&id).is_some_and(is_current) {
            return;
        }
        match event.partition {
            None => {
                self.state().take_seen(event.number, event.disk_sequence);
                self.update_outline(id, |record| {
                    record.processed = true;
                    record.silence = None;
                    record.file_system = found.file_system.clone();
                });
            }
            Some(number) => self.update_partition(id, number, |partition| partition.take(found)),
        }
    }

    /// Re-reads device `number` from the kernel and updates its record.
    pub(super) async fn refresh(self: &Arc<Self>, number: u32) {
        if let Err(error) = self.try_refresh(number).await {
            warn!(number, "{error}");
        }
    }

    async fn try_refresh(self: &Arc<Self>, number: u32) -> Result<(), Error> {
        let alone = self.status_locks.lock(number).await;
        let changes = self.changes_of(number);
        let status = self.kernel.status(number).await?;
        let peek = self.kernel.peek(number)?;
        let known = self.reconcile(number, peek.bound);
        let Some(device) = status else { return Ok(()) };
        if Some(device.disk_sequence) != peek.bound {
            // It was attached or detached in between: an event follows.
            debug!(number, "changed while its state was read");
            return Ok(());
        }
        match known {
            Some(id) if self.changes_of(number) == changes => {
                self.update(id, |record| record.device = device)
            }
            // Changed by loopd since: the record has what that found.
            Some(_) => {}
            None if peek.claimed => {}
            None if self.adopt_pending(&device).await => {}
            None => {
                let id = self.add_foreign(device);
                drop(alone);
                let _may_be_gone = self.scan_partitions(id, ScanReason::Foreign).await;
            }
        }
        Ok(())
    }

    fn changes_of(&self, number: u32) -> Option<(DiskSequence, u64)> {
        let state = self.state();
        let id = *state.by_number.get(&number)?;
        state.records.get(&id).map(|record| (id, record.changes))
    }

    /// Updates the record from the kernel for a caller, with a timeout.
    ///
    /// # Errors
    /// `Timeout`; `Kernel` if its state cannot be read.
    pub(super) async fn refresh_in_time(self: &Arc<Self>, number: u32) -> Result<(), Error> {
        let engine = Arc::clone(self);
        let reading = tokio::spawn(async move {
            let _permit = engine.background.acquire(engine.owner_of(number)).await;
            engine.try_refresh(number).await
        });
        match tokio::time::timeout(HUNG_AFTER, reading).await {
            Ok(read) => read.unwrap_or(Err(Error::Panicked)),
            Err(_) => Err(Error::BackingFileHangs { number }),
        }
    }

    /// The attachment on this number, without its partitions, after a check that it still exists.
    ///
    /// # Errors
    /// `NotFound` if there is none; `Timeout` if it has no record yet and its backing file hangs; `Kernel` if its
    /// state cannot be read.
    pub async fn locate(self: &Arc<Self>, number: u32) -> Result<Snapshot, Error> {
        let known = self.state().by_number.get(&number).copied();
        if !known.is_some_and(|id| self.is_current(id, number).unwrap_or(false)) {
            self.refresh_in_time(number).await?;
        }
        let id = self.state().by_number.get(&number).copied();
        id.and_then(|id| self.outline(id)).ok_or(Error::NothingAttached { number })
    }

    fn add_foreign(self: &Arc<Self>, device: Device) -> DiskSequence {
        let number = device.number;
        let cleartexts = self.cleartexts_of_foreign(&device);
        let adopted: Vec<Option<u32>> = cleartexts.keys().copied().collect();
        let mut state = self.state();
        let seen = state.take_seen(number, Some(device.disk_sequence));
        let found = seen.or_else(|| self.kernel.stored(number, None)).unwrap_or_default();
        let id = state.insert(Record { cleartexts, ..Record::foreign(device, found.file_system) });
        if let Some(record) = state.records.get(&id) {
            let snapshot = record.snapshot(id, &state.mounts);
            self.emit(Event::Added(Box::new(snapshot)));
        }
        drop(state);
        adopted.into_iter().for_each(|partition| self.spawn_closing(id, partition));
        id
    }

    /// Handles a new mount table.
    pub fn mounts_changed(self: &Arc<Self>, mounts: MountTable) {
        for id in self.take_mounts(mounts) {
            self.spawn_end_with_last_mount(id);
        }
        self.spawn_directory_removal();
    }

    /// Updates the records, and returns the attachments that have lost their last mount and end with it.
    fn take_mounts(&self, mounts: MountTable) -> Vec<DiskSequence> {
        let mut guard = self.state();
        let state = &mut *guard;
        let before = std::mem::replace(&mut state.mounts, mounts);
        let moved = state.mounts.differences(&before);
        if moved.is_empty() {
            return Vec::new();
        }
        let mut over = Vec::new();
        for (id, record) in state.records.iter_mut().filter(|(_, record)| record.is_published()) {
            if !record.is_among(&moved) {
                continue;
            }
            let known = record.snapshot(*id, &before);
            if record.note_mounts(&state.mounts) {
                over.push(*id);
            }
            if let Some(changes) = Changes::between(&known, record.snapshot(*id, &state.mounts)) {
                self.emit(Event::Changed(Box::new(changes)));
            }
        }
        over
    }

    /// Compares all records with the kernel, at the start of the daemon.
    pub async fn resync(self: &Arc<Self>) {
        let (mut tasks, limiter) = (JoinSet::new(), Limiter::new());
        for number in self.all_numbers() {
            let (engine, limiter) = (Arc::clone(self), Arc::clone(&limiter));
            let scan = async move { engine.scan(number, ScanKind::Everything).await };
            tasks.spawn(async move { limiter.run(scan).await });
        }
        tasks.join_all().await;
    }

    /// The same after events were lost, when udev is idle. Does not wait for the result.
    pub fn events_lost(self: &Arc<Self>) {
        for number in self.all_numbers() {
            self.request_scan(number, ScanKind::Everything);
        }
    }

    fn all_numbers(&self) -> Vec<u32> {
        let mut numbers = self.kernel.bound_numbers().unwrap_or_default();
        numbers.extend(self.state().by_number.keys());
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// Whether the event may be about a partition that exists no more. Linux 6.1 reads the table again while udev
    /// probes the partitions: they disappear and return, and the result for the first ones is blank. The events of
    /// the next ones follow.
    fn is_doubtful(&self, event: &Uevent) -> bool {
        let blank = event.processed.as_ref().is_some_and(ProbeResult::is_blank);
        blank && !event.removed && event.partition.is_some() && self.kernel.scans_itself()
    }

    /// Reads results from udev's database, since a task may wait for an event that was lost.
    pub(super) async fn recover_processed(self: &Arc<Self>, number: u32) {
        let Some((id, unprocessed)) = self.unprocessed(number) else { return };
        if !self.is_current(id, number).unwrap_or(false) {
            return;
        }
        let found = self.kernel.stored_of(number, unprocessed).await;
        self.take_processed(id, found);
    }

    /// Takes what udev has found on a device (`None`) and on partitions.
    pub(super) fn take_processed(&self, id: DiskSequence, found: Vec<(Option<u32>, ProbeResult)>) {
        self.update(id, |record| {
            for (partition, found) in found {
                match partition {
                    None => {
                        record.processed = true;
                        record.file_system = found.file_system;
                    }
                    Some(partition) => {
                        record
                            .partitions
                            .get_mut(&partition)
                            .into_iter()
                            .for_each(|known| known.take(&found));
                    }
                }
            }
        });
    }

    /// The device (`None`) and the partitions of this number that udev has not processed yet.
    pub(super) fn unprocessed(&self, number: u32) -> Option<(DiskSequence, Vec<Option<u32>>)> {
        let state = self.state();
        let id = state.by_number.get(&number).copied()?;
        let record = state.records.get(&id).filter(|record| !record.is_processed())?;
        let partitions = record.partitions.iter().filter(|(_, partition)| !partition.processed);
        let partitions = partitions.map(|(partition, _)| Some(*partition));
        Some((id, (!record.processed).then_some(None).into_iter().chain(partitions).collect()))
    }
}
