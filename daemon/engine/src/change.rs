//! Changes of an attached device: size, direct I/O, block size.

use std::sync::Arc;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Change, DiskSequence, Kernel};
use crate::operation::{audit, gone, in_use};
use crate::snapshot::Snapshot;

impl<K: Kernel> Engine<K> {
    /// Changes the device. After an error it is unchanged.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `NotSupported`, `Kernel`.
    pub async fn change(self: &Arc<Self>, id: DiskSequence, change: Change) -> Result<(), Error> {
        let _alone = self.lock_device(id).await?;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        if matches!(change, Change::BlockSize(_)) {
            self.refuse_in_use(&attachment).await?;
        }
        self.apply(&attachment, change).await?;
        audit("changed", &attachment);
        // The table may be in another place now, and udev issues BLKRRPART after the writable descriptor is closed.
        self.partitions_may_have_changed(id).await
    }

    /// A change of the block size damages a mounted file system.
    async fn refuse_in_use(&self, attachment: &Snapshot) -> Result<(), Error> {
        let users = self.known_users(attachment).await?;
        if users.is_empty() {
            return Ok(());
        }
        Err(in_use("change the block size of", attachment, users, "end that first"))
    }
}
