//! What the daemon is for: attachments, their owners, their lifetimes, their ends.
//!
//! Knows no D-Bus, no ioctl, no polkit. The state stands behind one lock that is never held across
//! an await; operations on one device follow each other behind that device's own lock.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use loopd_common::{Error, ErrorKind};
use tokio::sync::{mpsc, oneshot, watch};

mod attach;
mod attachment;
mod change;
mod detach;
mod ext_journal;
pub mod kernel;
mod lifetime;
mod looks;
mod mount;
mod mount_name;
mod mount_place;
mod mount_plan;
pub mod mount_table;
mod observe;
mod overlap;
mod ownership;
mod pacing;
mod partition;
mod quota;
mod request;
mod restore;
#[cfg(any(test, feature = "sim"))]
pub mod simulated;
mod superblock;
#[cfg(test)]
mod tests;
mod turns;

pub use attach::{Caller, Order};
pub use attachment::{Changes, ClientId, Ownership, PartitionSnapshot, Snapshot};
pub use mount::{Account, BoxFuture, MountCommand, Mounter, VolumeId};
pub use mount_name::{LONGEST_ESCAPED_NAME, safe_name};
pub use mount_place::MountDirectory;
pub use mount_plan::Policy;
pub use observe::Uevent;
pub use ownership::is_root;
pub use quota::{Limits, Permit, Quota};
pub use request::{AttachRequest, MountRequest, is_block_size};
pub use restore::{Phase, SavedAttachment, Store};

use crate::kernel::{DiskSequence, FileIdentity, Kernel, ProbeResult, node};
use crate::mount_table::MountTable;
use attachment::Record;
use turns::Background;
pub use turns::KeyedMutex;

/// Times and bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long `SetupLoop` waits for udev.
    pub wait_for_udev: Duration,
    /// How long `Detach` waits for a passing user of the device, such as a probe of udev.
    pub wait_for_users: Duration,
    /// How long the daemon stays with nothing attached and no call; zero is for ever.
    pub idle_exit: Duration,
    /// How long the service manager may take to mount or unmount.
    pub wait_for_mount: Duration,
    /// How long what ends with its last mount waits for the first one, once its client is gone.
    pub mount_grace: Duration,
    /// What may be mounted.
    pub mounting: Policy,
    /// Attachments.
    pub attachments: Limits,
    /// Partitions of attachments.
    pub partitions: Limits,
    /// File systems that somebody has had mounted.
    pub mounts: Limits,
    /// Calls that are under way at once.
    pub calls: Limits,
    /// Prompts that are open at once.
    pub prompts: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // Below the 25 s after which libdbus and sd-bus give a call up.
            wait_for_udev: Duration::from_secs(20),
            wait_for_users: Duration::from_secs(1),
            idle_exit: Duration::from_secs(60),
            wait_for_mount: Duration::from_secs(20),
            mount_grace: Duration::from_secs(60),
            mounting: Policy::default(),
            attachments: Limits { each: 128, all: 1600 },
            partitions: Limits { each: 1024, all: 8192 },
            mounts: Limits { each: 64, all: 800 },
            calls: Limits { each: 32, all: 256 },
            prompts: Limits { each: 4, all: 32 },
        }
    }
}

/// What the world is told.
#[derive(Debug)]
pub enum Event {
    /// An attachment is there.
    Added(Box<Snapshot>),
    /// Something about it is different.
    Changed(Box<Changes>),
    /// It is gone.
    Removed(DiskSequence),
    /// Everything before this was said: see [`Engine::told`].
    Checkpoint(oneshot::Sender<()>),
}

/// The attachments of this machine.
pub struct Engine<K: Kernel> {
    kernel: Arc<K>,
    settings: Mutex<Settings>,
    state: Mutex<Attachments<K>>,
    events: mpsc::UnboundedSender<Event>,
    attachments_of_a_uid: Quota,
    partitions_of_a_uid: Quota,
    mounts_of_a_uid: Quota,
    mounter: Box<dyn Mounter>,
    places: mount_place::MountDirectories,
    /// Whether calls are given up.
    ending: watch::Sender<bool>,
    /// One attach of a file at a time, among those that mind the others.
    file_locks: KeyedMutex<FileIdentity>,
    /// One mount of a file at a time: see [`Kernel::claim_overlapping`].
    mount_locks: KeyedMutex<FileIdentity>,
    /// One look at a number at a time: it may hang.
    looks: KeyedMutex<u32>,
    looks_asked_for: looks::Looks,
    background: Background,
    pacing: pacing::Pacing,
    keeper: restore::Keeper,
    /// What could not be taken up at the start, by number.
    waiting: Mutex<HashMap<u32, restore::Waiting>>,
}

/// The state behind the engine's lock.
struct Attachments<K: Kernel> {
    /// In the order of the attaches, so that what happens to several of them has an order too.
    records: BTreeMap<DiskSequence, Record<K>>,
    /// The attachment that a number stands for now.
    by_number: HashMap<u32, DiskSequence>,
    /// What udev last processed of each device and partition: its event may come before the record
    /// is made.
    processed: HashMap<(u32, Option<u32>), (DiskSequence, ProbeResult)>,
    mounts: MountTable,
    /// The clients that something may end with: each end of any other is over with one look.
    clients: HashSet<ClientId>,
}

impl<K: Kernel> Engine<K> {
    /// An engine that knows of no attachment yet, and the events that it will tell.
    pub fn new(
        kernel: K,
        settings: Settings,
        store: Box<dyn Store>,
        mounter: Box<dyn Mounter>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let engine = Self {
            kernel: Arc::new(kernel),
            attachments_of_a_uid: Quota::new(
                "attachments",
                "detach one that is not needed",
                settings.attachments,
            ),
            partitions_of_a_uid: Quota::new(
                "partitions",
                "detach an image that is not needed, or attach without partitions (partition-scan=false)",
                settings.partitions,
            ),
            mounts_of_a_uid: Quota::new("file systems mounted", "unmount one", settings.mounts),
            mounter,
            places: mount_place::MountDirectories::default(),
            ending: watch::Sender::new(false),
            settings: Mutex::new(settings),
            file_locks: KeyedMutex::default(),
            mount_locks: KeyedMutex::default(),
            looks: KeyedMutex::default(),
            looks_asked_for: looks::Looks::default(),
            background: Background::default(),
            pacing: pacing::Pacing::default(),
            state: Mutex::new(Attachments {
                records: BTreeMap::new(),
                by_number: HashMap::new(),
                processed: HashMap::new(),
                mounts: MountTable::default(),
                clients: HashSet::new(),
            }),
            events,
            keeper: restore::Keeper::new(store),
            waiting: Mutex::default(),
        };
        (Arc::new(engine), receiver)
    }

    fn state(&self) -> MutexGuard<'_, Attachments<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The times and bounds that hold now.
    pub fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has other times and bounds hold for what is asked from now on.
    pub fn configure(&self, settings: Settings) {
        self.attachments_of_a_uid.set_limits(settings.attachments);
        self.partitions_of_a_uid.set_limits(settings.partitions);
        self.mounts_of_a_uid.set_limits(settings.mounts);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    fn tell(&self, event: Event) {
        self.keeper.follow(&event);
        // There is nobody to tell once the daemon stops.
        let _nobody_listens = self.events.send(event);
    }

    /// Resolves when no attachment is ours, not even one that is being detached, and no mount point.
    pub async fn nothing_attached(&self) {
        loop {
            self.mounts_of_a_uid.empty().await;
            self.attachments_of_a_uid.empty().await;
            if self.mounts_of_a_uid.is_empty() {
                return;
            }
        }
    }

    /// Resolves when every event so far was handled by whoever receives them.
    pub async fn flush_events(&self) {
        let (done, handled) = oneshot::channel();
        self.tell(Event::Checkpoint(done));
        let _daemon_stops = handled.await;
    }

    /// Looks at a file. See [`Kernel::examine`].
    ///
    /// # Errors
    /// `InvalidBackingFile`.
    pub async fn examine(&self, file: &K::File) -> Result<kernel::FileFacts, Error> {
        self.kernel.examine(file).await
    }

    /// A number that nothing is attached to. See [`Kernel::free_number`].
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

    /// Every attachment that the world was told of, by number.
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

    /// What is attached to this number, without its partitions, after a look whether that is still so.
    ///
    /// # Errors
    /// `NotFound` where nothing is; `Timeout` where its backing file hangs, and nothing is known of it
    /// yet; `Kernel` where its state cannot be read.
    pub async fn locate(self: &Arc<Self>, number: u32) -> Result<Snapshot, Error> {
        let known = self.state().by_number.get(&number).copied();
        if !known.is_some_and(|id| self.is_current(id, self.kernel.peek(number).bound)) {
            self.refresh_in_time(number).await?;
        }
        let id = self.state().by_number.get(&number).copied();
        id.and_then(|id| self.outline(id)).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("nothing is attached to {}", node(number)))
        })
    }
}

impl<K: Kernel> Attachments<K> {
    fn insert(&mut self, record: Record<K>) -> DiskSequence {
        let id = record.device.disk_sequence;
        self.clients.extend(record.client().cloned());
        self.by_number.insert(record.device.number, id);
        self.records.insert(id, record);
        id
    }

    /// What udev said of a device or partition of this attach.
    fn seen(&self, number: u32, partition: Option<u32>, sequence: DiskSequence) -> Option<&ProbeResult> {
        let seen = self.processed.get(&(number, partition));
        seen.filter(|(seen, _)| *seen == sequence).map(|(_, found)| found)
    }

    fn remove(&mut self, id: DiskSequence) -> Option<Record<K>> {
        let record = self.records.remove(&id)?;
        if self.by_number.get(&record.device.number) == Some(&id) {
            self.by_number.remove(&record.device.number);
        }
        record.changed.notify_waiters();
        Some(record)
    }
}
