//! The lifetime `mount`: an attachment ends with the last mount of its device or of a partition, by
//! whomever it was unmounted. Until the first one it belongs to its client, whom it survives for a while.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::attach::microseconds_now;
use super::attachment::Record;
use super::{ClientId, Engine};
use crate::kernel::{DiskSequence, Kernel};
use crate::mount_table::MountTable;

impl<K: Kernel> Record<K> {
    /// Takes notice of where it is mounted; says whether it has just ended with its last mount.
    pub fn note_mounts(&mut self, mounts: &MountTable) -> bool {
        let is_mounted = self.is_mounted(mounts);
        let is_attached = self.state == State::Attached;
        let Some(ownership) = self.ownership.as_mut().filter(|owner| owner.lifetime == Lifetime::Mount)
        else {
            return false;
        };
        if is_mounted {
            ownership.mounted = true;
            ownership.grace_ends = None;
            ownership.client = None;
        }
        is_attached && ownership.mounted && !is_mounted
    }

    fn is_mounted(&self, mounts: &MountTable) -> bool {
        let partitions = self.partitions.values().map(|record| record.partition.node.device_number);
        std::iter::once(self.device.device_number)
            .chain(partitions)
            .any(|device| !mounts.of(device).is_empty())
    }

    /// Whether it waits for its first mount with this client.
    fn awaits_mount_with(&self, client: &ClientId) -> bool {
        let waits = self.ownership.as_ref().is_some_and(|owner| {
            owner.lifetime == Lifetime::Mount && !owner.mounted && owner.client.as_ref() == Some(client)
        });
        waits && self.is_published() && self.state == State::Attached
    }
}

impl<K: Kernel> Engine<K> {
    /// Gives what waits for its first mount, and has lost its client, some time.
    pub(super) fn begin_graces(self: &Arc<Self>, vanished: &ClientId) {
        let waiting: Vec<DiskSequence> = {
            let state = self.state();
            let waiting = state.records.iter().filter(|(_, record)| record.awaits_mount_with(vanished));
            waiting.map(|(id, _)| *id).collect()
        };
        waiting.into_iter().for_each(|id| self.begin_grace(id));
    }

    /// Its client is gone: it stays for a while.
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

    /// Goes on with the time that an earlier daemon has given.
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
            self.detach_lazily(&attachment, "detached, since nobody has mounted it", alone).await;
        }
    }

    /// Ends what has lost its last mount; says whether it did.
    pub(super) async fn end_with_last_mount(self: &Arc<Self>, id: DiskSequence) -> bool {
        let Ok(alone) = self.lock_device(id).await else { return false };
        // It may have been mounted anew.
        let is_over = {
            let mut guard = self.state();
            let state = &mut *guard;
            state.records.get_mut(&id).is_some_and(|record| record.note_mounts(&state.mounts))
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
