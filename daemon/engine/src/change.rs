//! Changes of an attached device: size, direct I/O, block size.

use std::sync::Arc;

use loopd_common::Error;

use crate::engine::Engine;
use crate::kernel::{Change, DiskSequence, Kernel};
use crate::operation::{audit, gone};
use crate::snapshot::Snapshot;

impl<K: Kernel> Engine<K> {
    /// Changes the device; after an error it is as it was.
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
        // A table may lie elsewhere now, and udev answers our close with BLKRRPART.
        self.partitions_may_have_changed(id).await
    }

    /// A file system does not survive that the size of its blocks changes under it.
    async fn refuse_in_use(&self, attachment: &Snapshot) -> Result<(), Error> {
        let users = self.kernel.users(attachment.device.number).await?;
        if users.is_empty() {
            return Ok(());
        }
        Err(crate::operation::busy("change the block size of", attachment, &users, "end that first"))
    }
}
