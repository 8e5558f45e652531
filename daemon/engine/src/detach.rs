//! The ends of attachments: detach on request, and with the client.

use std::sync::Arc;

use loopd_common::{Error, ErrorKind, State};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::attach::audit;
use super::attachment::Record;
use super::{ClientId, Engine, Event, Snapshot};
use crate::kernel::{Change, DiskSequence, Kernel, Users};
use loopd_common::text::printable;

const OR_LAZILY: &str = "end that first, or detach lazily";

/// How a non-lazy detach went.
enum Attempt {
    Gone,
    InUse,
}

impl<K: Kernel> Engine<K> {
    /// Detaches. Not lazy: returns when the device really is free, or fails with `Busy` and has
    /// changed nothing. Lazy: returns at once, and the device goes with its last user.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Kernel`.
    pub async fn detach(self: &Arc<Self>, id: DiskSequence, lazy: bool) -> Result<(), Error> {
        if lazy {
            return self.detach_at_once(id).await;
        }
        let _alone = self.lock_device(id).await?;
        let Some(attachment) = self.find(id) else { return Err(gone(id)) };
        let users = self.kernel.users(attachment.device.number).await?;
        if !users.is_empty() {
            return Err(busy("detach", &attachment, &users, OR_LAZILY));
        }
        match self.try_detach(&attachment).await? {
            Attempt::Gone => {
                self.kernel.await_rundown(attachment.device.number).await;
                audit("detached", &attachment);
                Ok(())
            }
            Attempt::InUse => {
                let mut users = self.kernel.users(attachment.device.number).await.unwrap_or_default();
                users.holders.extend(self.stacked_on(&attachment.device.node()));
                Err(busy("detach", &attachment, &users, OR_LAZILY))
            }
        }
    }

    async fn detach_at_once(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let at_once = self.settings().wait_for_users;
        let locked = tokio::time::timeout(at_once, self.lock_device(id)).await;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        let alone = locked.unwrap_or_else(|_| Err(at_work(&attachment)))?;
        self.detach_lazily(&attachment, "detached lazily", alone).await;
        Ok(())
    }

    /// Loop devices that have this one as their backing file.
    fn stacked_on(&self, node: &str) -> Vec<String> {
        let state = self.state();
        let stacked = state.records.values().filter(|record| record.device.backing_file == node.as_bytes());
        stacked.map(|record| record.device.node()).collect()
    }

    /// Ends what ends with this client, in whatever stage it is.
    pub fn client_disconnected(self: &Arc<Self>, client: &ClientId) {
        self.note_waiting_vanished(client);
        let mut ended = Vec::new();
        let mut state = self.state();
        if !state.clients.remove(client) {
            return;
        }
        for (id, record) in &mut state.records {
            if record.ends_with(Some(client)) {
                ended.push(*id);
            } else {
                // Its attach may still be under way, and will see this.
                record.abandon(client);
            }
        }
        drop(state);
        for id in ended {
            let (engine, client) = (Arc::clone(self), client.clone());
            tokio::spawn(async move { engine.end_of_lifetime(id, Some(&client)).await });
        }
        self.begin_graces(client);
    }

    /// Has every attach and mount that waits fail, and undo what it did: the daemon ends.
    pub fn abort_calls(&self) {
        self.ending.send_replace(true);
        self.state().records.values_mut().for_each(Record::abort_calls);
    }

    /// Ends an attachment whose client is gone, unless it has another lifetime or client by the time
    /// that the device is locked.
    pub(super) async fn end_of_lifetime(self: &Arc<Self>, id: DiskSequence, client: Option<&ClientId>) {
        let Ok(alone) = self.lock_device(id).await else { return };
        let is_over = self.state().records.get(&id).is_some_and(|record| record.ends_with(client));
        if let Some(attachment) = self.find(id).filter(|_| is_over) {
            self.detach_lazily(&attachment, "detached, since its client is gone", alone).await;
        }
    }

    pub(super) async fn lock_device(&self, id: DiskSequence) -> Result<OwnedMutexGuard<()>, Error> {
        let operation = self.state().records.get(&id).map(|record| Arc::clone(&record.operation));
        Ok(operation.ok_or_else(|| gone(id))?.lock_owned().await)
    }

    /// Resolves when calls are to be given up.
    pub(super) async fn given_up(&self) {
        let mut ending = self.ending.subscribe();
        // The sender lives as long as the engine.
        let _ended = ending.wait_for(|ending| *ending).await;
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
            engine.let_go(id).await;
            alone
        });
        let _alone = tokio::time::timeout(self.settings().wait_for_users, going).await;
        self.update_outline(attachment.id, |record| {
            record.state = State::Detaching;
            record.device.autoclear = true;
        });
    }

    /// Gives up what keeps the device, and looks whether it went.
    pub(super) async fn let_go(self: &Arc<Self>, id: DiskSequence) {
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
        self.look_whether_gone(id);
    }

    /// Lets go, and waits a bounded time for passing users; takes it back where they stay.
    async fn try_detach(self: &Arc<Self>, attachment: &Snapshot) -> Result<Attempt, Error> {
        let was_held = self.state().records.get(&attachment.id).is_some_and(|record| record.hold.is_some());
        self.let_go(attachment.id).await;
        if self.await_end(attachment.id).await {
            return Ok(Attempt::Gone);
        }
        if was_held {
            self.take_hold(attachment).await?;
        } else if !attachment.device.autoclear {
            self.take_clear_back(attachment).await?;
        }
        self.look_whether_gone(attachment.id);
        let still_there = self.state().records.contains_key(&attachment.id);
        Ok(if still_there { Attempt::InUse } else { Attempt::Gone })
    }

    /// Has the device stay although it was cleared: without autoclear or, where the kernel does not
    /// let us take that back, with a descriptor of ours.
    async fn take_clear_back(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        match self.kernel.change(number, sequence, Change::Autoclear(false)).await {
            Ok(_) => Ok(()),
            Err(error) => match self.take_hold(attachment).await {
                Ok(true) => {
                    self.update(attachment.id, |record| record.device.autoclear = true);
                    Ok(())
                }
                Ok(false) | Err(_) => Err(error),
            },
        }
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
    fn restore_hold(&self, id: DiskSequence, hold: Option<K::Hold>) -> Option<K::Hold> {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(&id) else { return hold };
        record.hold = hold;
        None
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
                return self.look_whether_gone(id);
            }
        }
    }

    /// Ends the attachment where the kernel has; says whether it is gone.
    pub(super) fn look_whether_gone(self: &Arc<Self>, id: DiskSequence) -> bool {
        let Some(number) = self.state().records.get(&id).map(|record| record.device.number) else {
            return true;
        };
        if self.is_current(id, self.kernel.peek(number).bound) {
            return false;
        }
        self.finish(id);
        true
    }

    /// Forgets an attachment that the kernel has taken down.
    pub(super) fn finish(self: &Arc<Self>, id: DiskSequence) {
        let Some(record) = self.state().remove(id) else { return };
        self.keeper.end(id);
        if record.is_published() {
            self.tell(Event::Removed(id));
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
}

pub(super) fn gone(id: DiskSequence) -> Error {
    Error::new(ErrorKind::NotFound, format!("the attachment with disk sequence {id} is gone"))
}

/// What a device is told as that another call is at work on.
fn at_work(attachment: &Snapshot) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "cannot detach {} ({}): another call is at work on it and does not end, so its backing file may hang; \
             try again when it answers",
            attachment.device.node(),
            printable(&attachment.device.backing_file)
        ),
    )
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
