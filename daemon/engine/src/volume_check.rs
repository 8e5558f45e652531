//! Checks the superblock of a volume before it is mounted.

use loopd_common::State;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{FileSystem, Kernel};
use crate::mount_plan::Plan;
use crate::ownership::is_root;
use crate::signature::LENGTH;
use crate::snapshot::Snapshot;
use crate::superblock::Btrfs;
use crate::volume::{VolumeId, VolumeState};

impl<K: Kernel> Engine<K> {
    /// Looks at a volume again if udev knows no file system in it, or one that is provably gone: it may have been made
    /// since udev looked, and udev may not run. Puts what is found into the record.
    ///
    /// # Errors
    /// `NotSupported` if there are several.
    pub(super) async fn look_again(
        &self,
        attachment: &Snapshot,
        volume: VolumeId,
        found: &mut VolumeState,
    ) -> Result<(), Error> {
        let is_disk = volume.partition.is_none() && !volume.is_cleartext;
        let has_partitions = is_disk && !attachment.partitions.is_empty();
        if has_partitions || !matches!(found.file_system.usage.as_str(), "" | "filesystem") {
            return Ok(());
        }
        let length = usize::try_from(found.size).map_or(LENGTH, |size| size.min(LENGTH));
        let start = self.read_volume(attachment, found, 0, length).await?;
        let known = found.file_system.kind.as_str();
        if !known.is_empty() && !crate::signature::is_gone(known, &start) {
            return Ok(());
        }
        let mut all = crate::signature::found(&start);
        if all.len() > 1 {
            let kinds: Vec<&str> = all.iter().map(|found| found.kind.as_str()).collect();
            let reason = format!(
                "it has the signatures of several file systems ({}); name the one that is meant (option filesystem)",
                kinds.join(", ")
            );
            return Err(not_supported(found, attachment, reason));
        }
        let Some(seen) = all.pop() else { return Ok(()) };
        found.file_system = seen.clone();
        match volume.partition {
            _ if volume.is_cleartext => self.update(attachment.id, |record| {
                let cleartext = record.cleartexts.get_mut(&volume.partition);
                cleartext.into_iter().for_each(|cleartext| cleartext.file_system = seen.clone());
            }),
            None => self.update_outline(attachment.id, |record| record.file_system = seen),
            Some(number) => {
                self.update_partition(attachment.id, number, |partition| partition.file_system = seen)
            }
        }
        Ok(())
    }

    /// Bytes of a volume from an offset on.
    async fn read_volume(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, Error> {
        let device = &attachment.device;
        let start = found.bytes.start.saturating_add(offset);
        match &found.mapping {
            Some(mapping) => self.kernel.read_mapping(mapping, offset, length).await,
            None => self.kernel.read(device.number, device.disk_sequence, start, length).await,
        }
    }

    /// Refuses a read-only device with a journal to replay. The kernel's error would only name the device read-only.
    pub(super) async fn check_journal(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        plan: &Plan,
    ) -> Result<(), Error> {
        let journal = crate::journal::Journal::of(&plan.kind);
        let Some(journal) = journal.filter(|_| found.read_only && !plan.skips_journal) else {
            return Ok(());
        };
        let bytes = self.read_volume(attachment, found, journal.offset, journal.length).await?;
        if !journal.needs_replay(&bytes) {
            return Ok(());
        }
        let reason = "its journal has to be replayed first, and the device is read-only; attach it writable, or mount a \
                      copy of the image that is thrown away, or see what is there without the last changes (option \
                      norecovery)";
        Err(not_supported(found, attachment, reason.to_owned()))
    }

    /// Refuses a volume whose superblock makes it a danger to others. Returns the mount options that name the other
    /// devices of a btrfs over several devices.
    pub(super) async fn check_superblock(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        plan: &Plan,
    ) -> Result<Vec<String>, Error> {
        let mut parts = Vec::new();
        for (offset, length) in crate::superblock::extents(&plan.kind) {
            parts.push(self.read_volume(attachment, found, *offset, *length).await?);
        }
        if let Some(reason) = crate::superblock::refusal(&plan.kind, &parts, plan.skips_journal) {
            return Err(not_supported(found, attachment, reason));
        }
        match parts.first().and_then(|part| crate::superblock::btrfs(part)) {
            Some(btrfs) if plan.kind == "btrfs" => self.btrfs_members(attachment, found, &btrfs).await,
            _ => Ok(Vec::new()),
        }
    }

    /// The kernel identifies a btrfs by its UUID only: it would use every other device that it has scanned with that
    /// UUID. udev makes it scan no device of a user, so the mount options name the user's own devices.
    async fn btrfs_members(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        btrfs: &Btrfs,
    ) -> Result<Vec<String>, Error> {
        let uuid = btrfs.uuid.as_str();
        let owner = attachment.ownership.as_ref().map(|owner| owner.uid).filter(|uid| !is_root(*uid));
        if owner.is_none() && btrfs.devices < 2 {
            return Ok(Vec::new());
        }
        let others = self.kernel.btrfs(uuid).await?;
        if let Some(reason) = missing_devices(btrfs.devices, &others.present, &found.node) {
            return Err(not_supported(found, attachment, reason));
        }
        let Some(owner) = owner else { return Ok(Vec::new()) };
        let refused = |devices: &[String], why: &str| {
            Err(Error::Busy {
                operation: format!("mount {}", found.shown(attachment)),
                reason: format!(
                    "{why} has the same UUID {uuid} ({}), and btrfs would take one for the other; give the image a new \
                     one (btrfstune -u)",
                    devices.join(", ")
                ),
            })
        };
        if !others.mounted.is_empty() {
            return refused(&others.mounted, "a mounted file system");
        }
        let own = self.volumes_with(owner, uuid);
        let foreign: Vec<String> =
            others.present.into_iter().filter(|node| *node != found.node && !own.contains(node)).collect();
        if !foreign.is_empty() {
            return refused(&foreign, "another device");
        }
        Ok(own.into_iter().filter(|node| *node != found.node).map(|node| format!("device={node}")).collect())
    }

    /// The nodes of a user's volumes that have a btrfs with this UUID.
    fn volumes_with(&self, owner: u32, uuid: &str) -> Vec<String> {
        let has = |file_system: &FileSystem| file_system.kind == "btrfs" && file_system.uuid == uuid;
        let is_own = |shown: &Snapshot| {
            shown.state == State::Attached && shown.ownership.as_ref().is_some_and(|own| own.uid == owner)
        };
        let volumes = |shown: &Snapshot| {
            let disk = has(&shown.file_system).then(|| shown.device.node());
            let partitions = shown.partitions.iter().filter(|partition| has(&partition.file_system));
            let nodes =
                partitions.map(|partition| shown.device.partition_node(partition.partition.node.number));
            let cleartexts = shown.cleartexts().filter(|(_, cleartext)| has(&cleartext.file_system));
            let mapped = cleartexts.map(|(_, cleartext)| cleartext.mapping.node());
            disk.into_iter().chain(nodes).chain(mapped).collect::<Vec<_>>()
        };
        self.list().iter().filter(|shown| is_own(shown)).flat_map(volumes).collect()
    }
}

/// Why a btrfs cannot be mounted of which devices are missing. Without udev none is known.
fn missing_devices(all: u64, present: &[String], own: &String) -> Option<String> {
    let here = u64::try_from(present.len()).unwrap_or(u64::MAX);
    (present.contains(own) && here < all).then(|| {
        format!("it is a btrfs over {all} devices, and {here} of them can be found; attach the images of the others first")
    })
}

fn not_supported(volume: &VolumeState, attachment: &Snapshot, reason: String) -> Error {
    Error::NotSupported { operation: format!("mount {}", volume.shown(attachment)), reason }
}
