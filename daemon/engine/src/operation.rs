//! What operations share: locks, updates, waits, the end of an attachment, the audit log.

use std::sync::Arc;

use loopd_common::text::printable;
use loopd_common::{Error, ErrorKind, State};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tracing::info;

use crate::engine::Engine;
use crate::event::Event;
use crate::kernel::{Change, DiskSequence, Kernel, Users};
use crate::lifecycle::Lifecycle;
use crate::mount_table::MountTable;
use crate::record::{PartitionRecord, Record};
use crate::snapshot::{Changes, Snapshot};

impl<K: Kernel> Engine<K> {
    pub(super) async fn lock_device(&self, id: DiskSequence) -> Result<OwnedMutexGuard<()>, Error> {
        let operation = self.state().records.get(&id).map(|record| Arc::clone(&record.operation));
        Ok(operation.ok_or_else(|| gone(id))?.lock_owned().await)
    }

    /// Resolves when calls are to be given up.
    pub(super) async fn aborted(&self) {
        let mut ending = self.ending.subscribe();
        // The sender lives as long as the engine.
        let _ended = ending.wait_for(|ending| *ending).await;
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
        change(record);
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

    /// Waits until udev has done what `done` asks for.
    pub(super) async fn await_udev(
        &self,
        id: DiskSequence,
        deadline: Instant,
        done: impl Fn(&Record<K>) -> bool,
    ) -> Result<(), Error> {
        loop {
            let Some(changed) = self.state().records.get(&id).map(|record| Arc::clone(&record.changed))
            else {
                return Err(detached_meanwhile(id));
            };
            let woken = changed.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            match self.state().records.get(&id) {
                None => return Err(detached_meanwhile(id)),
                Some(record) if record.lifecycle.is_cancelled() => return Err(abandoned()),
                Some(record) if done(record) => return Ok(()),
                Some(_) => {}
            }
            if tokio::time::timeout_at(deadline, woken).await.is_err() {
                return Err(self.udev_is_late(id));
            }
        }
    }

    pub(super) fn udev_is_late(&self, id: DiskSequence) -> Error {
        let state = self.state();
        let record = state.records.get(&id);
        let node = record.map(|record| record.device.node()).unwrap_or_default();
        let waited = self.settings().wait_for_udev.as_secs_f32();
        let remedy = if record.is_some_and(Record::is_published) {
            "look at systemd-udevd"
        } else {
            "so it was detached again; look at systemd-udevd, or attach with wait=false"
        };
        Error::new(ErrorKind::Timeout, format!("udev did not process {node} within {waited} s; {remedy}"))
    }

    /// Waits for the end of an attachment; false where it did not come in time.
    pub(super) async fn await_end(self: &Arc<Self>, id: DiskSequence) -> bool {
        let deadline = Instant::now() + self.settings().wait_for_users;
        loop {
            let Some(changed) = self.state().records.get(&id).map(|record| Arc::clone(&record.changed))
            else {
                return true;
            };
            let woken = changed.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if !self.state().records.contains_key(&id) {
                return true;
            }
            if tokio::time::timeout_at(deadline, woken).await.is_err() {
                return self.reap_if_gone(id);
            }
        }
    }

    /// Whether an attachment is what the kernel has bound.
    pub(super) fn is_current(&self, id: DiskSequence, bound: Option<DiskSequence>) -> bool {
        self.state().records.get(&id).is_some_and(|record| {
            record.lifecycle.is_replacing() || Some(record.device.disk_sequence) == bound
        })
    }

    /// The attachment that the number stands for, where the kernel still has it; ends it where not.
    pub(super) fn reconcile(
        self: &Arc<Self>,
        number: u32,
        bound: Option<DiskSequence>,
    ) -> Option<DiskSequence> {
        let known = self.state().by_number.get(&number).copied()?;
        if self.is_current(known, bound) {
            return Some(known);
        }
        self.ended_elsewhere(known);
        None
    }

    /// Makes room for a new attach on this number: what stood there before has ended.
    pub(super) fn reap_previous(self: &Arc<Self>, number: u32) {
        self.reconcile(number, None);
    }

    /// The kernel has taken it down.
    pub(super) fn ended_elsewhere(self: &Arc<Self>, id: DiskSequence) {
        let ended = self.find(id);
        // An operation on the device that is under way tells of the end itself.
        let unexpected =
            self.state().records.get(&id).is_some_and(|record| record.operation.try_lock().is_ok());
        self.remove_record(id);
        if let Some(ended) = ended.filter(|ended| unexpected && ended.ownership.is_some()) {
            let detaching = ended.state == State::Detaching;
            audit(if detaching { "gone with its last user" } else { "detached by another program" }, &ended);
        }
    }

    /// Ends the attachment where the kernel has; says whether it is gone.
    pub(super) fn reap_if_gone(self: &Arc<Self>, id: DiskSequence) -> bool {
        let Some(number) = self.state().records.get(&id).map(|record| record.device.number) else {
            return true;
        };
        if self.is_current(id, self.kernel.peek(number).bound) {
            return false;
        }
        self.remove_record(id);
        true
    }

    /// Forgets an attachment that the kernel has taken down.
    pub(super) fn remove_record(self: &Arc<Self>, id: DiskSequence) {
        let Some(record) = self.state().remove(id) else { return };
        self.state_writer.end(id);
        if record.is_published() {
            self.emit(Event::Removed(id));
        }
        let (number, node_made, hold) = (record.device.number, record.node_made, record.hold);
        let owner = record.ownership.map(|ownership| ownership.uid);
        if !node_made && hold.is_none() {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let _leave = engine.background.take(owner).await;
            if let Some(hold) = hold {
                engine.kernel.release(hold).await;
            }
            if node_made {
                engine.kernel.remove(number).await;
            }
        });
    }

    /// Gives up what keeps the device, and looks whether it went.
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

    /// Takes a descriptor that keeps the device; false where it is gone.
    pub(super) async fn take_hold(self: &Arc<Self>, attachment: &Snapshot) -> Result<bool, Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let hold = self.kernel.hold(number, sequence).await?;
        let taken = hold.is_some();
        if let Some(unclaimed) = self.restore_hold(attachment.id, hold) {
            self.kernel.release(unclaimed).await;
        }
        Ok(taken)
    }

    /// Puts a hold back; gives it to the caller where the attachment ended meanwhile.
    pub(super) fn restore_hold(&self, id: DiskSequence, hold: Option<K::Hold>) -> Option<K::Hold> {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(&id) else { return hold };
        record.hold = hold;
        None
    }

    /// Has the device go with its last user. The last close writes to the backing file: where that
    /// hangs, nobody waits for it here, and nothing else is done to the device.
    pub(super) async fn detach_lazily(
        self: &Arc<Self>,
        attachment: &Snapshot,
        what: &str,
        alone: OwnedMutexGuard<()>,
    ) {
        audit(what, attachment);
        let (engine, id, owner) = (Arc::clone(self), attachment.id, attachment.owner());
        let going = tokio::spawn(async move {
            let _leave = engine.background.take(owner).await;
            engine.release(id).await;
            alone
        });
        let _alone = tokio::time::timeout(self.settings().wait_for_users, going).await;
        self.update_outline(attachment.id, |record| {
            record.lifecycle = Lifecycle::Detaching;
            record.device.autoclear = true;
        });
    }

    pub(super) async fn apply(self: &Arc<Self>, attachment: &Snapshot, change: Change) -> Result<(), Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let Some(device) = self.kernel.change(number, sequence, change).await? else {
            self.reap_if_gone(attachment.id);
            return Err(gone(attachment.id));
        };
        self.update(attachment.id, |record| record.device = device);
        Ok(())
    }

    /// The table may have changed since we were told.
    pub(super) fn refresh_mounts(self: &Arc<Self>) {
        if let Some(table) = self.kernel.mounts() {
            self.mounts_changed(table);
        }
    }
}

pub(super) fn gone(id: DiskSequence) -> Error {
    Error::new(ErrorKind::NotFound, format!("the attachment with disk sequence {id} is gone"))
}

/// What a device in use is told as.
pub(super) fn busy(asked: &str, attachment: &Snapshot, users: &Users, remedy: &str) -> Error {
    let mut held_by: Vec<String> = users
        .mount_points
        .iter()
        .map(|path| format!("mounted on {}", printable(path.as_os_str().as_encoded_bytes())))
        .collect();
    held_by.extend(users.holders.iter().map(|holder| format!("held by {holder}")));
    if held_by.is_empty() {
        held_by.push("opened by a process".to_owned());
    }
    Error::new(
        ErrorKind::Busy,
        format!(
            "cannot {asked} {} ({}): it is {}; {remedy}",
            attachment.device.node(),
            printable(&attachment.device.backing_file),
            held_by.join(", ")
        ),
    )
}

pub(super) fn abandoned() -> Error {
    Error::new(
        ErrorKind::AccessDenied,
        "the client vanished, or loopd was asked to end, before the device was ready, so it was detached again",
    )
}

pub(super) fn detached_meanwhile(id: DiskSequence) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "the device with disk sequence {id} was detached by another program before it was ready; try again"
        ),
    )
}

/// One line for the administrator.
pub(super) fn audit(what: &str, attachment: &Snapshot) {
    let ownership = attachment.ownership.as_ref();
    info!(
        device = attachment.device.node(),
        disk_sequence = attachment.id.0,
        uid = ownership.map(|ownership| ownership.uid),
        file = printable(&attachment.device.backing_file),
        lifetime = ownership.map(|ownership| ownership.lifetime.as_str()),
        "{what}"
    );
}
