//! What operations share: locks, updates, waits, the end of an attachment, the audit log.

use std::sync::Arc;

use loopd_common::State;
use loopd_common::text::printable;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tracing::info;

use crate::engine::Engine;
use crate::error::Error;
use crate::event::Event;
use crate::kernel::{Change, DiskSequence, Kernel, Users};
use crate::lifecycle::Lifecycle;
use crate::mount_table::MountTable;
use crate::record::{PartitionRecord, Record};
use crate::snapshot::{Changes, Snapshot};

impl<K: Kernel> Engine<K> {
    /// Waits until no other operation is in progress on the device.
    pub(super) async fn lock_device(&self, id: DiskSequence) -> Result<OwnedMutexGuard<()>, Error> {
        let operation = self.state().records.get(&id).map(|record| Arc::clone(&record.operation));
        Ok(operation.ok_or_else(|| gone(id))?.lock_owned().await)
    }

    /// The same for a call that returns at once. `operation` completes "cannot", without the device.
    ///
    /// # Errors
    /// `Busy` if another operation does not end; `NotFound`.
    pub(super) async fn lock_device_soon(
        &self,
        id: DiskSequence,
        operation: &str,
    ) -> Result<OwnedMutexGuard<()>, Error> {
        let at_once = self.settings().wait_for_users;
        let locked = tokio::time::timeout(at_once, self.lock_device(id)).await;
        let attachment = self.outline(id).ok_or_else(|| gone(id))?;
        locked.unwrap_or_else(|_| {
            let reason = "another operation is in progress on it and does not end, so its backing file may hang; try \
                          again when it answers";
            let operation = format!("{operation} {}", attachment.device.shown());
            Err(Error::Busy { operation, reason: reason.to_owned() })
        })
    }

    /// Waits until calls are aborted, since the daemon stops.
    pub(super) async fn aborted(&self) {
        let _closed = self.ending.acquire().await;
    }

    /// Changes a record, wakes the tasks that wait for it, and emits an event if its snapshot has changed.
    pub(super) fn update(&self, id: DiskSequence, change: impl FnOnce(&mut Record<K>)) {
        self.update_seen_by(id, Record::snapshot, |record| {
            change(record);
            record.count_unprocessed();
        });
    }

    /// The same for a change that does not affect the partitions: the cost does not depend on their number.
    pub(super) fn update_outline(&self, id: DiskSequence, change: impl FnOnce(&mut Record<K>)) {
        self.update_seen_by(id, Record::outline, change);
    }

    pub(super) fn update_seen_by(
        &self,
        id: DiskSequence,
        show: impl Fn(&Record<K>, DiskSequence, &MountTable) -> Snapshot,
        change: impl FnOnce(&mut Record<K>),
    ) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        let before = show(record, id, &state.mounts);
        let device = record.device.clone();
        change(record);
        record.changes += u64::from(record.device != device);
        record.changed.notify_waiters();
        state.clients.extend(record.client().cloned());
        let after = show(record, id, &state.mounts);
        if record.is_published()
            && let Some(changes) = Changes::between(&before, after)
        {
            self.emit(Event::Changed(Box::new(changes)));
        }
    }

    /// The same for one partition.
    pub(super) fn update_partition(
        &self,
        id: DiskSequence,
        number: u32,
        change: impl FnOnce(&mut PartitionRecord),
    ) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        let Some((before, after)) = record.change_partition(number, &state.mounts, change) else { return };
        record.changed.notify_waiters();
        if record.is_published() && after != before {
            self.emit(Event::Changed(Box::new(Changes {
                id,
                number: record.device.number,
                attachment: None,
                partitions: vec![after],
                gone: Vec::new(),
            })));
        }
    }

    /// Waits until `outcome` returns a value. It is called now and after each change of the record, with `None`
    /// if there is no record. Returns `None` at the deadline, or if the record has ended without a value.
    pub(super) async fn wait_for_record<T>(
        &self,
        id: DiskSequence,
        deadline: Instant,
        outcome: impl Fn(Option<&Record<K>>) -> Option<T>,
    ) -> Option<T> {
        loop {
            let changed = self.state().records.get(&id).map(|record| Arc::clone(&record.changed));
            let Some(changed) = changed else { return outcome(None) };
            // Before the record is examined, so that no change in between is missed.
            let woken = changed.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let found = outcome(self.state().records.get(&id));
            if found.is_some() {
                return found;
            }
            tokio::time::timeout_at(deadline, woken).await.ok()?;
        }
    }

    /// Waits a bounded time for the end of an attachment; false if it has not ended.
    pub(super) async fn await_end(self: &Arc<Self>, id: DiskSequence) -> bool {
        let deadline = Instant::now() + self.settings().wait_for_users;
        let ended = |record: Option<&Record<K>>| record.is_none().then_some(());
        self.wait_for_record(id, deadline, ended).await.is_some() || self.reap_if_gone(id)
    }

    /// Whether the kernel still has the attachment on its number.
    ///
    /// # Errors
    /// `Kernel` if sysfs cannot be read.
    pub(super) fn is_current(&self, id: DiskSequence, number: u32) -> Result<bool, Error> {
        Ok(self.is_bound_as(id, self.kernel.peek(number)?.bound))
    }

    fn is_bound_as(&self, id: DiskSequence, bound: Option<DiskSequence>) -> bool {
        self.state().records.get(&id).is_some_and(|record| {
            record.lifecycle.is_replacing() || Some(record.device.disk_sequence) == bound
        })
    }

    /// The attachment on the number, if the kernel still has it. Else its record is ended.
    pub(super) fn reconcile(
        self: &Arc<Self>,
        number: u32,
        bound: Option<DiskSequence>,
    ) -> Option<DiskSequence> {
        let known = self.state().by_number.get(&number).copied()?;
        if self.is_bound_as(known, bound) {
            return Some(known);
        }
        self.ended_elsewhere(known);
        None
    }

    /// Ends the record of an attachment that the kernel has detached, and logs that.
    pub(super) fn ended_elsewhere(self: &Arc<Self>, id: DiskSequence) {
        let ended = self.find(id);
        // An operation in progress on the device logs the end itself.
        let unexpected =
            self.state().records.get(&id).is_some_and(|record| record.operation.try_lock().is_ok());
        self.remove_record(id);
        if let Some(ended) = ended.filter(|ended| unexpected && ended.ownership.is_some()) {
            let detaching = ended.state == State::Detaching;
            audit(
                if detaching { "detached at its last close" } else { "detached by another program" },
                &ended,
            );
        }
    }

    /// Ends the record of an attachment if the kernel has detached it; returns whether there is none now. An attachment
    /// whose device cannot be read stays.
    pub(super) fn reap_if_gone(self: &Arc<Self>, id: DiskSequence) -> bool {
        let Some(number) = self.state().records.get(&id).map(|record| record.device.number) else {
            return true;
        };
        if self.is_current(id, number).unwrap_or(true) {
            return false;
        }
        self.remove_record(id);
        true
    }

    /// Removes the record of an attachment that the kernel has detached, and emits the event.
    pub(super) fn remove_record(self: &Arc<Self>, id: DiskSequence) {
        let Some(record) = self.state().remove(id) else { return };
        if record.is_published() {
            self.emit(Event::Removed(id));
        } else {
            self.state_writer.end(id);
        }
        let (number, node_made) = (record.device.number, record.node_made);
        let of_cleartexts = record.cleartexts.into_values().filter_map(|cleartext| cleartext.hold);
        let holds: Vec<K::Hold> = of_cleartexts.chain(record.hold).collect();
        let owner = record.ownership.map(|ownership| ownership.uid);
        if !node_made && holds.is_empty() {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = engine.background.acquire(owner).await;
            for hold in holds {
                engine.kernel.release(hold).await;
            }
            if node_made {
                engine.kernel.remove(number).await;
            }
        });
    }

    /// Releases the hold, or clears a device without one, and ends the record if the device is detached then.
    pub(super) async fn release(self: &Arc<Self>, id: DiskSequence) {
        let (number, sequence, hold) = {
            let mut state = self.state();
            let Some(record) = state.records.get_mut(&id) else { return };
            (record.device.number, record.device.disk_sequence, record.hold.take())
        };
        match hold {
            Some(hold) => self.kernel.release(hold).await,
            None => {
                if let Err(error) = self.kernel.clear(number, sequence).await {
                    tracing::warn!(number, disk_sequence = id.0, "{error}");
                }
            }
        }
        self.reap_if_gone(id);
    }

    /// Opens a hold of the device; false if it is gone.
    pub(super) async fn take_hold(self: &Arc<Self>, attachment: &Snapshot) -> Result<bool, Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let hold = self.kernel.hold(number, sequence).await?;
        let taken = hold.is_some();
        if let Some(unclaimed) = self.restore_hold(attachment.id, hold) {
            self.kernel.release(unclaimed).await;
        }
        Ok(taken)
    }

    /// Puts a hold into the record; returns it if the attachment has ended.
    pub(super) fn restore_hold(&self, id: DiskSequence, hold: Option<K::Hold>) -> Option<K::Hold> {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(&id) else { return hold };
        record.hold = hold;
        None
    }

    /// Sets the device to detach at its last close. That close writes to the backing file: if that hangs, the
    /// caller does not wait for it, and the device stays locked.
    pub(super) async fn detach_lazily(
        self: &Arc<Self>,
        attachment: &Snapshot,
        event: &str,
        alone: OwnedMutexGuard<()>,
    ) {
        audit(event, attachment);
        let (engine, id, owner) = (Arc::clone(self), attachment.id, attachment.owner());
        let going = tokio::spawn(async move {
            let _permit = engine.background.acquire(owner).await;
            engine.release_cleartexts(id).await;
            engine.release(id).await;
            alone
        });
        let _alone = tokio::time::timeout(self.settings().wait_for_users, going).await;
        self.update_outline(attachment.id, |record| {
            record.lifecycle = Lifecycle::Detaching;
            record.device.autoclear = true;
        });
    }

    /// Changes the device and its record.
    pub(super) async fn apply(self: &Arc<Self>, attachment: &Snapshot, change: Change) -> Result<(), Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let Some(device) = self.kernel.change(number, sequence, change).await? else {
            self.reap_if_gone(attachment.id);
            return Err(gone(attachment.id));
        };
        self.update(attachment.id, |record| {
            record.device = device;
            record.changes += 1;
        });
        Ok(())
    }

    /// Reads the mount table: its event may still be on its way.
    pub(super) fn refresh_mounts(self: &Arc<Self>) {
        if let Some(table) = self.kernel.mounts() {
            self.mounts_changed(table);
        }
    }
}

/// Error for an attachment that has ended.
pub(super) fn gone(id: DiskSequence) -> Error {
    Error::Gone { id }
}

/// Error for a device that is in use.
pub(super) fn in_use(
    operation: &'static str,
    attachment: &Snapshot,
    users: Users,
    remedy: &'static str,
) -> Error {
    Error::InUse {
        operation,
        device: attachment.device.node(),
        file: printable(&attachment.device.backing_file),
        users: Box::new(users),
        remedy,
    }
}

/// Logs a change of an attachment, for the administrator.
pub(super) fn audit(event: &str, attachment: &Snapshot) {
    let ownership = attachment.ownership.as_ref();
    info!(
        device = attachment.device.node(),
        disk_sequence = attachment.id.0,
        uid = ownership.map(|ownership| ownership.uid),
        file = printable(&attachment.device.backing_file),
        lifetime = ownership.map(|ownership| ownership.lifetime.as_str()),
        "{event}"
    );
}
