//! What others do: udev's and the kernel's events, mounts, and loop devices that are not ours.

use std::sync::Arc;

use loopd_dbus::State;
use tracing::{debug, info, warn};

use super::attach::audit;
use super::attachment::Record;
use super::{Engine, Event};
use crate::kernel::mount_table::MountTable;
use crate::kernel::{Device, DiskSequence, FileSystem, Kernel};

/// Something happened to a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The disk sequence that the event names.
    pub disk_sequence: Option<DiskSequence>,
    /// What udev found, where the event comes from udev; `None` where the kernel itself tells.
    pub processed: Option<FileSystem>,
    /// Whether the size changed.
    pub resized: bool,
}

impl<K: Kernel> Engine<K> {
    /// Takes notice of an event.
    pub fn observe(self: &Arc<Self>, event: Uevent) {
        if let (Some(sequence), Some(found)) = (event.disk_sequence, &event.processed) {
            self.state().processed.insert(event.number, (sequence, found.clone()));
        }
        let glance = self.kernel.glance(event.number);
        match self.current(event.number, glance.bound) {
            Some(id) => self.note_processed(id, event),
            None if glance.bound.is_some() && !glance.claimed => self.spawn_refresh(event.number),
            None => {}
        }
    }

    /// The attachment that the number stands for, where the kernel still has it; ends it where not.
    fn current(&self, number: u32, bound: Option<DiskSequence>) -> Option<DiskSequence> {
        let known = self.state().by_number.get(&number).copied()?;
        if self.is_current(known, bound) {
            return Some(known);
        }
        self.ended_elsewhere(known);
        None
    }

    /// Whether an attachment is what the kernel has bound.
    pub(super) fn is_current(&self, id: DiskSequence, bound: Option<DiskSequence>) -> bool {
        self.state().records.get(&id).is_some_and(|record| Some(record.device.disk_sequence) == bound)
    }

    /// Makes room for a new attach on this number: what stood there before has ended.
    pub(super) fn displace(&self, number: u32) {
        self.current(number, None);
    }

    fn note_processed(self: &Arc<Self>, id: DiskSequence, event: Uevent) {
        let resized = event.resized;
        let number = event.number;
        self.update(id, |record| {
            if let Some(found) = event.processed
                && event.disk_sequence == Some(record.device.disk_sequence)
            {
                record.processed = true;
                record.file_system = found;
            }
        });
        if resized {
            self.spawn_refresh(number);
        }
    }

    /// Changes a record, wakes who waits for it, and tells the world where it looks different.
    fn update(&self, id: DiskSequence, change: impl FnOnce(&mut Record<K>)) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        let before = record.snapshot(id, &state.mounts);
        change(record);
        record.changed.notify_waiters();
        let after = record.snapshot(id, &state.mounts);
        if record.is_published() && after != before {
            self.tell(Event::Changed(Box::new(after)));
        }
    }

    fn spawn_refresh(self: &Arc<Self>, number: u32) {
        let engine = Arc::clone(self);
        tokio::spawn(async move { engine.refresh(number).await });
    }

    /// Looks at one number, and makes the records true.
    pub(super) async fn refresh(self: &Arc<Self>, number: u32) {
        let status = match self.kernel.status(number).await {
            Ok(status) => status,
            Err(error) => return warn!(number, "{error}"),
        };
        let glance = self.kernel.glance(number);
        let known = self.current(number, glance.bound);
        let Some((device, found)) = status else { return };
        if Some(device.disk_sequence) != glance.bound {
            // Between two states: an event follows.
            return debug!(number, "changed while it was looked at");
        }
        match known {
            Some(id) => self.update(id, |record| record.device = device),
            None if glance.claimed => {}
            None => self.add_foreign(device, found.unwrap_or_default()),
        }
    }

    fn add_foreign(&self, device: Device, file_system: FileSystem) {
        let mut state = self.state();
        let seen =
            state.processed.get(&device.number).filter(|(sequence, _)| *sequence == device.disk_sequence);
        let file_system = seen.map_or(file_system, |(_, found)| found.clone());
        let id = state.insert(Record::foreign(device, file_system));
        if let Some(record) = state.records.get(&id) {
            let snapshot = record.snapshot(id, &state.mounts);
            self.tell(Event::Added(Box::new(snapshot)));
        }
    }

    /// The kernel has taken it down.
    fn ended_elsewhere(&self, id: DiskSequence) {
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
    pub fn mounts_changed(&self, mounts: MountTable) {
        let mut guard = self.state();
        let state = &mut *guard;
        let before = std::mem::replace(&mut state.mounts, mounts);
        for (id, record) in state.records.iter().filter(|(_, record)| record.is_published()) {
            let after = record.snapshot(*id, &state.mounts);
            if after.mount_points != before.of(record.device.device_number, &record.device.node()) {
                self.tell(Event::Changed(Box::new(after)));
            }
        }
    }

    /// Compares everything with the kernel: at the start, and when udev is idle after events were
    /// lost.
    pub async fn resync(self: &Arc<Self>) {
        let mut numbers = self.kernel.bound_numbers();
        numbers.extend(self.state().by_number.keys());
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            self.refresh(number).await;
            self.recover_processed(number).await;
        }
    }

    /// A lost event may be the one that someone waits for: udev, now idle, has it in its database.
    async fn recover_processed(&self, number: u32) {
        let waiting = {
            let state = self.state();
            let id = state.by_number.get(&number).copied();
            id.filter(|id| state.records.get(id).is_some_and(|record| !record.processed))
        };
        let Some(id) = waiting else { return };
        if let Ok(Some((device, Some(found)))) = self.kernel.status(number).await
            && self.is_current(id, Some(device.disk_sequence))
        {
            info!(number, "events of udev were lost; its database was read instead");
            self.update(id, |record| {
                record.processed = true;
                record.file_system = found;
            });
        }
    }
}
