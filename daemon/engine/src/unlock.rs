//! Unlocks encrypted volumes. A step that fails undoes the steps before it.
//!
//! The secret is read first: a caller may withhold it, and other users may wait for the locks.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use loopd_common::text::printable;
use loopd_common::{EncryptionType, ErrorKind, Lifetime, State};
use tracing::{info, warn};

use crate::cleartext::{CleartextSnapshot, mapping_name};
use crate::client::Caller;
use crate::clock::microseconds_now;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Device, FileSystem, Kernel, Mapping};
use crate::operation::gone;
use crate::quota::Permit;
use crate::record::CleartextRecord;
use crate::snapshot::Snapshot;
use crate::unlocker::{Closing, Prepared, UnlockCommand, UnlockRequest, Unlocked};
use crate::volume::{VolumeId, VolumeState};

/// How long undoing an unlock may take: the caller waits for it.
const UNDO: Duration = Duration::from_secs(5);

/// What the caller wants that decides whether it may be done.
#[derive(Clone, Copy)]
struct Wanted {
    /// The type that is requested, also by a header.
    kind: Option<EncryptionType>,
    read_only: bool,
}

/// A volume that is being unlocked.
struct Unlocking {
    volume: VolumeId,
    /// What the program is told, which must not change until it makes the mapping.
    plan: Plan,
    /// The node and the backing file, for messages.
    shown: String,
    /// The device; read-only if the mapping is.
    device: Device,
    /// The bytes of the device that the volume has.
    bytes: Range<u64>,
    /// The name of the mapping.
    name: String,
    /// When the mapping is closed.
    closing: Closing,
}

/// How a volume is unlocked.
#[derive(Clone, PartialEq, Eq)]
struct Plan {
    node: String,
    device_number: (u32, u32),
    kind: EncryptionType,
    read_only: bool,
}

impl<K: Kernel> Engine<K> {
    /// Unlocks a volume for the caller.
    ///
    /// # Errors
    /// Those of the contract. The volume is locked then.
    pub async fn unlock(
        self: &Arc<Self>,
        volume: VolumeId,
        request: UnlockRequest<K::File>,
        caller: &impl Caller,
    ) -> Result<CleartextSnapshot, Error> {
        if request.kind.is_none() {
            // If the attach did not wait for udev, the unlock does.
            self.await_probe(volume.attachment).await?;
        }
        let wanted = Wanted::of(&request);
        let planned = self.plan_unlock(volume, wanted)?;
        let _reserved = self.unlocking.try_lock(volume).ok_or_else(|| being_unlocked(&planned.shown))?;
        let permit = self.cleartext_quota.acquire(caller.uid())?;
        let prepared = self.unlocker.prepare(self.unlock_command(&planned, request));
        let prepared = self.unless_abandoned(prepared, &planned.shown, caller).await?;

        let _alone = self.lock_device(volume.attachment).await?;
        let attachment = self.outline(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let _alone_with_file = self.mount_locks.lock(attachment.device.file()).await;
        let unlocking = self.plan_unlock(volume, wanted)?;
        if unlocking.plan != planned.plan {
            return Err(changed(&unlocking.shown));
        }
        // Two file systems on the same bytes destroy each other. The mapping is what can be written to.
        let others = operation(&unlocking.shown);
        let _claims = self.claim_others(&unlocking.device, unlocking.bytes.clone(), others).await?;
        let kept = self.open_and_keep(&unlocking, prepared, permit, caller).await;
        if let Ok(cleartext) = &kept {
            audit("unlocked", &unlocking.shown, caller.uid(), &cleartext.mapping);
        }
        kept
    }

    /// Decides how a volume is unlocked.
    ///
    /// # Errors
    /// `NotFound`, `NotSupported`; `Busy` if it is in use.
    fn plan_unlock(self: &Arc<Self>, volume: VolumeId, wanted: Wanted) -> Result<Unlocking, Error> {
        self.read_mounts()?;
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let found = VolumeState::of(&attachment, volume)?;
        let kind = self.encryption_of(&attachment, &found, volume, wanted.kind)?;
        self.refuse_used(&attachment, &found, volume)?;
        let read_only = found.read_only || wanted.read_only;
        Ok(Unlocking {
            volume,
            shown: found.shown(&attachment),
            plan: Plan { node: found.node, device_number: found.device_number, kind, read_only },
            bytes: found.bytes,
            name: mapping_name(volume.attachment, volume.partition),
            closing: closing_of(&attachment),
            device: Device { read_only, ..attachment.device },
        })
    }

    fn unlock_command(&self, planned: &Unlocking, request: UnlockRequest<K::File>) -> UnlockCommand<K::File> {
        let Plan { node, kind, read_only, .. } = planned.plan.clone();
        UnlockCommand {
            device: node,
            shown: planned.shown.clone(),
            name: planned.name.clone(),
            kind,
            request: UnlockRequest { read_only, ..request },
            timeout: self.settings().wait_for_unlock,
        }
    }

    /// How a volume is encrypted.
    ///
    /// # Errors
    /// `NotSupported` if it is not known to be, or may not be unlocked; `Busy` if it is being detached.
    fn encryption_of(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        volume: VolumeId,
        requested: Option<EncryptionType>,
    ) -> Result<EncryptionType, Error> {
        let shown = found.shown(attachment);
        let refused = |reason: String| Err(Error::NotSupported { operation: operation(&shown), reason });
        if attachment.state == State::Detaching {
            let reason = "it is being detached; take that back first (SetLifetime), or wait until its last user is gone";
            return Err(Error::Busy { operation: operation(&shown), reason: reason.to_owned() });
        }
        if volume.is_cleartext {
            return refused("it is a cleartext, and what is encrypted in it is not unlocked".to_owned());
        }
        let has_table = volume.partition.is_none() && !attachment.partitions.is_empty();
        let kind = match kind_of(&found.file_system, requested) {
            Err(reason) => return refused(reason),
            Ok(_) if has_table && found.file_system.usage != CRYPTO => {
                return refused("it has a partition table; unlock one of its partitions".to_owned());
            }
            Ok(kind) => kind,
        };
        let allowed = self.settings().unlock_types;
        if !allowed.contains(&kind) {
            let all: Vec<&str> = allowed.iter().map(|kind| kind.as_str()).collect();
            return refused(format!(
                "the type {kind} is not among those that may be unlocked here ({}); an administrator can add it \
                 (types below [unlock] in /etc/loopd/loopd.toml), or unlock it as root",
                all.join(", ")
            ));
        }
        Ok(kind)
    }

    /// Refuses a volume whose bytes this device shows mounted or mapped.
    fn refuse_used(&self, attachment: &Snapshot, found: &VolumeState, volume: VolumeId) -> Result<(), Error> {
        let busy =
            |reason: String| Err(Error::Busy { operation: operation(&found.shown(attachment)), reason });
        if let Some((node, path)) = attachment.mounted_with(volume.partition) {
            return busy(format!("{node} is mounted on {}; unmount that first", show(path)));
        }
        for (partition, mapping) in self.kernel.mappings(attachment.device.number)? {
            // A disk and its partitions share their bytes.
            if partition.is_some() && volume.partition.is_some() && partition != volume.partition {
                continue;
            }
            let known = attachment.cleartext_of(partition).is_some_and(|known| known.mapping.is(&mapping));
            return busy(match known {
                true if partition == volume.partition => {
                    format!("it is unlocked as {} already", mapping.node())
                }
                true => format!(
                    "{} is unlocked as {}; lock it first",
                    node(attachment, partition),
                    mapping.node()
                ),
                false => {
                    format!("{} is held by {}; end that first", node(attachment, partition), mapping.shown())
                }
            });
        }
        Ok(())
    }

    /// Waits for the program, unless the caller disconnects or the daemon stops.
    async fn unless_abandoned<T>(
        &self,
        step: impl Future<Output = Result<T, Error>>,
        shown: &str,
        caller: &impl Caller,
    ) -> Result<T, Error> {
        let abandoned = || Err(Error::UnlockAbandoned { volume: shown.to_owned() });
        tokio::select! {
            biased;
            () = caller.disconnected() => abandoned(),
            () = self.aborted() => abandoned(),
            done = step => done,
        }
    }

    /// Makes the mapping, and keeps it.
    async fn open_and_keep(
        self: &Arc<Self>,
        unlocking: &Unlocking,
        prepared: Box<dyn Prepared>,
        permit: Permit,
        caller: &impl Caller,
    ) -> Result<CleartextSnapshot, Error> {
        let opened = self.unless_abandoned(prepared.open(), &unlocking.shown, caller).await;
        let unlocked = match opened {
            Ok(unlocked) => unlocked,
            Err(error) => {
                if may_have_made_it(&error) {
                    self.undo_unlock(unlocking, &error).await;
                }
                return Err(error);
            }
        };
        let kept = self.keep_unlocked(unlocking, unlocked, permit, caller).await;
        if let Err(error) = &kept {
            self.undo_unlock(unlocking, error).await;
        }
        kept
    }

    /// Holds the mapping, and records it.
    async fn keep_unlocked(
        self: &Arc<Self>,
        unlocking: &Unlocking,
        unlocked: Box<dyn Unlocked>,
        permit: Permit,
        caller: &impl Caller,
    ) -> Result<CleartextSnapshot, Error> {
        let volume = unlocking.volume;
        let locked = || Error::LockedByOthers { volume: unlocking.shown.clone() };
        let mapping = self.find_mapping(unlocking)?.ok_or_else(locked)?;
        let mapping = Mapping { kind: unlocking.plan.kind, ..mapping };
        let hold = match unlocking.closing {
            Closing::AtLastClose => Some(self.kernel.hold_mapping(&mapping).await?.ok_or_else(locked)?),
            Closing::OnRequest => None,
        };
        if let Err(error) = unlocked.keep(unlocking.closing).await {
            if let Some(hold) = hold {
                self.kernel.release(hold).await;
            }
            return Err(error);
        }
        let file_system = self.kernel.stored_mapping(mapping.number).unwrap_or_default();
        let (since, uid) = (microseconds_now(), caller.uid());
        let record =
            CleartextRecord { mapping, since, uid, file_system, hold, closing: false, _permit: permit };
        let saved = record.saved(volume.partition);
        if let Some(hold) = self.record_cleartext(volume, record) {
            self.kernel.release(hold).await;
        }
        // One that is not saved is closed by the next daemon.
        self.state_writer.add_cleartext(volume.attachment, saved)?;
        self.reap_cleartexts(volume.attachment);
        if caller.is_disconnected() {
            return Err(Error::UnlockAbandoned { volume: unlocking.shown.clone() });
        }
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        attachment.cleartext_of(volume.partition).cloned().ok_or_else(locked)
    }

    fn find_mapping(&self, unlocking: &Unlocking) -> Result<Option<Mapping>, Error> {
        let mappings = self.kernel.mappings(unlocking.device.number)?.into_iter();
        let mut made = mappings.filter(|(partition, _)| *partition == unlocking.volume.partition);
        Ok(made.find(|(_, mapping)| mapping.name == unlocking.name).map(|(_, mapping)| mapping))
    }

    /// Closes what was made, and waits a bounded time for that.
    async fn undo_unlock(self: &Arc<Self>, unlocking: &Unlocking, error: &Error) {
        let VolumeId { attachment, partition, .. } = unlocking.volume;
        if let Some(hold) = self.begin_closing(attachment, partition) {
            self.kernel.release(hold).await;
        }
        let mut undone = Ok(());
        if matches!(error, Error::UnlockAbandoned { .. } | Error::Timeout { .. }) {
            // The program may still be making it.
            undone = self.unlocker.end(unlocking.name.clone(), UNDO).await;
        }
        if !matches!(self.find_mapping(unlocking), Ok(None)) {
            undone = self.unlocker.set_closing(unlocking.name.clone(), Closing::AtLastClose, UNDO).await;
        }
        if let Err(error) = undone {
            warn!("{} may be left unlocked: {error}", unlocking.shown);
        }
        self.await_closed(attachment, partition).await;
    }
}

/// `ID_FS_USAGE` of an encrypted volume.
const CRYPTO: &str = "crypto";

/// When the mapping of a volume of this attachment is closed.
pub(super) fn closing_of(attachment: &Snapshot) -> Closing {
    match attachment.ownership.as_ref().map(|ownership| ownership.lifetime) {
        Some(Lifetime::Client | Lifetime::Mount) => Closing::AtLastClose,
        Some(Lifetime::Persistent) | None => Closing::OnRequest,
    }
}

impl Wanted {
    fn of<F>(request: &UnlockRequest<F>) -> Self {
        let by_header = request.header.is_some().then_some(EncryptionType::Luks);
        Self { kind: request.kind.or(by_header), read_only: request.read_only }
    }
}

/// Whether a program that has failed in this way may have made the mapping. A mapping of its name is not its own otherwise.
fn may_have_made_it(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::WrongSecret | ErrorKind::InvalidArgs | ErrorKind::Busy)
}

fn being_unlocked(shown: &str) -> Error {
    let reason =
        "another request unlocks it already, and may wait for its secret; try again when that has ended";
    Error::Busy { operation: operation(shown), reason: reason.to_owned() }
}

fn changed(shown: &str) -> Error {
    let reason = "it has changed since its secret was read; try again".to_owned();
    Error::Busy { operation: operation(shown), reason }
}

/// The type that is requested, or that udev has found.
fn kind_of(found: &FileSystem, requested: Option<EncryptionType>) -> Result<EncryptionType, String> {
    match (found.usage.as_str(), found.kind.as_str(), requested) {
        (CRYPTO | "", _, Some(kind)) => Ok(kind),
        (CRYPTO, "crypto_LUKS", None) => Ok(EncryptionType::Luks),
        (CRYPTO, "BitLocker", None) => Ok(EncryptionType::BitLocker),
        (CRYPTO, other, None) => {
            Err(format!("it is encrypted as {}, which loopd does not unlock", printable(other.as_bytes())))
        }
        ("", _, None) => {
            Err("it is not known to be encrypted; name the type (option type) if you know better".to_owned())
        }
        (_, kind, _) => Err(format!("it is not encrypted: it is {}", printable(kind.as_bytes()))),
    }
}

fn operation(shown: &str) -> String {
    format!("unlock {shown}")
}

fn node(attachment: &Snapshot, partition: Option<u32>) -> String {
    match partition {
        None => attachment.device.node(),
        Some(number) => attachment.device.partition_node(number),
    }
}

fn show(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

/// Logs a change of a cleartext, for the administrator.
fn audit(event: &str, shown: &str, uid: u32, mapping: &Mapping) {
    info!(uid, cleartext = mapping.node(), "{event}: {shown}");
}
