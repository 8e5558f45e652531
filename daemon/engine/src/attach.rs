//! Attaches a file. A step that fails undoes the steps before it.

use std::collections::BTreeMap;
use std::sync::Arc;

use loopd_common::{Lifetime, Overlap};
use tokio::time::Instant;

use crate::client::Caller;
use crate::clock::microseconds_now;
use crate::engine::Engine;
use crate::error::Error;
use crate::event::Event;
use crate::kernel::{Attached, DiskSequence, Kernel, Partitioning, ScanReason};
use crate::lifecycle::Lifecycle;
use crate::operation::audit;
use crate::ownership::{Ownership, is_root};
use crate::record::Record;
use crate::request::AttachRequest;
use crate::saved::Phase;
use crate::snapshot::Snapshot;
use crate::state_writer::Announcement;

/// The most partitions of one device: its minor numbers have eight bits for them.
const MOST_PARTITIONS: usize = 255;

impl<K: Kernel> Engine<K> {
    /// Attaches the file, or returns an existing attachment if the request allows that. Returns when the
    /// attachment is as requested, and its event was emitted.
    ///
    /// # Errors
    /// Those of the contract. The device is detached again, at its last close if it is in use.
    pub async fn attach(
        self: &Arc<Self>,
        file: K::File,
        request: AttachRequest,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        let _alone_with_file = match request.overlap {
            Overlap::Allow => None,
            Overlap::Refuse | Overlap::Reuse => match self.resolve_overlap(&file, &request, caller).await? {
                (_, Some(reused)) => return Ok(reused),
                (alone, None) => Some(alone),
            },
        };
        let permit = self.attachment_quota.acquire(caller.uid())?;
        if caller.is_disconnected() {
            return Err(Error::AttachAbandoned);
        }
        // A persistent device carries a mark until its state file exists, so that a restarted daemon can
        // recognize and detach it. Autoclear devices end with the daemon and need no mark.
        let announced = match request.lifetime {
            Lifetime::Persistent => Some(self.state_writer.announce()?),
            _ => None,
        };
        let mark = announced.as_ref().map_or(0, Announcement::mark);
        let request = AttachRequest { mark, untrusted: !is_root(caller.uid()), ..request };
        let attached = self.attach_marked(file, &request, caller, permit).await;
        // Not if this future is dropped: the kernel may still be making the device.
        if let Some(announced) = announced {
            self.state_writer.retract(announced);
        }
        attached
    }

    async fn attach_marked(
        self: &Arc<Self>,
        file: K::File,
        request: &AttachRequest,
        caller: &impl Caller,
        permit: super::Permit,
    ) -> Result<Snapshot, Error> {
        let begun = microseconds_now();
        let attach = self.kernel.attach(file, request);
        let devices = |attached: Option<&Attached<K>>| {
            1 + attached.map_or(0, |attached| attached.partitioning.partitions.len())
        };
        let attached = self.pacing.make(caller.uid(), attach, devices).await?;
        let partitioning = attached.partitioning.clone();
        let id = self.record(attached, request, caller, permit);
        let settled = match self.take_partitions(id, &partitioning) {
            Ok(()) => self.settle(id, request, partitioning.missing, caller.uid(), begun).await,
            Err(error) => Err(error),
        };
        match settled.and_then(|()| self.save(id, Phase::Attached)) {
            Ok(()) => self.publish(id).await,
            Err(error) => {
                self.discard(id).await;
                Err(error)
            }
        }
    }

    /// Records the attachment, not published, as soon as the kernel has made it.
    fn record(
        self: &Arc<Self>,
        attached: Attached<K>,
        request: &AttachRequest,
        caller: &impl Caller,
        permit: super::Permit,
    ) -> DiskSequence {
        let Attached { device, hold, claim, node_made, partitioning, file_end } = attached;
        let client = (request.lifetime != Lifetime::Persistent).then(|| caller.client().clone());
        let ownership = Ownership::new(caller.uid(), client, request.lifetime);
        // The previous attachment on this number has ended.
        self.reconcile(device.number, None);
        let mut state = self.state();
        let seen = state.take_seen(device.number, Some(device.disk_sequence));
        let (processed, file_system) = (seen.is_some(), seen.unwrap_or_default().file_system);
        let id = state.insert(Record {
            device,
            ownership: Some(ownership),
            // A client that disconnects from now on is found by `client_disconnected`.
            lifecycle: Lifecycle::Attaching {
                client: caller.client().clone(),
                cancelled: caller.is_disconnected(),
            },
            file_system,
            partitions: BTreeMap::new(),
            cleartexts: BTreeMap::new(),
            findings: partitioning.findings,
            file_end,
            silence: None,
            unprocessed: 0,
            partitioned: !partitioning.missing,
            unmade: false,
            partitioning: Arc::default(),
            hold,
            processed,
            node_made,
            changed: Arc::default(),
            operation: Arc::default(),
            changes: 0,
            permit: Some(permit),
            partition_permit: None,
        });
        drop(claim);
        id
    }

    /// Waits until the attachment can be published.
    async fn settle(
        self: &Arc<Self>,
        id: DiskSequence,
        request: &AttachRequest,
        partitions_missing: bool,
        uid: u32,
        begun: u64,
    ) -> Result<(), Error> {
        // Events of a claimed number are ignored: one of them may have been the end of this attachment.
        if self.reap_if_gone(id) {
            return Err(Error::DetachedByOthers { id });
        }
        let waits = request.wait && self.kernel.udev_runs();
        if waits || partitions_missing {
            self.save(id, Phase::Attaching)?;
        }
        let deadline = Instant::now() + self.settings().wait_for_udev;
        if partitions_missing {
            if waits {
                // After loopd has closed the device udev issues BLKRRPART, which would drop the partitions that
                // are added now. It has done so when it has processed the device.
                self.await_udev(id, begun, deadline, |record| record.processed).await?;
            }
            let made = self.scan_partitions(id, ScanReason::Changed);
            // If there are too many, they were made before the error.
            let count =
                |made: Option<&Partitioning>| made.map_or(MOST_PARTITIONS, |made| made.partitions.len());
            self.pacing.make(uid, made, count).await?;
        }
        if waits {
            self.await_udev(id, begun, deadline, Record::is_processed).await?;
        }
        Ok(())
    }

    /// Publishes the attachment, unless it has ended.
    async fn publish(self: &Arc<Self>, id: DiskSequence) -> Result<Snapshot, Error> {
        let shown = {
            let mut guard = self.state();
            let state = &mut *guard;
            let Some(record) = state.records.get_mut(&id) else { return Err(Error::DetachedByOthers { id }) };
            (!record.lifecycle.is_cancelled()).then(|| {
                record.lifecycle = Lifecycle::Attached;
                record.note_mounts(&state.mounts);
                let snapshot = record.snapshot(id, &state.mounts);
                self.emit(Event::Added(Box::new(snapshot.clone())));
                snapshot
            })
        };
        let Some(snapshot) = shown else {
            self.discard(id).await;
            return Err(Error::AttachAbandoned);
        };
        audit("attached", &snapshot);
        Ok(snapshot)
    }

    /// Undoes an attach that was not published.
    pub(super) async fn discard(self: &Arc<Self>, id: DiskSequence) {
        self.release(id).await;
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(record) = state.records.get_mut(&id) else { return };
        // Another process has it open: it is published until its last close.
        record.lifecycle = Lifecycle::Detaching;
        record.note_mounts(&state.mounts);
        self.emit(Event::Added(Box::new(record.snapshot(id, &state.mounts))));
    }
}
