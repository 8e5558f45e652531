//! Mounting and unmounting volumes of attachments. Whatever fails on the way undoes the steps before it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use loopd_common::text::printable;
use loopd_common::{Error, ErrorKind, State};
use tokio::time::Instant;
use tracing::info;

use crate::client::Caller;
use crate::engine::Engine;
use crate::kernel::Kernel;
use crate::mount_plan::{Plan, PlannedVolume};
use crate::mounter::{Account, MountCommand};
use crate::operation::gone;
use crate::record::Record;
use crate::request::MountRequest;
use crate::snapshot::Snapshot;
use crate::volume::{VolumeId, VolumeState};

impl<K: Kernel> Engine<K> {
    /// Mounts a volume for the caller, and gives the mount point.
    ///
    /// # Errors
    /// Those of the contract. Nothing is mounted then, and no folder left.
    pub async fn mount(
        self: &Arc<Self>,
        volume: VolumeId,
        wanted: &MountRequest,
        caller: &impl Caller,
    ) -> Result<PathBuf, Error> {
        if wanted.filesystem.is_empty() && self.kernel.udev_runs() {
            // One that did not wait for its attach waits now.
            let deadline = Instant::now() + self.settings().wait_for_udev;
            self.await_udev(volume.attachment, deadline, Record::is_processed).await?;
        }
        let _alone = self.lock_device(volume.attachment).await?;
        self.refresh_mounts();
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let _alone_with_file = self.mount_locks.lock(attachment.device.file()).await;
        let found = VolumeState::of(&attachment, volume.partition)?;
        let account = self.mounter.account(caller.uid()).await;
        let plan = self.plan(&attachment, &found, volume.partition, wanted, &account)?;
        refuse_mounted(&attachment, &found, volume.partition)?;
        // First: what is mounted elsewhere looks damaged or foreign from here.
        let _claims = self.claim_overlapping(&attachment, &found).await?;
        self.check_journal(&attachment, &found, &plan).await?;
        let members = self.check_superblock(&attachment, &found, &plan).await?;
        let name = crate::mount_name::of_volume(&found.file_system, &attachment);
        let directory = self.create_mount_directory(&account, &name).await?;
        let order = MountCommand {
            shown: found.shown(&attachment),
            device: found.node,
            directory: directory.clone(),
            kind: plan.kind,
            options: [plan.options].into_iter().chain(members).collect::<Vec<_>>().join(","),
            read_only: attachment.device.read_only,
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
        partition: Option<u32>,
        wanted: &MountRequest,
        account: &Account,
    ) -> Result<Plan, Error> {
        let shown = found.shown(attachment);
        if attachment.state == State::Detaching {
            let message = format!(
                "cannot mount {shown}: it is being detached; take that back first (SetLifetime), or wait until its last user is gone"
            );
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let node = |number| attachment.device.partition_node(number);
        let partitions = match partition {
            None => attachment.partitions.iter().map(|shown| node(shown.partition.node.number)).collect(),
            Some(_) => Vec::new(),
        };
        let volume = PlannedVolume {
            shown,
            file_system: found.file_system.clone(),
            read_only: attachment.device.read_only,
            partitions,
        };
        Plan::new(&volume, wanted, &self.settings().mounting, account)
    }

    /// Two file systems on the same bytes destroy each other, whoever has mounted the other one.
    async fn claim_overlapping(
        self: &Arc<Self>,
        attachment: &Snapshot,
        found: &VolumeState,
    ) -> Result<K::Claims, Error> {
        let bytes = found.start..found.start.saturating_add(found.size);
        self.claim_others(&attachment.device, bytes, format!("cannot mount {}", found.shown(attachment)))
            .await
    }

    /// Has it mounted, unless the caller vanishes or the daemon ends meanwhile.
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
        // Its number may have been attached again by then: what is mounted keeps it now.
        if self.reap_if_gone(volume.attachment) {
            return Err(gone(volume.attachment));
        }
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let found = VolumeState::of(&attachment, volume.partition)?;
        if !found.mount_points.contains(&order.directory) {
            let message =
                format!("{} was unmounted again by another program before it was ready", order.shown);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        if caller.is_disconnected() {
            return Err(abandoned(order));
        }
        self.announce_mount_directory(&order.directory)
    }

    /// Unmounts a volume from wherever it is mounted, for the user with this uid. Where that one may only
    /// do so with what was mounted for it (`own_only`), nothing else is touched. With the last mount of an
    /// attachment that ends with it, returns when that has ended, or someone else still has the device open.
    ///
    /// # Errors
    /// `NotFound` where it is not mounted; `Busy`, and it is mounted as before; `AccessDenied`,
    /// `NotSupported`, `Timeout`, `Kernel`.
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
            let found = VolumeState::of(&attachment, volume.partition)?;
            if own_only && !found.mount_points.iter().all(|path| self.was_mounted_for(path, uid)) {
                return Err(Error::new(
                    ErrorKind::AccessDenied,
                    "it was mounted elsewhere in the meantime, by or for somebody else; try again",
                ));
            }
            self.unmount_all(volume, &found, &found.shown(&attachment), lazy, uid).await?;
        }
        self.remove_unused_directories().await;
        if self.end_with_last_mount(volume.attachment).await {
            self.await_end(volume.attachment).await;
        }
        Ok(())
    }

    /// Unmounts the volume from the mount points that were found and checked, and from no other.
    async fn unmount_all(
        self: &Arc<Self>,
        volume: VolumeId,
        found: &VolumeState,
        shown: &str,
        lazy: bool,
        uid: u32,
    ) -> Result<(), Error> {
        if found.mount_points.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("cannot unmount {shown}: it is not mounted"),
            ));
        }
        // What was mounted last may lie on what was mounted first.
        for path in found.mount_points.iter().rev() {
            let unmounted = self.mounter.unmount(path.clone(), lazy, self.settings().wait_for_mount).await;
            self.refresh_mounts();
            match unmounted {
                Err(error) if !self.is_mounted_at(volume, path) => info!("unmounted all the same: {error}"),
                Err(error) if error.kind == ErrorKind::Busy => return Err(self.in_use(shown, path)),
                Err(error) => return Err(error),
                Ok(()) => {}
            }
            audit(if lazy { "unmounted lazily" } else { "unmounted" }, shown, uid, path);
        }
        Ok(())
    }

    fn is_mounted_at(&self, volume: VolumeId, path: &Path) -> bool {
        let attachment = self.find(volume.attachment);
        let found = attachment.and_then(|attachment| VolumeState::of(&attachment, volume.partition).ok());
        found.is_some_and(|found| found.mount_points.iter().any(|mounted| mounted == path))
    }

    /// What can be seen from the daemon's sandbox: other mounts and loop devices. Which processes use it is
    /// for the client to say.
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
            held_by.push("a process has a file open or its working folder in it".to_owned());
        }
        Error::new(
            ErrorKind::Busy,
            format!(
                "cannot unmount {shown} from {}: {}; end that first, or unmount lazily",
                show(path),
                held_by.join(", ")
            ),
        )
    }

    /// Whether loopd has made each mount of the volume for this user; so too where there is none.
    pub fn is_mounted_for(self: &Arc<Self>, volume: VolumeId, uid: u32) -> bool {
        self.refresh_mounts();
        let attachment = self.find(volume.attachment);
        let found = attachment.and_then(|attachment| VolumeState::of(&attachment, volume.partition).ok());
        found.is_some_and(|found| found.mount_points.iter().all(|path| self.was_mounted_for(path, uid)))
    }
}

/// A disk and its partitions share their bytes: what writes to one damages the other.
fn refuse_mounted(attachment: &Snapshot, found: &VolumeState, partition: Option<u32>) -> Result<(), Error> {
    let shown = found.shown(attachment);
    let refused = |why: String| Err(Error::new(ErrorKind::Busy, format!("cannot mount {shown}: {why}")));
    if let Some(path) = found.mount_points.first() {
        return refused(format!("it is mounted on {} already", show(path)));
    }
    let device = &attachment.device;
    match partition {
        Some(_) => match attachment.mount_points.first() {
            Some(path) => refused(format!(
                "the whole device {} is mounted on {}; unmount that first",
                device.node(),
                show(path)
            )),
            None => Ok(()),
        },
        None => {
            let mounted = attachment.partitions.iter().find_map(|shown| {
                Some((device.partition_node(shown.partition.node.number), shown.mount_points.first()?))
            });
            match mounted {
                Some((node, path)) => {
                    refused(format!("its partition {node} is mounted on {}; unmount that first", show(path)))
                }
                None => Ok(()),
            }
        }
    }
}

fn abandoned(order: &MountCommand) -> Error {
    Error::new(
        ErrorKind::AccessDenied,
        format!(
            "the client vanished, or loopd was asked to end, before {} was mounted, so it was unmounted again",
            order.shown
        ),
    )
}

fn show(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

/// One line for the administrator.
fn audit(what: &str, shown: &str, uid: u32, directory: &Path) {
    info!(uid, mount_point = show(directory), "{what}: {shown}");
}
