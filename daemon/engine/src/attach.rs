//! From an order to an attachment. Whatever fails on the way undoes the steps before it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use loopd_common::{Error, ErrorKind, Lifetime, Overlap, State};
use tokio::time::Instant;
use tracing::info;

use super::attachment::{Record, Stage};
use super::restore::{Announcement, Phase};
use super::{AttachRequest, ClientId, Engine, Event, Ownership, Snapshot};
use crate::kernel::{Attached, DiskSequence, Kernel, Partitioning, ScanReason};
use loopd_common::text::printable;

/// The most partitions of one device: its minor numbers have eight bits for them.
const MOST_PARTITIONS: usize = 255;

/// Whoever asked, as far as the engine has to know.
pub trait Caller: Send + Sync {
    /// Its connection.
    fn client(&self) -> &ClientId;
    /// Its uid.
    fn uid(&self) -> u32;
    /// Whether it has vanished. Whoever calls is watched from before until after the call.
    fn is_disconnected(&self) -> bool;
    /// Resolves when it vanishes.
    fn disconnected(&self) -> impl Future<Output = ()> + Send;
}

/// A file and what to make of it.
pub struct Order<F> {
    /// The open file.
    pub file: F,
    /// The checked options.
    pub request: AttachRequest,
}

impl<K: Kernel> Engine<K> {
    /// Attaches the file, or gives back what it is attached to where the request wants that; returns when
    /// the attachment is what the request asks for, and was told to the world.
    ///
    /// # Errors
    /// Those of the contract. Nothing is left attached then, but for what is still in use, which
    /// goes with its last user.
    pub async fn attach(
        self: &Arc<Self>,
        order: Order<K::File>,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        if order.request.overlap == Overlap::Allow {
            return self.attach_anew(order, caller).await;
        }
        let (_alone, reused) = self.mind_overlap(&order.file, &order.request, caller).await?;
        match reused {
            Some(reused) => Ok(reused),
            None => self.attach_anew(order, caller).await,
        }
    }

    async fn attach_anew(
        self: &Arc<Self>,
        order: Order<K::File>,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        let permit = self.attachments_of_a_uid.acquire(caller.uid())?;
        if caller.is_disconnected() {
            return Err(abandoned());
        }
        // Until it is written down whose it is, a mark tells that it is nobody else's. One that goes with
        // us needs none.
        let announced = match order.request.lifetime {
            Lifetime::Persistent => Some(self.keeper.announce()?),
            _ => None,
        };
        let mark = announced.as_ref().map_or(0, Announcement::mark);
        let request = AttachRequest { mark, untrusted: caller.uid() != 0, ..order.request };
        let attached = self.attach_marked(order.file, &request, caller, permit).await;
        // Not if this future is dropped: the kernel may still be making the device.
        if let Some(announced) = announced {
            self.keeper.retract(announced);
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
        match settled.and_then(|()| self.keep(id, Phase::Attached)) {
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
        self.displace(device.number);
        let mut state = self.state();
        let seen = state.seen(device.number, None, device.disk_sequence);
        let (processed, file_system) =
            (seen.is_some(), seen.map(|found| found.file_system.clone()).unwrap_or_default());
        let id = state.insert(Record {
            device,
            ownership: Some(ownership),
            state: State::Attached,
            file_system,
            partitions: BTreeMap::new(),
            unprocessed: 0,
            partitioned: !partitioning.missing,
            partitioning: Arc::default(),
            hold,
            // Who vanishes from now on is found by `client_disconnected`.
            stage: Stage::Pending { client: caller.client().clone(), abandoned: caller.is_disconnected() },
            processed,
            node_made,
            changed: Arc::default(),
            operation: Arc::default(),
            replacing: false,
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
        if self.look_whether_gone(id) {
            return Err(detached_meanwhile(id));
        }
        let waits = request.wait && self.kernel.udev_runs();
        if waits || partitions_missing {
            self.keep(id, Phase::Attaching)?;
        }
        let deadline = Instant::now() + self.settings().wait_for_udev;
        if partitions_missing {
            if waits {
                // udev answers our close of the device with BLKRRPART, which would drop the
                // partitions that we add: that is over once it has processed the device.
                self.await_udev(id, deadline, |record| record.processed).await?;
            }
            let made = self.look_at_partitions(id, ScanReason::Changed);
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

    /// Waits until udev has done what `done` asks for.
    pub(super) async fn await_udev(
        &self,
        id: DiskSequence,
        deadline: Instant,
        done: impl Fn(&Record<K>) -> bool,
    ) -> Result<(), Error> {
        loop {
            let Some(changed) = self.state().records.get(&id).map(|record| Arc::clone(&record.changed))
            else {
                return Err(detached_meanwhile(id));
            };
            let woken = changed.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            match self.state().records.get(&id) {
                None => return Err(detached_meanwhile(id)),
                Some(record) if record.is_abandoned() => return Err(abandoned()),
                Some(record) if done(record) => return Ok(()),
                Some(_) => {}
            }
            if tokio::time::timeout_at(deadline, woken).await.is_err() {
                return Err(self.udev_is_late(id));
            }
        }
    }

    fn udev_is_late(&self, id: DiskSequence) -> Error {
        let state = self.state();
        let record = state.records.get(&id);
        let node = record.map(|record| record.device.node()).unwrap_or_default();
        let waited = self.settings().wait_for_udev.as_secs_f32();
        let remedy = if record.is_some_and(Record::is_published) {
            "look at systemd-udevd"
        } else {
            "so it was detached again; look at systemd-udevd, or attach with wait=false"
        };
        Error::new(ErrorKind::Timeout, format!("udev did not process {node} within {waited} s; {remedy}"))
    }

    /// Shows the attachment to the world, unless it ended meanwhile.
    async fn publish(self: &Arc<Self>, id: DiskSequence) -> Result<Snapshot, Error> {
        let shown = {
            let mut guard = self.state();
            let state = &mut *guard;
            let Some(record) = state.records.get_mut(&id) else { return Err(detached_meanwhile(id)) };
            if record.is_abandoned() {
                None
            } else {
                record.stage = Stage::Published;
                record.note_mounts(&state.mounts);
                let snapshot = state.records.get(&id).map(|record| record.snapshot(id, &state.mounts));
                if let Some(snapshot) = &snapshot {
                    self.tell(Event::Added(Box::new(snapshot.clone())));
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
        self.let_go(id).await;
        let still_used = {
            let mut state = self.state();
            let Some(record) = state.records.get_mut(&id) else { return };
            // Someone else has it open: what remains is shown for as long as it lasts.
            record.state = State::Detaching;
            record.stage = Stage::Published;
            state.records.get(&id).map(|record| record.snapshot(id, &state.mounts))
        };
        if let Some(snapshot) = still_used {
            self.tell(Event::Added(Box::new(snapshot)));
        }
    }
}

fn abandoned() -> Error {
    Error::new(
        ErrorKind::AccessDenied,
        "the client vanished, or loopd was asked to end, before the device was ready, so it was detached again",
    )
}

fn detached_meanwhile(id: DiskSequence) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "the device with disk sequence {id} was detached by another program before it was ready; try again"
        ),
    )
}

pub(super) fn microseconds_now() -> u64 {
    #[cfg(test)]
    if let Some(simulated) = crate::tests::clock::microseconds() {
        return simulated;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// One line for the administrator.
pub(super) fn audit(what: &str, attachment: &Snapshot) {
    let ownership = attachment.ownership.as_ref();
    info!(
        device = attachment.device.node(),
        disk_sequence = attachment.id.0,
        uid = ownership.map(|ownership| ownership.uid),
        file = printable(&attachment.device.backing_file),
        lifetime = ownership.map(|ownership| ownership.lifetime.as_str()),
        "{what}"
    );
}
