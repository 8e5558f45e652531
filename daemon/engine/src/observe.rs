//! What others do: udev's and the kernel's events, mounts, and loop devices that are not ours.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Error, ErrorKind, State};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::attach::audit;
use super::attachment::{Changes, PartitionRecord, Record};
use super::looks::Look;
use super::turns::Limiter;
use super::{Engine, Event, Snapshot};
use crate::kernel::{Device, DiskSequence, Kernel, ProbeResult, ScanReason, node};
use crate::mount_table::MountTable;

/// What takes longer to look at hangs.
pub(super) const HANGS: Duration = Duration::from_secs(5);

/// Something happened to a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// N of `/dev/loop0pN`, where it is about a partition.
    pub partition: Option<u32>,
    /// Whether the device or partition is gone.
    pub removed: bool,
    /// The disk sequence that the event names.
    pub disk_sequence: Option<DiskSequence>,
    /// What udev found, where the event comes from udev; `None` where the kernel itself tells.
    pub processed: Option<ProbeResult>,
    /// Whether the size changed.
    pub resized: bool,
}

impl<K: Kernel> Engine<K> {
    /// Takes notice of an event.
    pub fn observe(self: &Arc<Self>, event: Uevent) {
        if self.is_doubtful(&event) {
            return self.ask_for_look(event.number, Look::Database);
        }
        self.remember(&event);
        let peek = self.kernel.peek(event.number);
        match self.current(event.number, peek.bound) {
            Some(id) => {
                self.note_processed(id, &event);
                self.follow_partitions(id, &event);
            }
            None if peek.bound.is_some() && !peek.claimed => {
                self.ask_for_look(event.number, Look::Device);
            }
            None if peek.bound.is_none() => self.forget_waiting(event.number),
            None => {}
        }
    }

    /// The attachment that the number stands for, where the kernel still has it; ends it where not.
    fn current(self: &Arc<Self>, number: u32, bound: Option<DiskSequence>) -> Option<DiskSequence> {
        let known = self.state().by_number.get(&number).copied()?;
        if self.is_current(known, bound) {
            return Some(known);
        }
        self.ended_elsewhere(known);
        None
    }

    /// Whether an attachment is what the kernel has bound.
    pub(super) fn is_current(&self, id: DiskSequence, bound: Option<DiskSequence>) -> bool {
        self.state()
            .records
            .get(&id)
            .is_some_and(|record| record.replacing || Some(record.device.disk_sequence) == bound)
    }

    /// Makes room for a new attach on this number: what stood there before has ended.
    pub(super) fn displace(self: &Arc<Self>, number: u32) {
        self.current(number, None);
    }

    fn remember(&self, event: &Uevent) {
        let device = (event.number, event.partition);
        if event.removed {
            self.state().processed.remove(&device);
        } else if let (Some(sequence), Some(found)) = (event.disk_sequence, &event.processed) {
            self.state().processed.insert(device, (sequence, found.clone()));
        }
    }

    fn note_processed(self: &Arc<Self>, id: DiskSequence, event: &Uevent) {
        if event.resized {
            self.ask_for_look(event.number, Look::Device);
        }
        let Some(found) = event.processed.as_ref().filter(|_| !event.removed) else { return };
        let is_current = |record: &Record<K>| event.disk_sequence == Some(record.device.disk_sequence);
        if !self.state().records.get(&id).is_some_and(is_current) {
            return;
        }
        match event.partition {
            None => self.update_outline(id, |record| {
                record.processed = true;
                record.file_system = found.file_system.clone();
            }),
            Some(number) => self.update_partition(id, number, |partition| partition.take(found)),
        }
    }

    /// Changes a record, wakes who waits for it, and tells the world where it looks different.
    pub(super) fn update(&self, id: DiskSequence, change: impl FnOnce(&mut Record<K>)) {
        self.update_seen_by(id, Record::snapshot, |record| {
            change(record);
            record.count_unprocessed();
        });
    }

    /// The same for a change that leaves the partitions alone: costs the same however many there are.
    pub(super) fn update_outline(&self, id: DiskSequence, change: impl FnOnce(&mut Record<K>)) {
        self.update_seen_by(id, Record::outline, change);
    }

    fn update_seen_by(
        &self,
        id: DiskSequence,
        show: impl Fn(&Record<K>, DiskSequence, &MountTable) -> Snapshot,
        change: impl FnOnce(&mut Record<K>),
    ) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        let before = show(record, id, &state.mounts);
        change(record);
        record.changed.notify_waiters();
        state.clients.extend(record.client().cloned());
        let after = show(record, id, &state.mounts);
        if record.is_published()
            && let Some(changes) = Changes::between(&before, after)
        {
            self.tell(Event::Changed(Box::new(changes)));
        }
    }

    /// The same for one partition.
    fn update_partition(&self, id: DiskSequence, number: u32, change: impl FnOnce(&mut PartitionRecord)) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        let Some((before, after)) = record.change_partition(number, &state.mounts, change) else { return };
        record.changed.notify_waiters();
        if record.is_published() && after != before {
            self.tell(Event::Changed(Box::new(Changes {
                id,
                number: record.device.number,
                attachment: None,
                partitions: vec![after],
                gone: Vec::new(),
            })));
        }
    }

    /// Looks at one number, and makes the records true.
    pub(super) async fn refresh(self: &Arc<Self>, number: u32) {
        if let Err(error) = self.try_refresh(number).await {
            warn!(number, "{error}");
        }
    }

    async fn try_refresh(self: &Arc<Self>, number: u32) -> Result<(), Error> {
        let alone = self.looks.lock(number).await;
        let status = self.kernel.status(number).await?;
        let peek = self.kernel.peek(number);
        let known = self.current(number, peek.bound);
        let Some(device) = status else { return Ok(()) };
        if Some(device.disk_sequence) != peek.bound {
            // Between two states: an event follows.
            debug!(number, "changed while it was looked at");
            return Ok(());
        }
        match known {
            Some(id) => self.update(id, |record| record.device = device),
            None if peek.claimed => {}
            None if self.take_up_waiting(&device).await => {}
            None => {
                let id = self.add_foreign(device);
                drop(alone);
                let _gone_meanwhile = self.look_at_partitions(id, ScanReason::Foreign).await;
            }
        }
        Ok(())
    }

    /// The same for a caller, who does not wait for ever.
    ///
    /// # Errors
    /// `Timeout`; `Kernel` where its state cannot be read.
    pub(super) async fn refresh_in_time(self: &Arc<Self>, number: u32) -> Result<(), Error> {
        let engine = Arc::clone(self);
        let look = tokio::spawn(async move {
            let _leave = engine.background.take(engine.owner_of(number)).await;
            engine.try_refresh(number).await
        });
        match tokio::time::timeout(HANGS, look).await {
            Ok(looked) => looked.unwrap_or(Ok(())),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!("the backing file of {} does not answer; try again when it does", node(number)),
            )),
        }
    }

    fn add_foreign(&self, device: Device) -> DiskSequence {
        let number = device.number;
        let mut state = self.state();
        let seen = state.seen(number, None, device.disk_sequence).cloned();
        let found = seen.or_else(|| self.kernel.stored(number, None)).unwrap_or_default();
        let id = state.insert(Record::foreign(device, found.file_system));
        if let Some(record) = state.records.get(&id) {
            let snapshot = record.snapshot(id, &state.mounts);
            self.tell(Event::Added(Box::new(snapshot)));
        }
        id
    }

    /// The kernel has taken it down.
    fn ended_elsewhere(self: &Arc<Self>, id: DiskSequence) {
        let ended = self.find(id);
        // An operation on the device that is under way tells of the end itself.
        let unexpected =
            self.state().records.get(&id).is_some_and(|record| record.operation.try_lock().is_ok());
        self.finish(id);
        if let Some(ended) = ended.filter(|ended| unexpected && ended.ownership.is_some()) {
            let detaching = ended.state == State::Detaching;
            audit(if detaching { "gone with its last user" } else { "detached by another program" }, &ended);
        }
    }

    /// Takes notice of a new mount table.
    pub fn mounts_changed(self: &Arc<Self>, mounts: MountTable) {
        for id in self.take_mounts(mounts) {
            self.spawn_end_with_last_mount(id);
        }
        self.spawn_clearing();
    }

    /// Gives what has lost its last mount, and is to end with it.
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
                self.tell(Event::Changed(Box::new(changes)));
            }
        }
        over
    }

    /// Compares everything with the kernel: at the start.
    pub async fn resync(self: &Arc<Self>) {
        let (mut tasks, turns) = (JoinSet::new(), Limiter::new());
        for number in self.all_numbers() {
            let (engine, turns) = (Arc::clone(self), Arc::clone(&turns));
            let look = async move { engine.look(number, Look::Everything).await };
            tasks.spawn(async move { turns.take(look).await });
        }
        tasks.join_all().await;
    }

    /// The same, when udev is idle after events were lost. Does not wait for it.
    pub fn events_lost(self: &Arc<Self>) {
        for number in self.all_numbers() {
            self.ask_for_look(number, Look::Everything);
        }
    }

    fn all_numbers(&self) -> Vec<u32> {
        let mut numbers = self.kernel.bound_numbers();
        numbers.extend(self.state().by_number.keys());
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// Linux 6.1 reads the table again while udev probes the partitions of the first reading: they go
    /// and come back, and what udev says of the first ones is blank. Its word on the next ones
    /// follows.
    fn is_doubtful(&self, event: &Uevent) -> bool {
        let blank = event.processed.as_ref().is_some_and(ProbeResult::is_blank);
        blank && !event.removed && event.partition.is_some() && self.kernel.scans_itself()
    }

    /// A lost event may be the one that someone waits for: udev, now idle, has it in its database.
    pub(super) async fn recover_processed(self: &Arc<Self>, number: u32) {
        let Some((id, unprocessed)) = self.unprocessed(number) else { return };
        if !self.is_current(id, self.kernel.peek(number).bound) {
            return;
        }
        let found = self.kernel.stored_of(number, unprocessed).await;
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

    /// What udev has not processed yet of this number: the device (`None`), partitions.
    fn unprocessed(&self, number: u32) -> Option<(DiskSequence, Vec<Option<u32>>)> {
        let state = self.state();
        let id = state.by_number.get(&number).copied()?;
        let record = state.records.get(&id).filter(|record| !record.is_processed())?;
        let partitions = record.partitions.iter().filter(|(_, partition)| !partition.processed);
        let partitions = partitions.map(|(partition, _)| Some(*partition));
        Some((id, (!record.processed).then_some(None).into_iter().chain(partitions).collect()))
    }
}
