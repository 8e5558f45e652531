//! Adopts the attachments and mounts of the last daemon.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError};

use loopd_common::Lifetime;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::cleartext::is_named_by_loopd;
use crate::client::ClientId;
use crate::engine::{Engine, Pending};
use crate::error::Error;
use crate::event::Event;
use crate::findings::{FileEnd, Findings};
use crate::kernel::{Change, Device, DiskSequence, Kernel, Mapping, Partition, ScanReason, node};
use crate::lifecycle::Lifecycle;
use crate::limiter::Limiter;
use crate::operation::audit;
use crate::ownership::{Ownership, is_root};
use crate::quota::Permit;
use crate::record::{CleartextRecord, PartitionRecord, Record};
use crate::saved::{Phase, SavedAttachment, SavedCleartext};

/// The cleartexts of an attachment.
type Cleartexts<K> = BTreeMap<Option<u32>, CleartextRecord<K>>;

impl<K: Kernel> Engine<K> {
    /// Saves the phase of a new attachment that is not published yet.
    pub(super) fn save(&self, id: DiskSequence, phase: Phase) -> Result<(), Error> {
        let saved = self.state().records.get(&id).and_then(|record| {
            Some(SavedAttachment {
                id,
                number: record.device.number,
                disk_sequence: record.device.disk_sequence,
                ownership: record.ownership.clone()?,
                phase,
                node_made: record.node_made,
                next_file: None,
                file_end: record.file_end,
                cleartexts: Vec::new(),
            })
        });
        saved.map_or(Ok(()), |saved| self.state_writer.write(saved))
    }

    /// Adopts the attachments of the last daemon: publishes those that still exist, and ends those whose lifetime is
    /// over. To be called once, before any other operation.
    pub async fn restore<F>(self: &Arc<Self>, lives: impl Fn(ClientId) -> F + Clone + Send + Sync + 'static)
    where
        F: Future<Output = bool> + Send + 'static,
    {
        // If a backing file hangs, the rest of this function runs while the daemon serves calls already. It must not
        // undo what those are making.
        let (unfinished, announced) = (self.adopt_mount_directories(), self.state_writer.store.announced());
        let (mut tasks, limiter) = (JoinSet::new(), Limiter::new());
        for saved in self.state_writer.read() {
            let (engine, lives, limiter) = (Arc::clone(self), lives.clone(), Arc::clone(&limiter));
            tasks.spawn(async move { limiter.run(engine.adopt_or_end(&saved, lives)).await });
        }
        tasks.join_all().await;
        self.refresh_mounts();
        self.undo_unfinished_mounts(unfinished).await;
        self.undo_announced(announced).await;
        self.flush_events().await;
        self.kernel.release_unadopted(&self.pending_holds()).await;
    }

    /// The devices and mappings that only their copy in the descriptor store keeps, since they could not be adopted or
    /// opened: a transient error must not end them.
    fn pending_holds(&self) -> HashSet<DiskSequence> {
        let state = self.state();
        let needs_hold = |saved: &&SavedAttachment| {
            saved.phase == Phase::Attached && saved.ownership.lifetime != Lifetime::Persistent
        };
        let has_hold = |saved: &&SavedAttachment| {
            state.records.get(&saved.id).is_some_and(|record| record.hold.is_some())
        };
        let lacks_hold = |saved: &SavedAttachment, cleartext: &SavedCleartext| {
            let Some(record) = state.records.get(&saved.id) else { return true };
            let known = record.cleartexts.get(&cleartext.partition);
            known.is_some_and(|known| known.hold.is_none() && !known.closing)
        };
        let written = self.state_writer.written();
        let all = || written.values().filter(needs_hold);
        let devices = all().filter(|saved| !has_hold(saved)).map(|saved| saved.disk_sequence);
        let cleartexts = all().flat_map(|saved| {
            let waiting = saved.cleartexts.iter().filter(|cleartext| !cleartext.closing);
            waiting.filter(|cleartext| lacks_hold(saved, cleartext)).map(|cleartext| cleartext.disk_sequence)
        });
        devices.chain(cleartexts).collect()
    }

    async fn adopt_or_end<F: Future<Output = bool>>(
        self: &Arc<Self>,
        saved: &SavedAttachment,
        lives: impl Fn(ClientId) -> F,
    ) {
        self.adopt_saved(saved).await;
        if saved.ownership.lifetime == Lifetime::Persistent || saved.phase != Phase::Attached {
            return;
        }
        if self.is_pending(saved.number) {
            if let Some(client) = saved.ownership.client.as_ref()
                && !lives(client.clone()).await
            {
                self.note_pending_disconnected(client);
            }
            return;
        }
        self.refresh_mounts();
        let found = self.find(saved.id).and_then(|found| found.ownership);
        let Some(Ownership { lifetime, client, mounted, grace_ends, .. }) = found else { return };
        if mounted {
            // It may have been unmounted while no daemon ran.
            self.end_with_last_mount(saved.id).await;
            return;
        }
        if let Some(ends) = grace_ends {
            return self.resume_grace(saved.id, ends);
        }
        // Checked when the client is recorded already: `client_disconnected` handles a later disconnect.
        let alive = match &client {
            Some(client) => lives(client.clone()).await,
            None => false,
        };
        match lifetime {
            _ if alive => {}
            Lifetime::Mount => self.begin_grace(saved.id),
            Lifetime::Client | Lifetime::Persistent => self.end_of_lifetime(saved.id, client.as_ref()).await,
        }
    }

    /// Detaches devices that were made but never saved, since the last daemon died.
    async fn undo_announced(self: &Arc<Self>, announced: Vec<u64>) {
        if announced.is_empty() {
            return;
        }
        let numbers = match self.kernel.bound_numbers() {
            Ok(numbers) => numbers,
            // The next daemon finds them.
            Err(error) => return warn!("devices of unfinished attaches may be left: {error}"),
        };
        for number in numbers {
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
        announced.into_iter().for_each(|mark| self.state_writer.store.retract(mark));
    }

    async fn adopt_saved(self: &Arc<Self>, saved: &SavedAttachment) {
        let SavedAttachment { id, number, .. } = *saved;
        let _permit = self.background.acquire(Some(saved.ownership.uid)).await;
        // Other tasks that read its state wait, and find it adopted.
        let _alone = self.status_locks.lock(number).await;
        let permit = self.attachment_quota.adopt(saved.ownership.uid);
        let found = match self.kernel.status(number).await {
            Ok(Some(device)) if saved.is_of(&device) => {
                self.kernel.mappings(number).map(|mappings| Some((device, mappings)))
            }
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        };
        match found {
            Ok(Some((device, mappings))) => self.adopt_device(saved, device, mappings, permit).await,
            Ok(None) => {
                info!(number, disk_sequence = id.0, "it ended while loopd did not run");
                self.state_writer.end(id);
                if saved.node_made {
                    self.kernel.remove(number).await;
                }
            }
            Err(error) => {
                warn!(number, disk_sequence = id.0, "not adopted yet: {error}");
                self.pending().insert(number, Pending { saved: saved.clone(), permit });
            }
        }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<u32, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_pending(&self, number: u32) -> bool {
        self.pending().contains_key(&number)
    }

    /// Records that a client has disconnected whose attachment is not adopted yet: the attachment ends when it is.
    pub(super) fn note_pending_disconnected(&self, disconnected: &ClientId) {
        for waiting in self.pending().values_mut() {
            let client = &mut waiting.saved.ownership.client;
            if client.as_ref() == Some(disconnected) {
                *client = None;
            }
        }
    }

    /// Drops an attachment that could not be adopted at the start and has ended since.
    pub(super) fn forget_pending(&self, number: u32) {
        let waiting = self.pending().remove(&number);
        if let Some(Pending { saved, .. }) = waiting {
            self.state_writer.end(saved.id);
        }
    }

    /// Adopts an attachment whose device could not be read at the start and can be now; false if this device is not
    /// one of those.
    pub(super) async fn adopt_pending(self: &Arc<Self>, device: &Device) -> bool {
        let is_it = self.pending().get(&device.number).is_some_and(|waiting| waiting.saved.is_of(device));
        if !is_it {
            self.forget_pending(device.number);
            return false;
        }
        let mappings = match self.kernel.mappings(device.number) {
            Ok(mappings) => mappings,
            Err(error) => {
                warn!(number = device.number, "not adopted yet: {error}");
                return true;
            }
        };
        let Some(Pending { saved, permit }) = self.pending().remove(&device.number) else { return false };
        self.adopt_device(&saved, device.clone(), mappings, permit).await;
        let (lifetime, has_client) = (saved.ownership.lifetime, saved.ownership.client.is_some());
        if saved.phase == Phase::Attached && !has_client {
            match lifetime {
                // In tasks: the caller holds the status lock, which comes after the lock of the device.
                Lifetime::Client => self.spawn_end_of_lifetime(saved.id, None),
                Lifetime::Mount if !saved.ownership.mounted => self.begin_grace(saved.id),
                Lifetime::Mount => self.spawn_end_with_last_mount(saved.id),
                Lifetime::Persistent => {}
            }
        }
        true
    }

    async fn adopt_device(
        self: &Arc<Self>,
        saved: &SavedAttachment,
        device: Device,
        mappings: Vec<(Option<u32>, Mapping)>,
        permit: Permit,
    ) {
        let id = saved.id;
        // An older daemon, which made no marks for udev, may have attached it.
        if !is_root(saved.ownership.uid)
            && let Err(error) = self.kernel.mark_untrusted(device.disk_sequence)
        {
            warn!(number = saved.number, disk_sequence = id.0, "{error}");
        }
        let ends_by_itself = saved.ownership.lifetime != Lifetime::Persistent;
        let left_half_way = !ends_by_itself
            && saved.phase != Phase::Detaching
            && device.autoclear
            && self.kernel.has_stored_hold(device.disk_sequence);
        // A lazy detach was to be taken back when the last daemon died.
        let is_taken_back = saved.phase == Phase::Detaching && !device.autoclear;
        let device = match (left_half_way, is_taken_back) {
            (true, _) => self.set_autoclear(device, false).await,
            (_, true) => self.set_autoclear(device, true).await,
            _ => device,
        };
        let is_held = ends_by_itself || (left_half_way && device.autoclear);
        // A persistent device that is autoclear is being detached, by a client or another program.
        let is_detaching = saved.phase == Phase::Detaching || (device.autoclear && !is_held);
        // A replacement of its file has succeeded or failed: none is in progress any more. Of a new file nothing is known.
        let file_end = FileEnd::default();
        if let Err(error) = self.state_writer.end_replacement(id, device.disk_sequence, file_end) {
            warn!(device = device.node(), disk_sequence = id.0, "{error}");
        }
        let cleartexts = self.adopt_cleartexts(saved, mappings, is_detaching).await;
        let adopted: Vec<Option<u32>> = cleartexts.keys().copied().collect();
        if is_detaching || !is_held {
            self.insert_saved(saved, device, None, cleartexts, is_detaching, permit);
        } else {
            let (device, hold) = self.hold_again(device, ends_by_itself).await;
            self.insert_saved(saved, device, hold, cleartexts, is_detaching, permit);
        }
        adopted.into_iter().for_each(|partition| self.spawn_closing(id, partition));
        if let Some(snapshot) = self.find(id) {
            audit("adopted", &snapshot);
            self.emit(Event::Added(Box::new(snapshot)));
        }
        if self.reap_if_gone(id) {
            return;
        }
        if saved.phase == Phase::Attaching {
            info!(number = saved.number, disk_sequence = id.0, "its attach was not finished: detached");
            return self.discard(id).await;
        }
        let engine = Arc::clone(self);
        // In a task, since reading the device may hang.
        tokio::spawn(async move { engine.scan_partitions_or_log(id, ScanReason::Changed).await });
    }

    /// Holds the cleartexts that the last daemon has left, as far as they have holds, and closes those of which it had
    /// not told anybody.
    async fn adopt_cleartexts(
        self: &Arc<Self>,
        saved: &SavedAttachment,
        mappings: Vec<(Option<u32>, Mapping)>,
        is_detaching: bool,
    ) -> Cleartexts<K> {
        let mut adopted = Cleartexts::new();
        for (partition, mapping) in mappings {
            let known = saved
                .cleartexts
                .iter()
                .find(|known| (known.partition, known.disk_sequence) == (partition, mapping.disk_sequence));
            if known.is_none() && !is_named_by_loopd(&mapping) {
                continue;
            }
            let Some(known) = known else {
                info!(cleartext = mapping.node(), "its unlock was not finished: locked");
                self.spawn_close_unfinished(mapping);
                continue;
            };
            let closing = known.closing || is_detaching;
            let ends_itself = saved.ownership.lifetime != Lifetime::Persistent && !closing;
            let hold = match ends_itself {
                true => match self.kernel.hold_mapping(&mapping).await {
                    Ok(None) => continue,
                    Ok(hold) => hold,
                    Err(error) => {
                        warn!(cleartext = mapping.node(), "{error}");
                        None
                    }
                },
                false => None,
            };
            adopted.insert(partition, self.adopted(SavedCleartext { closing, ..*known }, mapping, hold));
        }
        adopted
    }

    /// Makes a device end at its last close, or not. The last daemon could not do so, or died before.
    async fn set_autoclear(&self, device: Device, autoclear: bool) -> Device {
        let change = Change::Autoclear(autoclear);
        let changed = self.kernel.change(device.number, device.disk_sequence, change).await;
        changed.ok().flatten().unwrap_or(device)
    }

    /// Opens a hold. If the attachment `ends_by_itself` the device becomes autoclear, unless the last daemon has done
    /// so already.
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

    fn insert_saved(
        &self,
        saved: &SavedAttachment,
        device: Device,
        hold: Option<K::Hold>,
        cleartexts: Cleartexts<K>,
        is_detaching: bool,
        permit: Permit,
    ) {
        let lifecycle = match saved.phase {
            // Its client has received no reply and never will.
            Phase::Attaching => {
                let client = saved.ownership.client.clone().unwrap_or(ClientId(String::new()));
                Lifecycle::Attaching { client, cancelled: true }
            }
            _ if is_detaching => Lifecycle::Detaching,
            _ => Lifecycle::Attached,
        };
        let number = device.number;
        let file_system = self.kernel.stored(number, None).unwrap_or_default().file_system;
        let partitions = self.kernel.partition_nodes(number).into_iter().map(|node| {
            let found = self.kernel.stored(number, Some(node.number));
            (node.number, PartitionRecord::new(&Partition { node, ..Partition::default() }, found))
        });
        let partitions = partitions.collect();
        // Of a file that was replaced as the daemon died nothing is known.
        let same_file = device.disk_sequence == saved.disk_sequence;
        let mut record = Record {
            device,
            ownership: Some(saved.ownership.clone()),
            lifecycle,
            file_system,
            partitions,
            cleartexts,
            // Read again with the partitions, which follow.
            findings: Findings::default(),
            file_end: if same_file { saved.file_end } else { FileEnd::default() },
            silence: None,
            unprocessed: 0,
            partitioned: true,
            unmade: false,
            partitioning: Arc::default(),
            hold,
            processed: true,
            node_made: saved.node_made,
            changed: Arc::default(),
            operation: Arc::default(),
            changes: 0,
            permit: Some(permit),
            partition_permit: None,
        };
        record.count_unprocessed();
        let (uid, partitions) = (saved.ownership.uid, record.partitions.len());
        record.partition_permit = Some(self.partition_quota.adopt_many(uid, partitions));
        let mut state = self.state();
        state.clients.extend(record.client().cloned());
        state.by_number.insert(number, saved.id);
        state.records.insert(saved.id, record);
    }
}
