//! Changes of what is attached: size, direct I/O, block size, lifetime, backing file.

use std::sync::Arc;

use loopd_common::{Error, Lifetime, State};
use tracing::warn;

use super::attach::{Caller, audit};
use super::detach::gone;
use super::{Engine, Ownership, Snapshot};
use crate::kernel::{Change, Device, DiskSequence, FileIdentity, Kernel};

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
        Err(super::detach::busy("change the block size of", attachment, &users, "end that first"))
    }

    async fn apply(self: &Arc<Self>, attachment: &Snapshot, change: Change) -> Result<(), Error> {
        let (number, sequence) = (attachment.device.number, attachment.device.disk_sequence);
        let Some(device) = self.kernel.change(number, sequence, change).await? else {
            self.look_whether_gone(attachment.id);
            return Err(gone(attachment.id));
        };
        self.update(attachment.id, |record| record.device = device);
        Ok(())
    }

    /// Gives the attachment another lifetime: `Client` binds it to the caller's connection, and so does
    /// `Mount` where it is not mounted yet. A lazy
    /// detach is taken back, and what loopd did not attach is the caller's from then on.
    ///
    /// # Errors
    /// `NotFound`, `NotSupported`, `LimitExceeded`, `Kernel`; it is as it was then.
    pub async fn set_lifetime(
        self: &Arc<Self>,
        id: DiskSequence,
        lifetime: Lifetime,
        caller: &impl Caller,
    ) -> Result<(), Error> {
        self.set_lifetime_if(id, lifetime, caller, |_| true).await
    }

    /// The same where `is_wanted` says so of the attachment as it is once its device is locked.
    pub(super) async fn set_lifetime_if(
        self: &Arc<Self>,
        id: DiskSequence,
        lifetime: Lifetime,
        caller: &impl Caller,
        is_wanted: impl Fn(&Snapshot) -> bool,
    ) -> Result<(), Error> {
        let _alone = self.lock_device(id).await?;
        let attachment = self.find(id).ok_or_else(|| gone(id))?;
        if !is_wanted(&attachment) {
            return Ok(());
        }
        let permit = match attachment.ownership {
            Some(_) => None,
            None => Some(self.attachments_of_a_uid.acquire(caller.uid())?),
        };
        if permit.is_some() && caller.uid() != 0 {
            // From now on it shows what its new owner likes.
            self.kernel.mark_untrusted(attachment.device.disk_sequence)?;
        }
        match lifetime {
            Lifetime::Persistent => self.let_stay(&attachment).await?,
            Lifetime::Client | Lifetime::Mount => self.let_go_with_us(&attachment).await?,
        }
        let client = (lifetime != Lifetime::Persistent).then(|| caller.client().clone());
        self.look_at_mounts();
        let mounts = self.state().mounts.clone();
        self.update(id, |record| {
            let mut new = Ownership::new(caller.uid(), client, lifetime);
            if let Some(before) = record.ownership.take() {
                (new.uid, new.since) = (before.uid, before.since);
            }
            record.ownership = Some(new);
            record.state = State::Attached;
            record.permit = record.permit.take().or(permit);
            record.note_mounts(&mounts);
        });
        if let Some(changed) = self.find(id) {
            audit("lifetime changed", &changed);
        }
        // One that vanished before it was bound ends now; later ones are found by `client_disconnected`.
        if caller.is_disconnected() {
            self.client_disconnected(caller.client());
        }
        Ok(())
    }

    /// Without autoclear and without a descriptor of ours it stays until it is detached.
    async fn let_stay(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        self.apply(attachment, Change::Autoclear(false)).await?;
        let hold = self.state().records.get_mut(&attachment.id).and_then(|record| record.hold.take());
        if let Some(hold) = hold {
            self.kernel.release(hold).await;
        }
        Ok(())
    }

    /// With autoclear it stays for as long as our descriptor is open.
    async fn let_go_with_us(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        let id = attachment.id;
        let held = self.state().records.get(&id).is_some_and(|record| record.hold.is_some());
        if !held && !self.take_hold(attachment).await? {
            self.look_whether_gone(id);
            return Err(gone(id));
        }
        let bound = self.apply(attachment, Change::Autoclear(true)).await;
        if bound.is_err() && !held {
            let hold = self.state().records.get_mut(&id).and_then(|record| record.hold.take());
            if let Some(hold) = hold {
                self.kernel.release(hold).await;
            }
        }
        bound
    }

    /// Shows another file of the same size on a read-only device, for the user with this uid.
    ///
    /// # Errors
    /// `NotFound`, `InvalidBackingFile`, `NotSupported`, `Kernel`; `Busy` if the new file is mounted through
    /// another device that can be written to. The file is the one before then.
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
        // Where we die meanwhile the next daemon knows the device by that.
        self.keeper.expect_file(id, Some(shown_next))?;
        // The kernel's new sequence is seen before we are told it.
        self.update(id, |record| record.replacing = true);
        let owner = attachment.ownership.as_ref().map_or(0, |ownership| ownership.uid);
        let untrusted = owner != 0 || uid != 0;
        let replaced = self.kernel.replace(number, sequence, file, untrusted).await;
        let device = replaced.as_ref().ok().and_then(Option::as_ref).cloned();
        self.take_replaced(id, device);
        if let Err(error) = self.keeper.expect_file(id, None) {
            warn!(device = attachment.device.node(), disk_sequence = id.0, "{error}");
        }
        if self.look_whether_gone(id) || replaced?.is_none() {
            return Err(gone(id));
        }
        if let Some(replaced) = self.find(id) {
            audit("backing file replaced", &replaced);
        }
        self.partitions_may_have_changed(id).await
    }

    /// A file system that is mounted here would show what another mount of the new file changes under it.
    async fn claim_users_of(
        self: &Arc<Self>,
        file: FileIdentity,
        attachment: &Snapshot,
    ) -> Result<K::Claims, Error> {
        let (device, inode) = (file.device, file.inode);
        let next = Device { backing_device: device, backing_inode: inode, ..attachment.device.clone() };
        let asked = format!("cannot replace the backing file of {}", next.node());
        self.claim_others(&next, 0..next.size, asked).await
    }

    /// Ends a replacement; with the device as it is then, where it succeeded.
    fn take_replaced(&self, id: DiskSequence, device: Option<Device>) {
        let found = device
            .as_ref()
            .and_then(|device| self.state().seen(device.number, None, device.disk_sequence).cloned());
        self.update(id, |record| {
            record.replacing = false;
            let Some(device) = device else { return };
            record.device = device;
            record.processed = found.is_some();
            record.file_system = found.unwrap_or_default().file_system;
            record.partitions.clear();
        });
    }
}
