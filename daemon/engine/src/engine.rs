//! The engine: its state, and how the state is read and published.
//!
//! Lock order. No task waits for one of these while it holds a later one:
//!
//! 1. `file_locks`, for requests that check overlaps; `last_look`, for lists of all devices.
//! 2. The device: `Record::operation`.
//! 3. `mount_locks`: one mount of a file at a time.
//! 4. `status_locks` of a number, then `Record::partitioning`. The wait of a caller has a timeout.
//! 5. `state`, a plain mutex for a few lines, never held across an await. Under it only the lock of
//!    the mount directories is taken. No file is written under it: see [`EventStream`].
//!
//! `unlocking` is taken before all of them, and never waited for.
//!
//! Cancel safety. The future of an operation that changes something must not be dropped: kernel calls run to
//! their end in a thread, and the operation records or undoes their results. To cancel it there are
//! [`Engine::abort_calls`] and [`Caller::disconnected`](crate::Caller::disconnected). Only the daemon's death
//! drops it, and the next daemon undoes what it has left.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::client::ClientId;
use crate::error::Error;
use crate::event::Event;
use crate::event_stream::EventStream;
use crate::hearing::Hearing;
use crate::kernel::{DiskSequence, FileFacts, FileIdentity, Kernel, ProbeResult};
use crate::keyed_mutex::KeyedMutex;
use crate::limiter::Background;
use crate::mount_directories::MountDirectories;
use crate::mount_table::MountTable;
use crate::mounter::Mounter;
use crate::pacing::Pacing;
use crate::quota::{Permit, Quota};
use crate::record::Record;
use crate::records::Records;
use crate::saved::{SavedAttachment, Store};
use crate::scan_queue::ScanQueue;
use crate::settings::Settings;
use crate::snapshot::Snapshot;
use crate::state_writer::StateWriter;
use crate::unlocker::Unlocker;
use crate::volume::VolumeId;

/// The attachments of this machine.
pub struct Engine<K: Kernel> {
    pub(super) kernel: Arc<K>,
    settings: Mutex<Settings>,
    state: Mutex<Attachments<K>>,
    events: mpsc::UnboundedSender<Event>,
    pub(super) attachment_quota: Quota,
    pub(super) partition_quota: Quota,
    pub(super) mount_quota: Quota,
    pub(super) cleartext_quota: Quota,
    pub(super) mounter: Box<dyn Mounter>,
    pub(super) unlocker: Box<dyn Unlocker<K::File>>,
    pub(super) mount_directories: MountDirectories,
    /// Closed when calls are aborted. Unlike `watch`, it wakes those that wait in an order that a seed repeats.
    pub(super) ending: Semaphore,
    /// One attach of a file at a time, among the requests that check overlaps.
    pub(super) file_locks: KeyedMutex<FileIdentity>,
    /// One mount of a file at a time: see [`Kernel::claim_overlapping`].
    pub(super) mount_locks: KeyedMutex<FileIdentity>,
    /// One unlock of a volume at a time. Nobody waits for it.
    pub(super) unlocking: KeyedMutex<VolumeId>,
    /// One look at all devices at a time: when the last one has begun.
    pub(super) last_look: tokio::sync::Mutex<Option<Instant>>,
    /// One scan of a number at a time: it may hang.
    pub(super) status_locks: KeyedMutex<u32>,
    pub(super) scans: ScanQueue,
    pub(super) background: Background,
    pub(super) pacing: Pacing,
    pub(super) state_writer: Arc<StateWriter>,
    /// The attachments that could not be adopted at the start, by number.
    pub(super) pending: Mutex<HashMap<u32, Pending>>,
}

/// The state behind the engine's lock.
pub(super) struct Attachments<K: Kernel> {
    /// In the order of the attaches, so that an operation on several of them has a defined order.
    pub(super) records: Records<K>,
    /// The current attachment on a number.
    pub(super) by_number: BTreeMap<u32, DiskSequence>,
    /// udev's last result for each device and partition: its event may arrive before the record is made.
    pub(super) processed: BTreeMap<(u32, Option<u32>), (DiskSequence, ProbeResult)>,
    pub(super) mounts: MountTable,
    pub(super) hearing: Hearing,
    /// The clients that an attachment may end with: a disconnect of any other client needs no search.
    pub(super) clients: HashSet<ClientId>,
}

/// An attachment of the last daemon whose device could not be read.
pub(super) struct Pending {
    pub(super) saved: SavedAttachment,
    /// Counts against its owner's limit.
    pub(super) permit: Permit,
}

impl<K: Kernel> Engine<K> {
    /// An engine without attachments, and the events that it will emit.
    pub fn new(
        kernel: K,
        settings: Settings,
        store: Box<dyn Store>,
        mounter: Box<dyn Mounter>,
        unlocker: Box<dyn Unlocker<K::File>>,
    ) -> (Arc<Self>, EventStream) {
        let (events, receiver) = mpsc::unbounded_channel();
        let state_writer = Arc::new(StateWriter::new(store));
        let stream = EventStream::new(receiver, Arc::clone(&state_writer));
        let engine = Self {
            kernel: Arc::new(kernel),
            attachment_quota: Quota::new(
                "attachments",
                "detach one that is not needed",
                settings.attachments,
            ),
            partition_quota: Quota::new(
                "partitions",
                "detach an image that is not needed, or attach without partitions (partition-scan=false)",
                settings.partitions,
            ),
            mount_quota: Quota::new("file systems mounted", "unmount one", settings.mounts),
            cleartext_quota: Quota::new("unlocked volumes", "lock one", settings.cleartexts),
            mounter,
            unlocker,
            mount_directories: MountDirectories::default(),
            ending: Semaphore::new(0),
            settings: Mutex::new(settings),
            file_locks: KeyedMutex::default(),
            mount_locks: KeyedMutex::default(),
            unlocking: KeyedMutex::default(),
            last_look: tokio::sync::Mutex::default(),
            status_locks: KeyedMutex::default(),
            scans: ScanQueue::default(),
            background: Background::default(),
            pacing: Pacing::default(),
            state: Mutex::new(Attachments {
                records: Records::new(),
                by_number: BTreeMap::new(),
                processed: BTreeMap::new(),
                mounts: MountTable::default(),
                hearing: Hearing::default(),
                clients: HashSet::new(),
            }),
            events,
            state_writer,
            pending: Mutex::default(),
        };
        (Arc::new(engine), stream)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, Attachments<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current settings.
    pub fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the settings; applies to subsequent requests only.
    pub fn configure(&self, settings: Settings) {
        self.attachment_quota.set_limits(settings.attachments);
        self.partition_quota.set_limits(settings.partitions);
        self.mount_quota.set_limits(settings.mounts);
        self.cleartext_quota.set_limits(settings.cleartexts);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    pub(super) fn emit(&self, event: Event) {
        // There is no receiver once the daemon stops.
        let _nobody_listens = self.events.send(event);
    }

    /// Waits until there are no owned attachments, not even ones that are being detached, and no mount directories.
    pub async fn nothing_attached(&self) {
        loop {
            self.mount_quota.empty().await;
            self.attachment_quota.empty().await;
            if self.mount_quota.is_empty() {
                return;
            }
        }
    }

    /// Waits until all events emitted so far have been saved and published on the bus.
    pub async fn flush_events(&self) {
        let (done, handled) = oneshot::channel();
        self.emit(Event::Checkpoint(done));
        let _daemon_stops = handled.await;
    }

    /// Examines a file. See [`Kernel::examine`].
    ///
    /// # Errors
    /// `InvalidBackingFile`.
    pub async fn examine(&self, file: &K::File) -> Result<FileFacts, Error> {
        self.kernel.examine(file).await
    }

    /// The number of a free device. See [`Kernel::free_number`].
    ///
    /// # Errors
    /// `NoFreeDevice`.
    pub async fn free_number(&self) -> Result<u32, Error> {
        self.kernel.free_number().await
    }

    /// Removes a device that nothing is attached to. See [`Kernel::remove_device`].
    ///
    /// # Errors
    /// `NotFound`, `Busy`.
    pub async fn remove_device(&self, number: u32) -> Result<(), Error> {
        self.kernel.remove_device(number).await
    }

    /// All published attachments, by number.
    #[must_use]
    pub fn list(&self) -> Vec<Snapshot> {
        self.listed(Record::snapshot)
    }

    /// The same, without their partitions.
    #[must_use]
    pub fn outlines(&self) -> Vec<Snapshot> {
        self.listed(Record::outline)
    }

    fn listed(&self, show: impl Fn(&Record<K>, DiskSequence, &MountTable) -> Snapshot) -> Vec<Snapshot> {
        let state = self.state();
        let mut list: Vec<Snapshot> = state
            .records
            .iter()
            .filter(|(_, record)| record.is_published())
            .map(|(id, record)| show(record, *id, &state.mounts))
            .collect();
        drop(state);
        list.sort_unstable_by_key(|snapshot| snapshot.device.number);
        list
    }

    /// The attachment with this identity.
    #[must_use]
    pub fn find(&self, id: DiskSequence) -> Option<Snapshot> {
        let state = self.state();
        let record = state.records.get(&id).filter(|record| record.is_published())?;
        Some(record.snapshot(id, &state.mounts))
    }

    /// The same, without its partitions.
    #[must_use]
    pub fn outline(&self, id: DiskSequence) -> Option<Snapshot> {
        let state = self.state();
        let record = state.records.get(&id).filter(|record| record.is_published())?;
        Some(record.outline(id, &state.mounts))
    }
}

impl<K: Kernel> Attachments<K> {
    pub(super) fn insert(&mut self, record: Record<K>) -> DiskSequence {
        let id = record.device.disk_sequence;
        self.clients.extend(record.client().cloned());
        self.by_number.insert(record.device.number, id);
        self.records.insert(id, record);
        id
    }

    /// udev's result for a partition of this attach. It is kept: the partition may be made again.
    pub(super) fn seen(&self, number: u32, partition: u32, sequence: DiskSequence) -> Option<&ProbeResult> {
        let seen = self.processed.get(&(number, Some(partition)));
        seen.filter(|(seen, _)| *seen == sequence).map(|(_, found)| found)
    }

    /// Forgets udev's results for a device and its partitions.
    pub(super) fn forget_seen(&mut self, number: u32) {
        let of_number = self.processed.range((number, None)..=(number, Some(u32::MAX)));
        let keys: Vec<_> = of_number.map(|(key, _)| *key).collect();
        keys.iter().for_each(|key| drop(self.processed.remove(key)));
    }

    /// Takes udev's result for the device of this attach: its record keeps it from now on.
    pub(super) fn take_seen(&mut self, number: u32, sequence: Option<DiskSequence>) -> Option<ProbeResult> {
        let device = (number, None);
        let is_of_attach = self.processed.get(&device).is_some_and(|(seen, _)| Some(*seen) == sequence);
        if is_of_attach { self.processed.remove(&device).map(|(_, found)| found) } else { None }
    }

    pub(super) fn remove(&mut self, id: DiskSequence) -> Option<Record<K>> {
        let record = self.records.remove(&id)?;
        if self.by_number.get(&record.device.number) == Some(&id) {
            self.by_number.remove(&record.device.number);
        }
        record.changed.notify_waiters();
        Some(record)
    }
}
