//! The records of cleartexts: follows the mappings that the kernel has.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::cleartext::{MappingEvent, SavedCleartext, is_named_by_loopd};
use crate::clock::microseconds_now;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Device, DiskSequence, Kernel, Mapping};
use crate::record::{CleartextRecord, Record};
use crate::volume::VolumeId;

/// Who has unlocked a device of another program, as far as a restarted daemon knows: nobody's limit counts it.
const ROOT: u32 = 0;

impl<K: Kernel> Engine<K> {
    /// Handles an event of a mapping.
    pub fn observe_mapping(self: &Arc<Self>, event: &MappingEvent) {
        let Some((id, partition)) = self.cleartext_on(event.number) else { return };
        // The event may be about an earlier mapping with this number, and a later one may have it now.
        self.reap_cleartexts(id);
        let Some(found) = event.file_system.clone().filter(|_| !event.removed) else { return };
        self.update(id, |record| {
            let cleartext = record.cleartexts.get_mut(&partition);
            let is_current = |cleartext: &&mut CleartextRecord<K>| {
                event.disk_sequence == Some(cleartext.mapping.disk_sequence)
            };
            if let Some(cleartext) = cleartext.filter(is_current) {
                cleartext.file_system = found;
            }
        });
    }

    /// The volume whose cleartext is `/dev/dm-N`.
    fn cleartext_on(&self, number: u32) -> Option<(DiskSequence, Option<u32>)> {
        let state = self.state();
        state.records.iter().find_map(|(id, record)| {
            let mut cleartexts = record.cleartexts.iter();
            let found = cleartexts.find(|(_, cleartext)| cleartext.mapping.number == number);
            found.map(|(partition, _)| (*id, *partition))
        })
    }

    /// Whether the volume has a cleartext, by its record.
    pub(super) fn is_unlocked(&self, id: DiskSequence, partition: Option<u32>) -> bool {
        self.state().records.get(&id).is_some_and(|record| record.cleartexts.contains_key(&partition))
    }

    /// Removes the records of cleartexts whose mappings are gone. If that cannot be determined, they stay.
    pub(super) fn reap_cleartexts(self: &Arc<Self>, id: DiskSequence) {
        let known: Vec<(Option<u32>, Mapping)> = {
            let state = self.state();
            let Some(record) = state.records.get(&id) else { return };
            let cleartexts = record.cleartexts.iter();
            cleartexts.map(|(partition, cleartext)| (*partition, cleartext.mapping.clone())).collect()
        };
        let Some(number) = self.state().records.get(&id).map(|record| record.device.number) else { return };
        if known.is_empty() {
            return;
        }
        let Ok(present) = self.kernel.mappings(number) else { return };
        for (partition, mapping) in known {
            if !present.iter().any(|(of, present)| *of == partition && present.is(&mapping)) {
                self.remove_cleartext(id, partition, &mapping);
            }
        }
    }

    /// Removes the record of a cleartext whose mapping is gone.
    pub(super) fn remove_cleartext(
        self: &Arc<Self>,
        id: DiskSequence,
        partition: Option<u32>,
        mapping: &Mapping,
    ) {
        let (mut removed, mut owner) = (None, None);
        self.update(id, |record| {
            owner = record.ownership.as_ref().map(|ownership| ownership.uid);
            let is_it = record.cleartexts.get(&partition).is_some_and(|known| known.mapping.is(mapping));
            removed = is_it.then(|| record.cleartexts.remove(&partition)).flatten();
        });
        // A cleartext that is gone is not mounted, and its mount may have been the last one.
        let is_over = {
            let state = self.state();
            let record = state.records.get(&id).filter(|_| removed.is_some());
            record.is_some_and(|record| record.has_lost_last_mount(&state.mounts))
        };
        if is_over {
            self.spawn_end_with_last_mount(id);
        }
        let Some(hold) = removed.and_then(|removed| removed.hold) else { return };
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = engine.background.acquire(owner).await;
            engine.kernel.release(hold).await;
        });
    }

    /// Reads again what udev has found on the cleartexts of a number, and whether they are there.
    pub(super) fn refresh_cleartexts(self: &Arc<Self>, number: u32) {
        let Some(id) = self.state().by_number.get(&number).copied() else { return };
        self.reap_cleartexts(id);
        self.update(id, |record| {
            for cleartext in record.cleartexts.values_mut() {
                let found = self.kernel.stored_mapping(cleartext.mapping.number);
                found.into_iter().for_each(|found| cleartext.file_system = found);
            }
        });
    }

    /// The cleartexts of a device of another program that the last daemon has unlocked: no state file has them. If the
    /// device goes with its last user, as after a lazy detach, so do they.
    pub(super) fn cleartexts_of_foreign(&self, device: &Device) -> BTreeMap<Option<u32>, CleartextRecord<K>> {
        let mappings = self.kernel.mappings(device.number).unwrap_or_default().into_iter();
        let own = mappings.filter(|(_, mapping)| is_named_by_loopd(mapping));
        own.map(|(partition, mapping)| {
            let saved = SavedCleartext {
                partition,
                disk_sequence: mapping.disk_sequence,
                since: microseconds_now(),
                uid: ROOT,
                closing: device.autoclear,
                kind: None,
            };
            (partition, self.adopted(saved, mapping, None))
        })
        .collect()
    }

    /// The record of a cleartext of the last daemon.
    pub(super) fn adopted(
        &self,
        saved: SavedCleartext,
        mapping: Mapping,
        hold: Option<K::Hold>,
    ) -> CleartextRecord<K> {
        CleartextRecord {
            since: saved.since,
            uid: saved.uid,
            file_system: self.kernel.stored_mapping(mapping.number).unwrap_or_default(),
            mapping: Mapping { kind: saved.kind.unwrap_or(mapping.kind), ..mapping },
            hold,
            closing: saved.closing,
            _permit: self.cleartext_quota.adopt(saved.uid),
        }
    }

    /// Waits a bounded time until the cleartext of a volume is gone; false if it is not.
    pub(super) async fn await_closed(self: &Arc<Self>, id: DiskSequence, partition: Option<u32>) -> bool {
        self.reap_cleartexts(id);
        let deadline = Instant::now() + self.settings().wait_for_users;
        let is_gone = |record: Option<&Record<K>>| {
            record.is_none_or(|record| !record.cleartexts.contains_key(&partition)).then_some(())
        };
        let closed = tokio::select! {
            closed = self.wait_for_record(id, deadline, is_gone) => closed.is_some(),
            () = self.aborted() => false,
        };
        if !closed {
            self.reap_cleartexts(id);
        }
        closed || !self.is_unlocked(id, partition)
    }

    /// Puts a cleartext into the record; returns its hold if the attachment has ended.
    pub(super) fn record_cleartext(
        &self,
        volume: VolumeId,
        cleartext: CleartextRecord<K>,
    ) -> Option<K::Hold> {
        let mounts = self.state().mounts.clone();
        let mut cleartext = Some(cleartext);
        self.update(volume.attachment, |record| {
            record.cleartexts.extend(cleartext.take().map(|cleartext| (volume.partition, cleartext)));
            record.note_mounts(&mounts);
        });
        cleartext.and_then(|cleartext| cleartext.hold)
    }

    /// Takes the hold of a cleartext out of the record.
    pub(super) fn take_cleartext_hold(&self, id: DiskSequence, partition: Option<u32>) -> Option<K::Hold> {
        let mut state = self.state();
        let record = state.records.get_mut(&id)?;
        record.cleartexts.get_mut(&partition)?.hold.take()
    }

    /// Opens a hold of a cleartext; false if that is gone.
    pub(super) async fn hold_cleartext(
        self: &Arc<Self>,
        id: DiskSequence,
        partition: Option<u32>,
        mapping: &Mapping,
    ) -> Result<bool, Error> {
        let Some(hold) = self.kernel.hold_mapping(mapping).await? else {
            self.remove_cleartext(id, partition, mapping);
            return Ok(false);
        };
        let unclaimed = self.restore_cleartext_hold(id, partition, mapping, hold);
        let is_held = unclaimed.is_none();
        if let Some(unclaimed) = unclaimed {
            self.kernel.release(unclaimed).await;
        }
        Ok(is_held)
    }

    /// Puts a hold into the record of a cleartext; returns it if that is gone.
    fn restore_cleartext_hold(
        &self,
        id: DiskSequence,
        partition: Option<u32>,
        mapping: &Mapping,
        hold: K::Hold,
    ) -> Option<K::Hold> {
        let mut state = self.state();
        let cleartext = state.records.get_mut(&id).and_then(|record| record.cleartexts.get_mut(&partition));
        let Some(cleartext) = cleartext.filter(|known| known.mapping.is(mapping)) else { return Some(hold) };
        cleartext.hold = Some(hold);
        None
    }

    /// Records that a cleartext is closed with its last user. Returns the hold that is to be released.
    pub(super) fn begin_closing(&self, id: DiskSequence, partition: Option<u32>) -> Option<K::Hold> {
        let mut hold = None;
        self.update(id, |record| {
            if let Some(cleartext) = record.cleartexts.get_mut(&partition) {
                cleartext.closing = true;
                hold = cleartext.hold.take();
            }
        });
        hold
    }
}
