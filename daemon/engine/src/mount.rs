//! Mounts and unmounts volumes of attachments. A step that fails undoes the steps before it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use loopd_common::text::printable;
use loopd_common::{ErrorKind, State};
use tracing::info;

use crate::client::Caller;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Device, Kernel};
use crate::mount_plan::{Plan, PlannedVolume};
use crate::mounter::{Account, MountCommand};
use crate::operation::gone;
use crate::record::Record;
use crate::request::MountRequest;
use crate::snapshot::Snapshot;
use crate::volume::{VolumeId, VolumeState};

impl<K: Kernel> Engine<K> {
    /// Mounts a volume for the caller, and returns the mount point.
    ///
    /// # Errors
    /// Those of the contract. Nothing is mounted then, and no directory is left.
    pub async fn mount(
        self: &Arc<Self>,
        volume: VolumeId,
        wanted: &MountRequest,
        caller: &impl Caller,
    ) -> Result<PathBuf, Error> {
        if wanted.filesystem.is_empty() {
            // If the attach did not wait for udev, the mount does.
            self.await_probe(volume.attachment).await?;
        }
        let _alone = self.lock_device(volume.attachment).await?;
        self.refresh_mounts();
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let _alone_with_file = self.mount_locks.lock(attachment.device.file()).await;
        let mut found = VolumeState::of(&attachment, volume)?;
        refuse_unlocked(&attachment, &found, volume)?;
        if wanted.filesystem.is_empty() {
            self.look_again(&attachment, volume, &mut found).await?;
        }
        let account = self.mounter.account(caller.uid()).await;
        let plan = self.plan(&attachment, &found, volume, wanted, &account)?;
        refuse_mounted(&attachment, &found, volume)?;
        // Two file systems on the same bytes destroy each other. Before the superblock is checked: a file system that
        // is mounted through another device looks damaged here.
        let device = Device { read_only: found.read_only, ..attachment.device.clone() };
        let operation = format!("mount {}", found.shown(&attachment));
        let _claims = self.claim_others(&device, found.bytes.clone(), operation).await?;
        self.check_journal(&attachment, &found, &plan).await?;
        let members = self.check_superblock(&attachment, &found, &plan).await?;
        let name = crate::mount_name::of_volume(&found.file_system, &attachment);
        let directory = self.create_mount_directory(&account, &name).await?;
        let advice = plan.advice(found.read_only);
        let order = MountCommand {
            shown: found.shown(&attachment),
            device: found.node,
            directory: directory.clone(),
            kind: plan.kind,
            options: [plan.options].into_iter().chain(members).collect::<Vec<_>>().join(","),
            advice,
            account,
            timeout: self.settings().wait_for_mount,
        };
        match self.run_mount(&order, volume, caller).await {
            Ok(()) => {
                audit("mounted", &order.shown, caller.uid(), &directory);
                Ok(directory)
            }
            Err(error) => {
                self.undo_mount(&directory).await;
                Err(error)
            }
        }
    }

    fn plan(
        &self,
        attachment: &Snapshot,
        found: &VolumeState,
        volume: VolumeId,
        wanted: &MountRequest,
        account: &Account,
    ) -> Result<Plan, Error> {
        let shown = found.shown(attachment);
        if attachment.state == State::Detaching {
            let reason = "it is being detached; take that back first (SetLifetime), or wait until its last user is gone";
            return Err(Error::Busy { operation: format!("mount {shown}"), reason: reason.to_owned() });
        }
        let node = |number| attachment.device.partition_node(number);
        let partitions = match volume.partition {
            None if !volume.is_cleartext => {
                attachment.partitions.iter().map(|shown| node(shown.partition.node.number)).collect()
            }
            _ => Vec::new(),
        };
        let volume = PlannedVolume {
            shown,
            file_system: found.file_system.clone(),
            read_only: found.read_only,
            partitions,
        };
        Plan::new(&volume, wanted, &self.settings().mounting, account)
    }

    /// Mounts, unless the caller disconnects or the daemon stops.
    async fn run_mount(
        self: &Arc<Self>,
        order: &MountCommand,
        volume: VolumeId,
        caller: &impl Caller,
    ) -> Result<(), Error> {
        tokio::select! {
            biased;
            () = caller.disconnected() => return Err(abandoned(order)),
            () = self.aborted() => return Err(abandoned(order)),
            mounted = self.mounter.mount(order.clone()) => mounted?,
        }
        self.refresh_mounts();
        // The number may have been attached again before the mount, which keeps that attachment now.
        if self.reap_if_gone(volume.attachment) {
            return Err(gone(volume.attachment));
        }
        // So may the number of the mapping.
        self.reap_cleartexts(volume.attachment);
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let found = VolumeState::of(&attachment, volume)?;
        if !found.mount_points.contains(&order.directory) {
            return Err(Error::UnmountedByOthers { volume: order.shown.clone() });
        }
        if caller.is_disconnected() {
            return Err(abandoned(order));
        }
        self.announce_mount_directory(&order.directory)
    }

    /// Unmounts a volume from all its mount points, for the user with this uid. If the user may only unmount its
    /// own mounts (`own_only`), others are not unmounted. If the attachment ends with its last mount, returns when
    /// it has ended, or if another process still has the device open.
    ///
    /// # Errors
    /// `NotFound` if it is not mounted; `Busy`, and it stays mounted; `AccessDenied`, `NotSupported`, `Timeout`,
    /// `Kernel`.
    pub async fn unmount(
        self: &Arc<Self>,
        volume: VolumeId,
        lazy: bool,
        uid: u32,
        own_only: bool,
    ) -> Result<(), Error> {
        {
            let _alone = self.lock_device(volume.attachment).await?;
            self.refresh_mounts();
            let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
            let found = VolumeState::of(&attachment, volume)?;
            if own_only && !found.mount_points.iter().all(|path| self.was_mounted_for(path, uid)) {
                return Err(Error::MountedByOthers);
            }
            self.unmount_all(volume, &found, &found.shown(&attachment), lazy, uid).await?;
        }
        self.remove_unused_directories().await;
        if self.end_with_last_mount(volume.attachment).await {
            self.await_end(volume.attachment).await;
        }
        Ok(())
    }

    /// Unmounts the volume from the mount points that were checked, and from no other.
    async fn unmount_all(
        self: &Arc<Self>,
        volume: VolumeId,
        found: &VolumeState,
        shown: &str,
        lazy: bool,
        uid: u32,
    ) -> Result<(), Error> {
        if found.mount_points.is_empty() {
            return Err(Error::NotMounted { volume: shown.to_owned() });
        }
        // A later mount may be on top of an earlier one.
        for path in found.mount_points.iter().rev() {
            let unmounted = self.mounter.unmount(path.clone(), lazy, self.settings().wait_for_mount).await;
            self.refresh_mounts();
            match unmounted {
                Err(error) if !self.is_mounted_at(volume, path) => {
                    info!("unmounted in spite of an error: {error}")
                }
                Err(error) if error.kind() == ErrorKind::Busy => return Err(self.in_use(shown, path)),
                Err(error) => return Err(error),
                Ok(()) => {}
            }
            audit(if lazy { "unmounted lazily" } else { "unmounted" }, shown, uid, path);
        }
        Ok(())
    }

    fn is_mounted_at(&self, volume: VolumeId, path: &Path) -> bool {
        let attachment = self.find(volume.attachment);
        let found = attachment.and_then(|attachment| VolumeState::of(&attachment, volume).ok());
        found.is_some_and(|found| found.mount_points.iter().any(|mounted| mounted == path))
    }

    /// Error for a file system in use, with the users that are visible in the daemon's sandbox: other mounts and
    /// loop devices. The client finds the processes.
    fn in_use(&self, shown: &str, path: &Path) -> Error {
        let state = self.state();
        let below =
            state.mounts.below(path).into_iter().map(|below| format!("{} is mounted on it", show(below)));
        let mut held_by: Vec<String> = below.collect();
        let is_in_it =
            |record: &&Record<K>| Path::new(OsStr::from_bytes(&record.device.backing_file)).starts_with(path);
        let stacked = state.records.values().filter(is_in_it);
        held_by.extend(stacked.map(|record| format!("{} is attached to a file in it", record.device.node())));
        drop(state);
        if held_by.is_empty() {
            held_by.push("a process has a file open or its working directory in it".to_owned());
        }
        Error::Busy {
            operation: format!("unmount {shown} from {}", show(path)),
            reason: format!("{}; end that first, or unmount lazily", held_by.join(", ")),
        }
    }

    /// Whether loopd has made each mount of the volume for this user. True if it is not mounted.
    pub fn is_mounted_for(self: &Arc<Self>, volume: VolumeId, uid: u32) -> bool {
        self.refresh_mounts();
        let attachment = self.find(volume.attachment);
        let found = attachment.and_then(|attachment| VolumeState::of(&attachment, volume).ok());
        found.is_some_and(|found| found.mount_points.iter().all(|path| self.was_mounted_for(path, uid)))
    }
}

/// The kernel mounts no device that has a mapping.
fn refuse_unlocked(attachment: &Snapshot, found: &VolumeState, volume: VolumeId) -> Result<(), Error> {
    let unlocked = attachment.unlocked_with(volume.partition).filter(|_| !volume.is_cleartext);
    let Some((partition, node, cleartext)) = unlocked else { return Ok(()) };
    let cleartext = cleartext.mapping.node();
    Err(Error::Busy {
        operation: format!("mount {}", found.shown(attachment)),
        reason: if partition == volume.partition {
            format!("it is unlocked as {cleartext}; mount that")
        } else {
            format!("{node} is unlocked as {cleartext}; lock it first")
        },
    })
}

/// A disk and its partitions share their bytes: writing to one damages the other.
fn refuse_mounted(attachment: &Snapshot, found: &VolumeState, volume: VolumeId) -> Result<(), Error> {
    let shown = found.shown(attachment);
    let refused = |reason: String| Err(Error::Busy { operation: format!("mount {shown}"), reason });
    if let Some(path) = found.mount_points.first() {
        return refused(format!("it is mounted on {} already", show(path)));
    }
    if volume.is_cleartext {
        return Ok(());
    }
    match (attachment.mounted_with(volume.partition), volume.partition) {
        (None, _) => Ok(()),
        (Some((node, path)), Some(_)) => {
            refused(format!("the whole device {node} is mounted on {}; unmount that first", show(path)))
        }
        (Some((node, path)), None) => {
            refused(format!("its partition {node} is mounted on {}; unmount that first", show(path)))
        }
    }
}

fn abandoned(order: &MountCommand) -> Error {
    Error::MountAbandoned { volume: order.shown.clone() }
}

fn show(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

/// Logs a change of a mount, for the administrator.
fn audit(event: &str, shown: &str, uid: u32, directory: &Path) {
    info!(uid, mount_point = show(directory), "{event}: {shown}");
}
