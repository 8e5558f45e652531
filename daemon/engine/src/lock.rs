//! Locks volumes: closes their cleartexts.

use std::sync::Arc;

use loopd_common::ErrorKind;
use loopd_common::text::printable;
use tokio::sync::OwnedMutexGuard;
use tracing::info;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Kernel, Mapping};
use crate::operation::gone;
use crate::snapshot::Snapshot;
use crate::unlocker::Closing;
use crate::volume::{VolumeId, VolumeState};

const OR_LAZILY: &str = "end that first, or lock lazily";

impl<K: Kernel> Engine<K> {
    /// Locks a volume. Not lazy: returns when the cleartext is gone, or fails with `Busy` and has changed nothing.
    /// Lazy: returns at once, and the cleartext goes with its last user.
    ///
    /// # Errors
    /// `NotFound` if it is not unlocked; `Busy`, `Timeout`, `Kernel`.
    pub async fn lock(self: &Arc<Self>, volume: VolumeId, lazy: bool) -> Result<(), Error> {
        let alone = if lazy {
            self.lock_device_soon(volume.attachment, "lock").await?
        } else {
            self.lock_device(volume.attachment).await?
        };
        self.refresh_mounts();
        self.reap_cleartexts(volume.attachment);
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let encrypted = VolumeState::of(&attachment, VolumeId { is_cleartext: false, ..volume })?;
        let shown = encrypted.shown(&attachment);
        let cleartext = attachment.cleartext_of(volume.partition).cloned();
        let cleartext = cleartext.ok_or_else(|| Error::NotUnlocked { volume: shown.clone() })?;
        let event = if lazy {
            self.lock_lazily(volume, &cleartext.mapping, attachment.owner(), alone).await?;
            "locked lazily"
        } else {
            self.lock_now(&attachment, volume, &cleartext.mapping).await?;
            "locked"
        };
        info!(cleartext = cleartext.mapping.node(), "{event}: {shown}");
        Ok(())
    }

    async fn lock_now(
        self: &Arc<Self>,
        attachment: &Snapshot,
        volume: VolumeId,
        mapping: &Mapping,
    ) -> Result<(), Error> {
        let users = self.kernel.mapping_users(mapping).await?;
        if users.is_empty() && self.try_close(volume, mapping).await? {
            return Ok(());
        }
        let users = self.kernel.mapping_users(mapping).await.unwrap_or(users);
        Err(Error::InUse {
            operation: "lock",
            device: mapping.node(),
            file: printable(&attachment.device.backing_file),
            users: Box::new(users),
            remedy: OR_LAZILY,
        })
    }

    /// Closes a cleartext, and waits a bounded time for passing users. If one stays, it is held again; false then.
    async fn try_close(self: &Arc<Self>, volume: VolumeId, mapping: &Mapping) -> Result<bool, Error> {
        let VolumeId { attachment: id, partition, .. } = volume;
        let Some(hold) = self.take_cleartext_hold(id, partition) else {
            return self.close_on_request(volume, mapping).await;
        };
        self.kernel.release(hold).await;
        if self.await_closed(id, partition).await {
            return Ok(true);
        }
        let held = self.hold_cleartext(id, partition, mapping).await;
        if held.is_err() {
            // It is closed with its last user now.
            self.begin_closing(id, partition);
        }
        held.map(|held| !held)
    }

    async fn close_on_request(self: &Arc<Self>, volume: VolumeId, mapping: &Mapping) -> Result<bool, Error> {
        let VolumeId { attachment: id, partition, .. } = volume;
        let closed = self.unlocker.close(mapping.name.clone(), self.settings().wait_for_mount).await;
        self.reap_cleartexts(id);
        match closed {
            _ if !self.is_unlocked(id, partition) => Ok(true),
            Ok(()) => Ok(self.await_closed(id, partition).await),
            Err(error) if error.kind() == ErrorKind::Busy => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a cleartext close with its last user. The last close writes to the backing file: if that hangs, the caller
    /// does not wait for it, and the device stays locked.
    async fn lock_lazily(
        self: &Arc<Self>,
        volume: VolumeId,
        mapping: &Mapping,
        owner: Option<u32>,
        alone: OwnedMutexGuard<()>,
    ) -> Result<(), Error> {
        let VolumeId { attachment: id, partition, .. } = volume;
        let closes_itself = {
            let state = self.state();
            let cleartext = state.records.get(&id).and_then(|record| record.cleartexts.get(&partition));
            cleartext.is_none_or(|cleartext| cleartext.hold.is_some() || cleartext.closing)
        };
        if !closes_itself {
            let timeout = self.settings().wait_for_mount;
            self.unlocker.set_closing(mapping.name.clone(), Closing::AtLastClose, timeout).await?;
        }
        let hold = self.begin_closing(id, partition);
        let engine = Arc::clone(self);
        let closing = tokio::spawn(async move {
            let _permit = engine.background.acquire(owner).await;
            if let Some(hold) = hold {
                engine.kernel.release(hold).await;
            }
            engine.reap_cleartexts(id);
            alone
        });
        let _alone = tokio::time::timeout(self.settings().wait_for_users, closing).await;
        Ok(())
    }
}
