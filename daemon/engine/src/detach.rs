//! Detaches on request.

use std::sync::Arc;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Change, DiskSequence, Kernel};
use crate::operation::{audit, gone, in_use};
use crate::snapshot::Snapshot;

const OR_LAZILY: &str = "end that first, or detach lazily";

/// The result of a detach that is not lazy.
enum Attempt {
    Gone,
    InUse,
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
        let users = self.known_users(&attachment).await?;
        if !users.is_empty() {
            return Err(in_use("detach", &attachment, users, OR_LAZILY));
        }
        match self.try_detach(&attachment).await? {
            Attempt::Gone => {
                self.kernel.await_rundown(attachment.device.number).await;
                audit("detached", &attachment);
                Ok(())
            }
            Attempt::InUse => {
                let users = self.users_of(&attachment).await;
                Err(in_use("detach", &attachment, users, OR_LAZILY))
            }
        }
    }

    async fn detach_at_once(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        let alone = self.lock_device_soon(id, "detach").await?;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        self.defer_cleartexts(&attachment).await?;
        self.detach_lazily(&attachment, "detached lazily", alone).await;
        Ok(())
    }

    /// Releases the device, and waits a bounded time for passing users. If one stays, the device is held again.
    async fn try_detach(self: &Arc<Self>, attachment: &Snapshot) -> Result<Attempt, Error> {
        let was_held = self.state().records.get(&attachment.id).is_some_and(|record| record.hold.is_some());
        self.release(attachment.id).await;
        let ended = tokio::select! {
            ended = self.await_end(attachment.id) => ended,
            () = self.aborted() => self.reap_if_gone(attachment.id),
        };
        if ended {
            return Ok(Attempt::Gone);
        }
        if was_held {
            self.take_hold(attachment).await?;
        } else if !attachment.device.autoclear {
            self.undo_clear(attachment).await?;
        }
        self.reap_if_gone(attachment.id);
        let still_there = self.state().records.contains_key(&attachment.id);
        Ok(if still_there { Attempt::InUse } else { Attempt::Gone })
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
