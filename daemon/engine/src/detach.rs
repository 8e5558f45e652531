//! Detaches on request.

use std::sync::Arc;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Change, DetachAttempt, DiskSequence, Kernel, Users};
use crate::operation::{audit, gone, in_use};
use crate::snapshot::Snapshot;

const OR_LAZILY: &str = "end that first, or detach lazily";

/// The result of a detach that is not lazy.
enum Attempt {
    Gone,
    InUse(Users),
}

impl<K: Kernel> Engine<K> {
    /// Detaches. Not lazy: returns when the device is free, or fails with `Busy` and has changed nothing. Lazy:
    /// returns at once, and the device is detached at its last close.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Kernel`.
    pub async fn detach(self: &Arc<Self>, id: DiskSequence, lazy: bool) -> Result<(), Error> {
        if lazy {
            return self.detach_at_once(id).await;
        }
        let _alone = self.lock_device(id).await?;
        let Some(attachment) = self.find(id) else { return Err(gone(id)) };
        match self.try_detach(&attachment).await? {
            Attempt::Gone => {
                audit("detached", &attachment);
                Ok(())
            }
            Attempt::InUse(users) => Err(in_use("detach", &attachment, users, OR_LAZILY)),
        }
    }

    async fn detach_at_once(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let alone = self.lock_device_soon(id, "detach").await?;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        self.defer_cleartexts(&attachment).await?;
        self.detach_lazily(&attachment, "detached lazily", alone).await;
        Ok(())
    }

    /// Releases a device that has no users, and waits a bounded time for passing ones. If one stays, the device is held
    /// again.
    async fn try_detach(self: &Arc<Self>, attachment: &Snapshot) -> Result<Attempt, Error> {
        let (id, number) = (attachment.id, attachment.device.number);
        let hold = self.state().records.get_mut(&id).and_then(|record| record.hold.take());
        let was_held = hold.is_some();
        // One call, since each call that can block takes a change of threads and back.
        match self.kernel.detach_unused(number, attachment.device.disk_sequence, hold).await {
            DetachAttempt::Kept(hold, users) => {
                if let Some(unclaimed) = self.restore_hold(id, hold) {
                    self.kernel.release(unclaimed).await;
                }
                return Ok(Attempt::InUse(self.name_cleartexts(attachment, users?).await?));
            }
            DetachAttempt::Released { detached: true } => {
                self.remove_record(id);
                return Ok(Attempt::Gone);
            }
            DetachAttempt::Released { detached: false } => {}
            DetachAttempt::Failed(error) => tracing::warn!(number, disk_sequence = id.0, "{error}"),
        }
        if self.await_release(attachment, was_held).await? {
            self.kernel.await_rundown(number).await;
            return Ok(Attempt::Gone);
        }
        Ok(Attempt::InUse(self.users_of(attachment).await))
    }

    /// Waits a bounded time for the users of a released device; if one stays, the device is held again. Returns whether
    /// the attachment has ended.
    async fn await_release(self: &Arc<Self>, attachment: &Snapshot, was_held: bool) -> Result<bool, Error> {
        let ended = tokio::select! {
            ended = self.await_end(attachment.id) => ended,
            () = self.aborted() => self.reap_if_gone(attachment.id),
        };
        if ended {
            return Ok(true);
        }
        if was_held {
            self.take_hold(attachment).await?;
        } else if !attachment.device.autoclear {
            self.undo_clear(attachment).await?;
        }
        self.reap_if_gone(attachment.id);
        Ok(!self.state().records.contains_key(&attachment.id))
    }

    /// Keeps a device that was cleared: makes it persistent again or, if the kernel refuses that, holds it.
    async fn undo_clear(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
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
}
