//! What outlives the daemon: written as it happens, taken up by the next one.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_common::{Error, Lifetime, State};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::attach::{audit, microseconds_now};
use super::attachment::{PartitionRecord, Record, Stage};
use super::turns::Limiter;
use super::{ClientId, Engine, Event, MountDirectory, Ownership, Permit, Snapshot};
use crate::kernel::{Change, Device, DiskSequence, FileIdentity, Kernel, Partition, ScanReason, node};

/// How far an attachment has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody was told that it is there.
    Attaching,
    /// It was said to be there.
    Attached,
    /// It goes with its last user.
    Detaching,
}

impl Phase {
    /// The word for it in a file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
        }
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let all = [Self::Attaching, Self::Attached, Self::Detaching];
        all.into_iter().find(|phase| phase.as_str() == word).ok_or_else(|| format!("no phase is {word:?}"))
    }
}

/// What a restart must know of an attachment, and the kernel does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAttachment {
    /// The disk sequence of the attach.
    pub id: DiskSequence,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The disk sequence that the device has now.
    pub disk_sequence: DiskSequence,
    /// Whose it is. Without a client where that one's bus is gone.
    pub ownership: Ownership,
    /// How far it has come.
    pub phase: Phase,
    /// Whether the device node is to be removed with it.
    pub node_made: bool,
    /// The backing file that it gets right now, and a new disk sequence with it.
    pub next_file: Option<FileIdentity>,
}

/// Where it is written: a call returns when it is so, and a daemon that dies meanwhile leaves the old
/// or the new.
pub trait Store: Send + Sync + 'static {
    /// Writes this, in the place of what was written of the same attachment.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write(&self, kept: &SavedAttachment) -> Result<(), Error>;

    /// Forgets an attachment.
    fn erase(&self, id: DiskSequence);

    /// All that was written and not erased. What cannot be understood is set aside.
    fn read(&self) -> Vec<SavedAttachment>;

    /// Notes that a device with this mark is about to be made.
    ///
    /// # Errors
    /// The announcement cannot be written, or there is one with this mark.
    fn announce(&self, mark: u64) -> Result<(), Error>;

    /// Takes an announcement back.
    fn retract(&self, mark: u64);

    /// The announcements that were not taken back.
    fn announced(&self) -> Vec<u64>;

    /// Writes this, in the place of what was written of the same folder.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    fn write_mount_directory(&self, place: &MountDirectory) -> Result<(), Error>;

    /// Forgets a folder.
    fn erase_mount_directory(&self, path: &Path);

    /// All folders that were written and not erased.
    fn read_mount_directories(&self) -> Vec<MountDirectory>;
}

/// An attachment of an earlier daemon whose device could not be looked at.
pub(super) struct Waiting {
    kept: SavedAttachment,
    /// Counts against its owner's limit.
    permit: Permit,
}

/// A device is about to be made. An attach that is never finished leaves it: the next daemon then finds
/// the device by its mark.
#[must_use]
pub(super) struct Announcement {
    mark: u64,
}

impl Announcement {
    /// What the device is to be marked with.
    pub fn mark(&self) -> u64 {
        self.mark
    }
}

/// Writes what has changed, and nothing else.
pub(super) struct Keeper {
    store: Box<dyn Store>,
    written: Mutex<HashMap<DiskSequence, SavedAttachment>>,
    last_mark: Mutex<u64>,
}

impl Keeper {
    pub fn new(store: Box<dyn Store>) -> Self {
        Self { store, written: Mutex::default(), last_mark: Mutex::default() }
    }

    /// Notes that a device is about to be made.
    pub fn announce(&self) -> Result<Announcement, Error> {
        let mark = {
            let mut last = self.last_mark.lock().unwrap_or_else(PoisonError::into_inner);
            // No earlier daemon has used it: the clock has gone on since.
            *last = microseconds_now().max(*last + 1);
            *last
        };
        self.store.announce(mark)?;
        Ok(Announcement { mark })
    }

    /// The attach that was announced has finished: its device is written down, or there is none.
    pub fn retract(&self, announcement: Announcement) {
        self.store.retract(announcement.mark);
    }

    fn written(&self) -> MutexGuard<'_, HashMap<DiskSequence, SavedAttachment>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Vec<SavedAttachment> {
        let all = self.store.read();
        *self.written() = all.iter().map(|kept| (kept.id, kept.clone())).collect();
        all
    }

    fn write(&self, kept: SavedAttachment) -> Result<(), Error> {
        self.rewrite(kept.id, |_| Some(kept))
    }

    /// Writes what becomes of what was written; `None` leaves it.
    fn rewrite(
        &self,
        id: DiskSequence,
        change: impl FnOnce(Option<&SavedAttachment>) -> Option<SavedAttachment>,
    ) -> Result<(), Error> {
        let mut written = self.written();
        let before = written.get(&id);
        if let Some(now) = change(before).filter(|now| before != Some(now)) {
            self.store.write(&now)?;
            written.insert(id, now);
        }
        Ok(())
    }

    /// Before the world is told of something, it is written.
    pub fn follow(&self, event: &Event) {
        let snapshot = match event {
            Event::Added(snapshot) => snapshot.as_ref(),
            Event::Changed(changes) => match &changes.attachment {
                Some(snapshot) => snapshot,
                None => return,
            },
            Event::Removed(_) | Event::Checkpoint(_) => return,
        };
        if let Err(error) = self.rewrite(snapshot.id, |before| SavedAttachment::of(snapshot, before)) {
            warn!(device = snapshot.device.node(), disk_sequence = snapshot.id.0, "{error}");
        }
    }

    /// The attachment is about to show this file; `None` where it does, or never will.
    pub fn expect_file(&self, id: DiskSequence, file: Option<FileIdentity>) -> Result<(), Error> {
        self.rewrite(id, |before| Some(SavedAttachment { next_file: file, ..before?.clone() }))
    }

    /// A folder is about to be made, or somebody is about to be told of it.
    pub fn write_mount_directory(&self, place: &MountDirectory) -> Result<(), Error> {
        self.store.write_mount_directory(place)
    }

    /// A folder is gone.
    pub fn erase_mount_directory(&self, path: &Path) {
        self.store.erase_mount_directory(path);
    }

    /// The folders that an earlier daemon has made.
    pub fn read_mount_directories(&self) -> Vec<MountDirectory> {
        self.store.read_mount_directories()
    }

    /// The attachment is gone.
    pub fn end(&self, id: DiskSequence) {
        if self.written().remove(&id).is_some() {
            self.store.erase(id);
        }
    }
}

impl SavedAttachment {
    /// An attachment that the world is told of; `None` where it belongs to nobody.
    fn of(snapshot: &Snapshot, before: Option<&Self>) -> Option<Self> {
        let disk_sequence = snapshot.device.disk_sequence;
        let unchanged = before.filter(|before| before.disk_sequence == disk_sequence);
        Some(Self {
            id: snapshot.id,
            number: snapshot.device.number,
            disk_sequence,
            ownership: snapshot.ownership.clone()?,
            phase: match snapshot.state {
                State::Attached => Phase::Attached,
                State::Detaching => Phase::Detaching,
            },
            node_made: before.is_some_and(|before| before.node_made),
            next_file: unchanged.and_then(|before| before.next_file),
        })
    }

    /// Whether this device is what was written, or became so as the daemon died.
    fn is_of(&self, device: &Device) -> bool {
        let was_replaced = || {
            device.disk_sequence > self.disk_sequence && self.next_file.is_some_and(|file| device.shows(file))
        };
        device.disk_sequence == self.disk_sequence || was_replaced()
    }
}

impl<K: Kernel> Engine<K> {
    /// Writes down how far a new attachment has come, of which the world is not told yet.
    pub(super) fn keep(&self, id: DiskSequence, phase: Phase) -> Result<(), Error> {
        let kept = self.state().records.get(&id).and_then(|record| {
            Some(SavedAttachment {
                id,
                number: record.device.number,
                disk_sequence: record.device.disk_sequence,
                ownership: record.ownership.clone()?,
                phase,
                node_made: record.node_made,
                next_file: None,
            })
        });
        kept.map_or(Ok(()), |kept| self.keeper.write(kept))
    }

    /// Takes up what an earlier daemon has left: tells the world of what is still attached, and ends
    /// what should have ended meanwhile. To be called once, before anything else is asked for.
    pub async fn restore<F>(self: &Arc<Self>, lives: impl Fn(ClientId) -> F + Clone + Send + Sync + 'static)
    where
        F: Future<Output = bool> + Send + 'static,
    {
        // Where a backing file hangs the rest comes when the daemon serves already, and must not take
        // what is being made then for left behind.
        let (unfinished, announced) = (self.take_up_places(), self.keeper.store.announced());
        let (mut tasks, turns) = (JoinSet::new(), Limiter::new());
        for kept in self.keeper.read() {
            let (engine, lives, turns) = (Arc::clone(self), lives.clone(), Arc::clone(&turns));
            tasks.spawn(async move { turns.take(engine.take_up_or_end(&kept, lives)).await });
        }
        tasks.join_all().await;
        self.look_at_mounts();
        self.undo_places(unfinished).await;
        self.undo_announced(announced).await;
        self.kernel.release_unadopted(&self.waits_for_its_hold()).await;
    }

    /// The attachments that live by a copy in the descriptor store, since they could not be taken up, or
    /// not be opened: a transient error must not end them.
    fn waits_for_its_hold(&self) -> HashSet<DiskSequence> {
        let state = self.state();
        let lives_by_it = |kept: &&SavedAttachment| {
            kept.phase == Phase::Attached && kept.ownership.lifetime != Lifetime::Persistent
        };
        let has_hold =
            |kept: &&SavedAttachment| state.records.get(&kept.id).is_some_and(|record| record.hold.is_some());
        let written = self.keeper.written();
        let waiting = written.values().filter(lives_by_it).filter(|kept| !has_hold(kept));
        waiting.map(|kept| kept.disk_sequence).collect()
    }

    async fn take_up_or_end<F: Future<Output = bool>>(
        self: &Arc<Self>,
        kept: &SavedAttachment,
        lives: impl Fn(ClientId) -> F,
    ) {
        self.take_up(kept).await;
        if kept.ownership.lifetime == Lifetime::Persistent || kept.phase != Phase::Attached {
            return;
        }
        if self.is_waiting(kept.number) {
            if let Some(client) = kept.ownership.client.as_ref()
                && !lives(client.clone()).await
            {
                self.note_waiting_vanished(client);
            }
            return;
        }
        self.look_at_mounts();
        let found = self.find(kept.id).and_then(|found| found.ownership);
        let Some(Ownership { lifetime, client, mounted, grace_ends, .. }) = found else { return };
        if mounted {
            // What was unmounted while nobody looked.
            self.end_with_last_mount(kept.id).await;
            return;
        }
        if let Some(ends) = grace_ends {
            return self.resume_grace(kept.id, ends);
        }
        // Asked for when it is noted: who vanishes later is found by `client_disconnected`.
        let alive = match &client {
            Some(client) => lives(client.clone()).await,
            None => false,
        };
        match lifetime {
            _ if alive => {}
            Lifetime::Mount => self.begin_grace(kept.id),
            Lifetime::Client | Lifetime::Persistent => self.end_of_lifetime(kept.id, client.as_ref()).await,
        }
    }

    /// Detaches what was made and never written down: the last daemon died over it.
    async fn undo_announced(self: &Arc<Self>, announced: Vec<u64>) {
        if announced.is_empty() {
            return;
        }
        for number in self.kernel.bound_numbers() {
            let Ok(Some(device)) = self.kernel.status(number).await else { continue };
            let is_known = self.state().by_number.contains_key(&number);
            if is_known || device.mark == 0 || !announced.contains(&device.mark) {
                continue;
            }
            info!(device = device.node(), "its attach was not finished: detached");
            if let Err(error) = self.kernel.clear(number, device.disk_sequence).await {
                warn!(device = device.node(), "{error}");
            }
        }
        announced.into_iter().for_each(|mark| self.keeper.store.retract(mark));
    }

    async fn take_up(self: &Arc<Self>, kept: &SavedAttachment) {
        let SavedAttachment { id, number, .. } = *kept;
        let _leave = self.background.take(Some(kept.ownership.uid)).await;
        // Whoever else looks at it waits, and finds it taken up.
        let _alone = self.looks.lock(number).await;
        let permit = self.attachments_of_a_uid.adopt(kept.ownership.uid);
        match self.kernel.status(number).await {
            Ok(Some(device)) if kept.is_of(&device) => {
                self.take_up_device(kept, device, permit).await;
            }
            Ok(_) => {
                info!(number, disk_sequence = id.0, "it ended while loopd did not run");
                self.keeper.end(id);
                if kept.node_made {
                    self.kernel.remove(number).await;
                }
            }
            Err(error) => {
                warn!(number, disk_sequence = id.0, "not taken up yet: {error}");
                self.waiting().insert(number, Waiting { kept: kept.clone(), permit });
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_waiting(&self, number: u32) -> bool {
        self.waiting().contains_key(&number)
    }

    /// A client vanished whose attachment has not been taken up yet: it ends when it is.
    pub(super) fn note_waiting_vanished(&self, vanished: &ClientId) {
        for waiting in self.waiting().values_mut() {
            let client = &mut waiting.kept.ownership.client;
            if client.as_ref() == Some(vanished) {
                *client = None;
            }
        }
    }

    /// What could not be taken up at the start is gone.
    pub(super) fn forget_waiting(&self, number: u32) {
        let waiting = self.waiting().remove(&number);
        if let Some(Waiting { kept, .. }) = waiting {
            self.keeper.end(kept.id);
        }
    }

    /// Takes up what an error kept from being taken up at the start, now that the device can be looked
    /// at. False if there is nothing to take up.
    pub(super) async fn take_up_waiting(self: &Arc<Self>, device: &Device) -> bool {
        let is_it = self.waiting().get(&device.number).is_some_and(|waiting| waiting.kept.is_of(device));
        if !is_it {
            self.forget_waiting(device.number);
            return false;
        }
        let Some(Waiting { kept, permit }) = self.waiting().remove(&device.number) else { return false };
        self.take_up_device(&kept, device.clone(), permit).await;
        let (lifetime, has_client) = (kept.ownership.lifetime, kept.ownership.client.is_some());
        if kept.phase == Phase::Attached && !has_client {
            match lifetime {
                Lifetime::Client => self.end_of_lifetime(kept.id, None).await,
                Lifetime::Mount if !kept.ownership.mounted => self.begin_grace(kept.id),
                Lifetime::Mount => drop(self.end_with_last_mount(kept.id).await),
                Lifetime::Persistent => {}
            }
        }
        true
    }

    async fn take_up_device(self: &Arc<Self>, kept: &SavedAttachment, device: Device, permit: Permit) {
        let id = kept.id;
        // A daemon that made no marks may have attached it.
        if kept.ownership.uid != 0
            && let Err(error) = self.kernel.mark_untrusted(device.disk_sequence)
        {
            warn!(number = kept.number, disk_sequence = id.0, "{error}");
        }
        let ends_by_itself = kept.ownership.lifetime != Lifetime::Persistent;
        let left_half_way = !ends_by_itself
            && kept.phase != Phase::Detaching
            && device.autoclear
            && self.kernel.has_stored_hold(device.disk_sequence);
        let device = if left_half_way { self.let_stay_again(device).await } else { device };
        let is_held = ends_by_itself || (left_half_way && device.autoclear);
        // One that goes at its last close all the same is being detached, whoever did that.
        let is_detaching = kept.phase == Phase::Detaching || (device.autoclear && !is_held);
        let state = if is_detaching { State::Detaching } else { State::Attached };
        // Whether it was replaced or not: it is not about to be any more.
        if let Err(error) = self.keeper.expect_file(id, None) {
            warn!(device = device.node(), disk_sequence = id.0, "{error}");
        }
        if is_detaching || !is_held {
            self.insert_kept(kept, device, None, state, permit);
        } else {
            let (device, hold) = self.hold_again(device, ends_by_itself).await;
            self.insert_kept(kept, device, hold, state, permit);
        }
        if let Some(snapshot) = self.find(id) {
            audit("taken up again", &snapshot);
            self.tell(Event::Added(Box::new(snapshot)));
        }
        if self.look_whether_gone(id) {
            return;
        }
        if kept.phase == Phase::Attaching {
            info!(number = kept.number, disk_sequence = id.0, "its attach was not finished: detached");
            return self.discard(id).await;
        }
        let engine = Arc::clone(self);
        // Reads the device, which may hang.
        tokio::spawn(async move {
            if let Err(error) = engine.look_at_partitions(id, ScanReason::Changed).await {
                warn!(disk_sequence = id.0, "its partitions cannot be looked at: {error}");
            }
        });
    }

    /// Has a persistent device stay without a hold, which it has where the last daemon could not do so,
    /// or died over it.
    async fn let_stay_again(&self, device: Device) -> Device {
        let change = Change::Autoclear(false);
        let changed = self.kernel.change(device.number, device.disk_sequence, change).await;
        changed.ok().flatten().unwrap_or(device)
    }

    /// Takes a hold; the device goes with it where it `ends_by_itself`, also where the last daemon died
    /// over changing that.
    async fn hold_again(&self, device: Device, ends_by_itself: bool) -> (Device, Option<K::Hold>) {
        let (number, sequence) = (device.number, device.disk_sequence);
        let failed = |error: Error| warn!(device = node(number), disk_sequence = sequence.0, "{error}");
        let hold = self.kernel.hold(number, sequence).await.unwrap_or_else(|error| {
            failed(error);
            None
        });
        if hold.is_none() || device.autoclear || !ends_by_itself {
            return (device, hold);
        }
        let changed = self.kernel.change(number, sequence, Change::Autoclear(true)).await;
        let changed = changed.unwrap_or_else(|error| {
            failed(error);
            None
        });
        (changed.unwrap_or(device), hold)
    }

    fn insert_kept(
        &self,
        kept: &SavedAttachment,
        device: Device,
        hold: Option<K::Hold>,
        state: State,
        permit: Permit,
    ) {
        let stage = match kept.phase {
            // Its client has got no answer, and gets none any more.
            Phase::Attaching => {
                let client = kept.ownership.client.clone().unwrap_or(ClientId(String::new()));
                Stage::Pending { client, abandoned: true }
            }
            _ => Stage::Published,
        };
        let number = device.number;
        let file_system = self.kernel.stored(number, None).unwrap_or_default().file_system;
        let partitions = self.kernel.partition_nodes(number).into_iter().map(|node| {
            let found = self.kernel.stored(number, Some(node.number));
            (node.number, PartitionRecord::new(&Partition { node, ..Partition::default() }, found))
        });
        let partitions = partitions.collect();
        let mut record = Record {
            device,
            ownership: Some(kept.ownership.clone()),
            state,
            file_system,
            partitions,
            unprocessed: 0,
            partitioned: true,
            partitioning: Arc::default(),
            hold,
            stage,
            processed: true,
            node_made: kept.node_made,
            changed: Arc::default(),
            operation: Arc::default(),
            replacing: false,
            permit: Some(permit),
            partition_permit: None,
        };
        record.count_unprocessed();
        let (uid, partitions) = (kept.ownership.uid, record.partitions.len());
        record.partition_permit = Some(self.partitions_of_a_uid.adopt_many(uid, partitions));
        let mut state = self.state();
        state.clients.extend(record.client().cloned());
        state.by_number.insert(number, kept.id);
        state.records.insert(kept.id, record);
    }
}
