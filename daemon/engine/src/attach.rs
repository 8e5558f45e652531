//! Attaching a file. Whatever fails on the way undoes the steps before it.

use std::collections::BTreeMap;
use std::sync::Arc;

use loopd_common::{Error, ErrorKind, Lifetime, Overlap};
use tokio::time::Instant;

use crate::client::Caller;
use crate::engine::Engine;
use crate::event::Event;
use crate::kernel::{Attached, DiskSequence, Kernel, Partitioning, ScanReason};
use crate::lifecycle::Lifecycle;
use crate::operation::{abandoned, audit, detached_meanwhile};
use crate::ownership::{Ownership, is_root};
use crate::record::Record;
use crate::request::AttachRequest;
use crate::saved::Phase;
use crate::snapshot::Snapshot;
use crate::state_writer::Announcement;

/// The most partitions of one device: its minor numbers have eight bits for them.
const MOST_PARTITIONS: usize = 255;

impl<K: Kernel> Engine<K> {
    /// Attaches the file, or gives back what it is attached to where the request wants that; returns when
    /// the attachment is what the request asks for, and was told to the world.
    ///
    /// # Errors
    /// Those of the contract. Nothing is left attached then, but for what is still in use, which
    /// goes with its last user.
    pub async fn attach(
        self: &Arc<Self>,
        file: K::File,
        request: AttachRequest,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        if request.overlap == Overlap::Allow {
            return self.attach_anew(file, request, caller).await;
        }
        let (_alone, reused) = self.resolve_overlap(&file, &request, caller).await?;
        match reused {
            Some(reused) => Ok(reused),
            None => self.attach_anew(file, request, caller).await,
        }
    }

    async fn attach_anew(
        self: &Arc<Self>,
        file: K::File,
        request: AttachRequest,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        let permit = self.attachment_quota.acquire(caller.uid())?;
        if caller.is_disconnected() {
            return Err(abandoned());
        }
        // Until it is written down whose it is, a mark tells that it is nobody else's. One that goes with
        // us needs none.
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
        let attach = self.kernel.attach(file, request);
        let devices = |attached: Option<&Attached<K>>| {
            1 + attached.map_or(0, |attached| attached.partitioning.partitions.len())
        };
        let attached = self.pacing.make(caller.uid(), attach, devices).await?;
        let partitioning = attached.partitioning.clone();
        let id = self.record(attached, request, caller, permit);
        let settled = match self.take_partitions(id, &partitioning) {
            Ok(()) => self.settle(id, request, partitioning.missing, caller.uid()).await,
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

    /// Notes the attachment, unseen by the world, as soon as the kernel has made it.
    fn record(
        self: &Arc<Self>,
        attached: Attached<K>,
        request: &AttachRequest,
        caller: &impl Caller,
        permit: super::Permit,
    ) -> DiskSequence {
        let Attached { device, hold, claim, node_made, partitioning } = attached;
        let client = (request.lifetime != Lifetime::Persistent).then(|| caller.client().clone());
        let ownership = Ownership::new(caller.uid(), client, request.lifetime);
        self.reap_previous(device.number);
        let mut state = self.state();
        let seen = state.seen(device.number, None, device.disk_sequence);
        let (processed, file_system) =
            (seen.is_some(), seen.map(|found| found.file_system.clone()).unwrap_or_default());
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
            unprocessed: 0,
            partitioned: !partitioning.missing,
            partitioning: Arc::default(),
            hold,
            processed,
            node_made,
            changed: Arc::default(),
            operation: Arc::default(),
            permit: Some(permit),
            partition_permit: None,
        });
        drop(claim);
        id
    }

    /// Waits until the attachment may be shown.
    async fn settle(
        self: &Arc<Self>,
        id: DiskSequence,
        request: &AttachRequest,
        partitions_missing: bool,
        uid: u32,
    ) -> Result<(), Error> {
        // Events of a claimed number were passed over: one of them may have been its end.
        if self.reap_if_gone(id) {
            return Err(detached_meanwhile(id));
        }
        let waits = request.wait && self.kernel.udev_runs();
        if waits || partitions_missing {
            self.save(id, Phase::Attaching)?;
        }
        let deadline = Instant::now() + self.settings().wait_for_udev;
        if partitions_missing {
            if waits {
                // udev answers our close of the device with BLKRRPART, which would drop the
                // partitions that we add: that is over once it has processed the device.
                self.await_udev(id, deadline, |record| record.processed).await?;
            }
            let made = self.scan_partitions(id, ScanReason::Changed);
            // It fails for too many as well, which were made then.
            let count =
                |made: Option<&Partitioning>| made.map_or(MOST_PARTITIONS, |made| made.partitions.len());
            self.pacing.make(uid, made, count).await?;
        }
        if waits {
            self.await_udev(id, deadline, Record::is_processed).await?;
        }
        Ok(())
    }

    /// Shows the attachment to the world, unless it ended meanwhile.
    async fn publish(self: &Arc<Self>, id: DiskSequence) -> Result<Snapshot, Error> {
        let shown = {
            let mut guard = self.state();
            let state = &mut *guard;
            let Some(record) = state.records.get_mut(&id) else { return Err(detached_meanwhile(id)) };
            if record.lifecycle.is_cancelled() {
                None
            } else {
                record.lifecycle = Lifecycle::Attached;
                record.note_mounts(&state.mounts);
                let snapshot = state.records.get(&id).map(|record| record.snapshot(id, &state.mounts));
                if let Some(snapshot) = &snapshot {
                    self.emit(Event::Added(Box::new(snapshot.clone())));
                }
                snapshot
            }
        };
        let Some(snapshot) = shown else {
            self.discard(id).await;
            return Err(Error::new(
                ErrorKind::AccessDenied,
                "the client vanished, or loopd was asked to end, before the device was ready",
            ));
        };
        audit("attached", &snapshot);
        Ok(snapshot)
    }

    /// Undoes an attach that the world was not told of.
    pub(super) async fn discard(self: &Arc<Self>, id: DiskSequence) {
        self.release(id).await;
        let still_used = {
            let mut state = self.state();
            let Some(record) = state.records.get_mut(&id) else { return };
            // Someone else has it open: what remains is shown for as long as it lasts.
            record.lifecycle = Lifecycle::Detaching;
            state.records.get(&id).map(|record| record.snapshot(id, &state.mounts))
        };
        if let Some(snapshot) = still_used {
            self.emit(Event::Added(Box::new(snapshot)));
        }
    }
}
