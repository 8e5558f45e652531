//! Replaces the backing file of a read-only device.

use std::sync::Arc;

use tracing::warn;

use crate::engine::Engine;
use crate::error::Error;
use crate::findings::{FileEnd, Findings};
use crate::kernel::{Device, DiskSequence, FileIdentity, Kernel, Replaced};
use crate::operation::{audit, gone};
use crate::ownership::is_root;
use crate::snapshot::Snapshot;

impl<K: Kernel> Engine<K> {
    /// Shows another file of the same size on a read-only device, for the user with this uid.
    ///
    /// # Errors
    /// `NotFound`, `InvalidBackingFile`, `NotSupported`, `Kernel`; `Busy` if the new file is mounted through
    /// another device that can be written to. The device then shows the same file as before.
    pub async fn replace_backing_file(
        self: &Arc<Self>,
        id: DiskSequence,
        file: K::File,
        uid: u32,
    ) -> Result<(), Error> {
        let _alone = self.lock_device(id).await?;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let shown_next = self.kernel.examine(&file).await?.identity;
        let _alone_with_file = self.mount_locks.lock(shown_next).await;
        let _claims = self.claim_users_of(shown_next, &attachment).await?;
        // If this daemon dies now, the next one recognizes the device by the file.
        self.state_writer.begin_replacement(id, shown_next)?;
        // Events have the new disk sequence before the call returns it.
        self.update(id, |record| record.lifecycle.begin_replacement());
        let owner = attachment.ownership.as_ref().map_or(0, |ownership| ownership.uid);
        let untrusted = !is_root(owner) || !is_root(uid);
        let (replaced, failed) = match self.kernel.replace(number, sequence, file, untrusted).await {
            Ok(replaced) => (replaced, None),
            Err(error) => (None, Some(error)),
        };
        let sequence = replaced.as_ref().map_or(sequence, |replaced| replaced.device.disk_sequence);
        let (is_replaced, file_end) = match &replaced {
            Some(replaced) => (true, replaced.file_end),
            None => (false, FileEnd::default()),
        };
        self.take_replaced(id, replaced);
        if let Err(error) = self.state_writer.end_replacement(id, sequence, file_end) {
            warn!(device = attachment.device.node(), disk_sequence = id.0, "{error}");
        }
        if self.reap_if_gone(id) {
            return Err(gone(id));
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if !is_replaced {
            return Err(gone(id));
        }
        if let Some(replaced) = self.find(id) {
            audit("backing file replaced", &replaced);
        }
        self.partitions_may_have_changed(id).await
    }

    /// A file system that is mounted from this device would be damaged by another mount of the new file.
    async fn claim_users_of(
        self: &Arc<Self>,
        file: FileIdentity,
        attachment: &Snapshot,
    ) -> Result<K::Claims, Error> {
        let (device, inode) = (file.device, file.inode);
        let next = Device { backing_device: device, backing_inode: inode, ..attachment.device.clone() };
        let operation = format!("replace the backing file of {}", next.node());
        self.claim_others(&next, 0..next.size, operation).await
    }

    /// Ends a replacement; with the new device if it succeeded.
    fn take_replaced(&self, id: DiskSequence, replaced: Option<Replaced>) {
        let found = replaced.as_ref().and_then(|Replaced { device, .. }| {
            self.state().take_seen(device.number, Some(device.disk_sequence))
        });
        self.update(id, |record| {
            record.lifecycle.end_replacement();
            let Some(Replaced { device, file_end }) = replaced else { return };
            record.device = device;
            record.file_end = file_end;
            record.unmade = false;
            // Those of the new file follow with its partitions.
            record.findings = Findings::default();
            record.processed = found.is_some();
            record.file_system = found.unwrap_or_default().file_system;
            record.partitions.clear();
        });
    }
}
