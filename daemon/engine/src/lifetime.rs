//! Lifetimes: an attachment ends with its client, with its last mount, or when it is detached.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Lifetime, State};

use crate::client::{Caller, ClientId};
use crate::clock::microseconds_now;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Change, DiskSequence, Kernel};
use crate::lifecycle::Lifecycle;
use crate::operation::{audit, gone};
use crate::ownership::{Ownership, is_root};
use crate::record::Record;
use crate::snapshot::Snapshot;
use crate::unlocker::Closing;

impl<K: Kernel> Engine<K> {
    /// Changes the lifetime of an attachment: `Client` binds it to the caller's connection, and so does `Mount` if it
    /// is not mounted yet. A lazy detach is taken back. The caller becomes the owner of a foreign device.
    ///
    /// # Errors
    /// `NotFound`, `NotSupported`, `LimitExceeded`, `Kernel`. The lifetime is unchanged then.
    pub async fn set_lifetime(
        self: &Arc<Self>,
        id: DiskSequence,
        lifetime: Lifetime,
        caller: &impl Caller,
    ) -> Result<(), Error> {
        self.set_lifetime_if(id, lifetime, caller, |_| true).await
    }

    /// The same if `is_wanted` is true for the attachment after its device is locked.
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
            None => Some(self.attachment_quota.acquire(caller.uid())?),
        };
        if permit.is_some() && !is_root(caller.uid()) {
            // From now on its new owner chooses its content.
            self.kernel.mark_untrusted(attachment.device.disk_sequence)?;
        }
        match lifetime {
            Lifetime::Persistent => self.make_persistent(&attachment).await?,
            Lifetime::Client | Lifetime::Mount => self.make_autoclear(&attachment).await?,
        }
        let client = (lifetime != Lifetime::Persistent).then(|| caller.client().clone());
        self.refresh_mounts();
        let mounts = self.state().mounts.clone();
        self.update(id, |record| {
            let mut new = Ownership::new(caller.uid(), client, lifetime);
            if let Some(before) = record.ownership.take() {
                (new.uid, new.since) = (before.uid, before.since);
            }
            record.ownership = Some(new);
            record.lifecycle = Lifecycle::Attached;
            record.permit = record.permit.take().or(permit);
            record.note_mounts(&mounts);
        });
        if let Some(changed) = self.find(id) {
            audit("lifetime changed", &changed);
        }
        // If the client has disconnected already, the attachment ends now. `client_disconnected` handles a later
        // disconnect.
        if caller.is_disconnected() {
            self.client_disconnected(caller.client());
        }
        Ok(())
    }

    /// Without autoclear and without a hold the device stays until it is detached.
    async fn make_persistent(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        let before = self.set_closing(attachment, Closing::OnRequest).await?;
        if let Err(error) = self.apply(attachment, Change::Autoclear(false)).await {
            self.restore_closing(attachment.id, &before).await;
            return Err(error);
        }
        self.commit_closing(attachment.id, before, Closing::OnRequest).await;
        let hold = self.state().records.get_mut(&attachment.id).and_then(|record| record.hold.take());
        if let Some(hold) = hold {
            self.kernel.release(hold).await;
        }
        Ok(())
    }

    /// With autoclear the device stays as long as the hold is open, and so do its cleartexts.
    async fn make_autoclear(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        let before = self.set_closing(attachment, Closing::AtLastClose).await?;
        let made = self.make_device_autoclear(attachment).await;
        match made {
            Ok(()) => self.commit_closing(attachment.id, before, Closing::AtLastClose).await,
            Err(_) => self.restore_closing(attachment.id, &before).await,
        }
        made
    }

    async fn make_device_autoclear(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        let id = attachment.id;
        let held = self.state().records.get(&id).is_some_and(|record| record.hold.is_some());
        if !held && !self.take_hold(attachment).await? {
            self.reap_if_gone(id);
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

    /// Ends the attachments that end with this client, including attaches in progress. Begins the grace time of
    /// those that wait for their first mount.
    pub fn client_disconnected(self: &Arc<Self>, client: &ClientId) {
        self.note_pending_disconnected(client);
        let (mut ended, mut waiting) = (Vec::new(), Vec::new());
        let mut state = self.state();
        if !state.clients.remove(client) {
            return;
        }
        for (id, record) in &mut state.records {
            if record.ends_with(Some(client)) {
                ended.push(*id);
            } else if record.awaits_mount_with(client) {
                waiting.push(*id);
            } else {
                // If its attach is in progress, that fails.
                record.cancel_for(client);
            }
        }
        drop(state);
        for id in ended {
            self.spawn_end_of_lifetime(id, Some(client.clone()));
        }
        waiting.into_iter().for_each(|id| self.begin_grace(id));
    }

    /// Makes every attach and mount in progress fail and undo its steps, since the daemon stops.
    pub fn abort_calls(&self) {
        self.ending.close();
        self.state().records.values_mut().for_each(Record::cancel);
    }

    pub(super) fn spawn_end_of_lifetime(self: &Arc<Self>, id: DiskSequence, client: Option<ClientId>) {
        let engine = Arc::clone(self);
        tokio::spawn(async move { engine.end_of_lifetime(id, client.as_ref()).await });
    }

    /// Ends an attachment whose client has disconnected, unless it has another lifetime or client when the device is
    /// locked.
    pub(super) async fn end_of_lifetime(self: &Arc<Self>, id: DiskSequence, client: Option<&ClientId>) {
        let Ok(alone) = self.lock_device(id).await else { return };
        let is_over = self.state().records.get(&id).is_some_and(|record| record.ends_with(client));
        if let Some(attachment) = self.find(id).filter(|_| is_over) {
            self.detach_lazily(&attachment, "detached, since its client has disconnected", alone).await;
        }
    }

    /// Begins the grace time of an attachment whose client has disconnected.
    pub(super) fn begin_grace(self: &Arc<Self>, id: DiskSequence) {
        let grace = self.settings().mount_grace;
        let ends = microseconds_now().saturating_add(u64::try_from(grace.as_micros()).unwrap_or(u64::MAX));
        self.update(id, |record| {
            if let Some(ownership) = &mut record.ownership {
                ownership.client = None;
                ownership.grace_ends = Some(ends);
            }
        });
        self.spawn_grace(id, ends, grace);
    }

    /// Continues a grace time that the last daemon began.
    pub(super) fn resume_grace(self: &Arc<Self>, id: DiskSequence, ends: u64) {
        let left = Duration::from_micros(ends.saturating_sub(microseconds_now()));
        // The clock may have been set.
        self.spawn_grace(id, ends, left.min(self.settings().mount_grace));
    }

    fn spawn_grace(self: &Arc<Self>, id: DiskSequence, ends: u64, left: Duration) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(left).await;
            engine.end_unmounted(id, ends).await;
        });
    }

    async fn end_unmounted(self: &Arc<Self>, id: DiskSequence, ends: u64) {
        let Ok(alone) = self.lock_device(id).await else { return };
        let Some(attachment) = self.find(id).filter(|found| found.state == State::Attached) else { return };
        let ends_now = |lifetime, grace_ends| lifetime == Lifetime::Mount && grace_ends == Some(ends);
        if attachment.ownership.as_ref().is_some_and(|owner| ends_now(owner.lifetime, owner.grace_ends)) {
            self.detach_lazily(&attachment, "detached, since it was not mounted in time", alone).await;
        }
    }

    /// Ends an attachment with the lifetime `mount` after its last mount; returns whether it does.
    pub(super) async fn end_with_last_mount(self: &Arc<Self>, id: DiskSequence) -> bool {
        let Ok(alone) = self.lock_device(id).await else { return false };
        // It may have been mounted again.
        let is_over = {
            let state = self.state();
            state.records.get(&id).is_some_and(|record| record.has_lost_last_mount(&state.mounts))
        };
        match self.find(id).filter(|_| is_over) {
            Some(attachment) => {
                self.detach_lazily(&attachment, "detached with its last mount", alone).await;
                true
            }
            None => false,
        }
    }

    pub(super) fn spawn_end_with_last_mount(self: &Arc<Self>, id: DiskSequence) {
        let engine = Arc::clone(self);
        tokio::spawn(async move { engine.end_with_last_mount(id).await });
    }
}
