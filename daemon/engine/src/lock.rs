//! Locks volumes: closes their cleartexts.

use std::sync::Arc;

use loopd_common::ErrorKind;
use loopd_common::text::printable;
use tracing::info;

use crate::cleartext::CleartextSnapshot;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Kernel, Mapping, Users};
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
        let _alone = self.lock_device(volume.attachment).await?;
        self.refresh_mounts();
        self.reap_cleartexts(volume.attachment);
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let shown =
            VolumeState::of(&attachment, VolumeId { is_cleartext: false, ..volume })?.shown(&attachment);
        let cleartext = attachment.cleartext_of(volume.partition).cloned();
        let cleartext = cleartext.ok_or_else(|| Error::NotUnlocked { volume: shown.clone() })?;
        if lazy {
            self.lock_lazily(volume, &cleartext.mapping).await?;
        } else {
            self.lock_now(&attachment, volume, &cleartext).await?;
        }
        info!(
            cleartext = cleartext.mapping.node(),
            "{}: {shown}",
            if lazy { "locked lazily" } else { "locked" }
        );
        Ok(())
    }

    async fn lock_now(
        self: &Arc<Self>,
        attachment: &Snapshot,
        volume: VolumeId,
        cleartext: &CleartextSnapshot,
    ) -> Result<(), Error> {
        let mapping = &cleartext.mapping;
        let users = self.kernel.mapping_users(mapping).await?;
        if users.is_empty() && self.try_close(volume, mapping).await? {
            return Ok(());
        }
        let users = self.kernel.mapping_users(mapping).await.unwrap_or(users);
        Err(cleartext_in_use(attachment, mapping, users))
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
        match self.kernel.hold_mapping(mapping).await {
            Ok(Some(hold)) => {
                if let Some(unclaimed) = self.restore_cleartext_hold(id, partition, mapping, hold) {
                    self.kernel.release(unclaimed).await;
                }
                Ok(false)
            }
            Ok(None) => {
                self.remove_cleartext(id, partition, mapping);
                Ok(true)
            }
            Err(error) => {
                // Nothing holds it any more.
                self.begin_closing(id, partition);
                Err(error)
            }
        }
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

    /// Makes a cleartext close with its last user.
    async fn lock_lazily(self: &Arc<Self>, volume: VolumeId, mapping: &Mapping) -> Result<(), Error> {
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
        if let Some(hold) = self.begin_closing(id, partition) {
            self.kernel.release(hold).await;
        }
        self.reap_cleartexts(id);
        Ok(())
    }
}

/// Error for a cleartext that is in use.
fn cleartext_in_use(attachment: &Snapshot, mapping: &Mapping, users: Users) -> Error {
    Error::InUse {
        operation: "lock",
        device: mapping.node(),
        file: printable(&attachment.device.backing_file),
        users: Box::new(users),
        remedy: OR_LAZILY,
    }
}
