//! Mounting and unmounting the volumes of attachments. Whatever fails on the way undoes the steps before
//! it.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Error, ErrorKind, State};
use tokio::time::Instant;
use tracing::info;

use super::attach::Caller;
use super::attachment::Record;
use super::detach::gone;
use super::mount_plan::{Plan, Volume};
use super::observe::HANGS;
use super::{Engine, MountRequest, Snapshot, ext_journal, mount_name, superblock};
use crate::kernel::{Device, DiskSequence, FileSystem, Kernel};
use loopd_common::text::printable;

/// What is done meanwhile, and what comes of it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Whom something is mounted for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The uid.
    pub uid: u32,
    /// The primary group; `None` where the uid has no entry in the user database.
    pub gid: Option<u32>,
    /// The name, fit to be a folder's.
    pub name: String,
}

/// A mount to be made.
#[derive(Clone, Debug)]
pub struct MountCommand {
    /// The device node.
    pub device: String,
    /// The same with the file that is attached, for people.
    pub shown: String,
    /// The folder to mount it on.
    pub place: PathBuf,
    /// The kernel's name of the file system.
    pub kind: String,
    /// The checked options.
    pub options: String,
    /// Whether the device cannot be written to.
    pub read_only: bool,
    /// Whom it is for.
    pub account: Account,
    /// How long it may take.
    pub patience: Duration,
}

/// Who mounts, in the name space that everyone sees.
///
/// Dropping a future does not undo what it began: [`Mounter::undo`] does.
pub trait Mounter: Send + Sync + 'static {
    /// What the user database has of a uid.
    fn account(&self, uid: u32) -> BoxFuture<'_, Account>;

    /// The folder for this name of this user.
    fn path(&self, account: &Account, name: &str) -> PathBuf;

    /// Whether there is something by that name.
    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool>;

    /// Makes that folder, which only this user may get to; false where something by that name is there.
    fn make(&self, path: PathBuf, uid: u32) -> BoxFuture<'_, Result<bool, Error>>;

    /// Mounts; fails with `NotSupported` where nobody is there to do it, or with `Timeout`.
    fn mount(&self, order: MountCommand) -> BoxFuture<'_, Result<(), Error>>;

    /// Unmounts, whoever has mounted; fails with `Busy` where it is in use and that was not to be lazily.
    fn unmount(&self, path: PathBuf, lazy: bool, patience: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Has nothing be mounted there, and nothing be about to.
    fn undo(&self, path: PathBuf, patience: Duration) -> BoxFuture<'_, ()>;

    /// Removes an empty folder that was made for a mount. One that is gone is no error.
    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>>;
}

/// An attachment's whole device, or a partition of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeId {
    /// The attachment.
    pub attachment: DiskSequence,
    /// N of `/dev/loop0pN`.
    pub partition: Option<u32>,
}

/// What is known of a volume.
struct Found {
    node: String,
    /// In bytes, on the device.
    start: u64,
    /// In bytes.
    size: u64,
    file_system: FileSystem,
    mount_points: Vec<PathBuf>,
}

impl Found {
    fn of(attachment: &Snapshot, partition: Option<u32>) -> Result<Self, Error> {
        let Some(number) = partition else {
            return Ok(Self {
                node: attachment.device.node(),
                start: 0,
                size: attachment.device.size,
                file_system: attachment.file_system.clone(),
                mount_points: attachment.mount_points.clone(),
            });
        };
        let node = attachment.device.partition_node(number);
        let found = attachment.partitions.iter().find(|shown| shown.partition.node.number == number);
        let found =
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("the partition {node} is gone")))?;
        Ok(Self {
            node,
            start: found.partition.node.start,
            size: found.partition.node.size,
            file_system: found.file_system.clone(),
            mount_points: found.mount_points.clone(),
        })
    }

    fn shown(&self, attachment: &Snapshot) -> String {
        format!("{} ({})", self.node, printable(&attachment.device.backing_file))
    }
}

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
        self.look_at_mounts();
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let _alone_with_file = self.mount_locks.lock(attachment.device.file()).await;
        let found = Found::of(&attachment, volume.partition)?;
        let account = self.mounter.account(caller.uid()).await;
        let plan = self.plan(&attachment, &found, volume.partition, wanted, &account)?;
        refuse_mounted(&attachment, &found, volume.partition)?;
        // First: what is mounted elsewhere looks damaged or foreign from here.
        let _claims = self.claim_overlapping(&attachment, &found).await?;
        self.refuse_unreplayed(&attachment, &found, &plan).await?;
        let members = self.obey_superblock(&attachment, &found, &plan).await?;
        let name = mount_name::of_volume(&found.file_system, &attachment);
        let place = self.make_place(&account, &name).await?;
        let order = MountCommand {
            shown: found.shown(&attachment),
            device: found.node,
            place: place.clone(),
            kind: plan.kind,
            options: [plan.options].into_iter().chain(members).collect::<Vec<_>>().join(","),
            read_only: attachment.device.read_only,
            account,
            patience: self.settings().wait_for_mount,
        };
        match self.carry_out(&order, volume, caller).await {
            Ok(()) => {
                audit("mounted", &order.shown, caller.uid(), &place);
                Ok(place)
            }
            Err(error) => {
                self.unmake_place(&place).await;
                Err(error)
            }
        }
    }

    fn plan(
        &self,
        attachment: &Snapshot,
        found: &Found,
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
        let volume = Volume {
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
        found: &Found,
    ) -> Result<K::Claims, Error> {
        let bytes = found.start..found.start.saturating_add(found.size);
        self.claim_others(&attachment.device, bytes, format!("cannot mount {}", found.shown(attachment)))
            .await
    }

    /// Claims every other device that shows some of these bytes of the device. See
    /// [`Kernel::claim_overlapping`].
    pub(super) async fn claim_others(
        self: &Arc<Self>,
        device: &Device,
        bytes: Range<u64>,
        asked: String,
    ) -> Result<K::Claims, Error> {
        let others = self.other_devices(device.number).await;
        let claiming = self.kernel.claim_overlapping(device, bytes, others, asked.clone());
        tokio::time::timeout(HANGS, claiming).await.unwrap_or_else(|_| {
            let why = "whether another device with the same bytes is in use cannot be told in time";
            Err(Error::new(ErrorKind::Timeout, format!("{asked}: {why}; try again later")))
        })
    }

    /// The kernel would say no more than that it is read-only.
    async fn refuse_unreplayed(
        &self,
        attachment: &Snapshot,
        found: &Found,
        plan: &Plan,
    ) -> Result<(), Error> {
        let may_need_it = matches!(plan.kind.as_str(), "ext3" | "ext4");
        if !may_need_it || plan.skips_journal || !attachment.device.read_only {
            return Ok(());
        }
        let device = &attachment.device;
        let offset = found.start + ext_journal::SUPERBLOCK;
        let bytes =
            self.kernel.read(device.number, device.disk_sequence, offset, ext_journal::LENGTH).await?;
        if !ext_journal::needs_replay(&bytes) {
            return Ok(());
        }
        let shown = found.shown(attachment);
        Err(Error::new(
            ErrorKind::NotSupported,
            format!(
                "cannot mount {shown}: its journal has to be replayed first, and the device is read-only; attach it \
                 writable, or mount a copy of the image that is thrown away, or see what is there \
                 without the last changes (option noload)"
            ),
        ))
    }

    /// Refuses what its superblock makes a danger to others. Returns the options that name the other
    /// devices of a btrfs over several.
    async fn obey_superblock(
        &self,
        attachment: &Snapshot,
        found: &Found,
        plan: &Plan,
    ) -> Result<Vec<String>, Error> {
        let device = &attachment.device;
        let mut parts = Vec::new();
        for (offset, length) in superblock::extents(&plan.kind) {
            let offset = found.start + offset;
            parts.push(self.kernel.read(device.number, device.disk_sequence, offset, *length).await?);
        }
        let shown = found.shown(attachment);
        if let Some(why) = superblock::demand(&plan.kind, &parts, plan.skips_journal) {
            return Err(Error::new(ErrorKind::NotSupported, format!("cannot mount {shown}: {why}")));
        }
        match parts.first().and_then(|part| superblock::btrfs_uuid(part)) {
            Some(uuid) if plan.kind == "btrfs" => self.btrfs_members(attachment, found, &uuid).await,
            _ => Ok(Vec::new()),
        }
    }

    /// The kernel knows a btrfs by its UUID alone: it would open every other device that it has seen
    /// with that UUID. udev shows it none of a user's devices, so the user's own are named.
    async fn btrfs_members(
        &self,
        attachment: &Snapshot,
        found: &Found,
        uuid: &str,
    ) -> Result<Vec<String>, Error> {
        let Some(owner) = attachment.ownership.as_ref().map(|owner| owner.uid).filter(|uid| *uid != 0) else {
            return Ok(Vec::new());
        };
        let others = self.kernel.btrfs(uuid).await?;
        let refused = |devices: &[String], why: &str| {
            Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "cannot mount {}: {why} has the same UUID {uuid} ({}), and btrfs would take one for the \
                     other; give the image a new one (btrfstune -u)",
                    found.shown(attachment),
                    devices.join(", ")
                ),
            ))
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
            disk.into_iter().chain(nodes).collect::<Vec<_>>()
        };
        self.list().iter().filter(|shown| is_own(shown)).flat_map(volumes).collect()
    }

    /// Has it mounted, unless the caller vanishes or the daemon ends meanwhile.
    async fn carry_out(
        self: &Arc<Self>,
        order: &MountCommand,
        volume: VolumeId,
        caller: &impl Caller,
    ) -> Result<(), Error> {
        tokio::select! {
            biased;
            () = caller.disconnected() => return Err(abandoned(order)),
            () = self.given_up() => return Err(abandoned(order)),
            mounted = self.mounter.mount(order.clone()) => mounted?,
        }
        self.look_at_mounts();
        // Its number may have been attached again by then: what is mounted keeps it now.
        if self.look_whether_gone(volume.attachment) {
            return Err(gone(volume.attachment));
        }
        let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
        let found = Found::of(&attachment, volume.partition)?;
        if !found.mount_points.contains(&order.place) {
            let message =
                format!("{} was unmounted again by another program before it was ready", order.shown);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        if caller.is_disconnected() {
            return Err(abandoned(order));
        }
        self.settle_place(&order.place)
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
            self.look_at_mounts();
            let attachment = self.find(volume.attachment).ok_or_else(|| gone(volume.attachment))?;
            let found = Found::of(&attachment, volume.partition)?;
            if own_only && !found.mount_points.iter().all(|path| self.has_made(path, uid)) {
                return Err(Error::new(
                    ErrorKind::AccessDenied,
                    "it was mounted elsewhere in the meantime, by or for somebody else; try again",
                ));
            }
            self.unmount_all(volume, &found, &found.shown(&attachment), lazy, uid).await?;
        }
        self.clear_places().await;
        if self.end_with_last_mount(volume.attachment).await {
            self.await_end(volume.attachment).await;
        }
        Ok(())
    }

    /// Unmounts the volume from the mount points that were found and checked, and from no other.
    async fn unmount_all(
        self: &Arc<Self>,
        volume: VolumeId,
        found: &Found,
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
            self.look_at_mounts();
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
        let found = attachment.and_then(|attachment| Found::of(&attachment, volume.partition).ok());
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
        self.look_at_mounts();
        let attachment = self.find(volume.attachment);
        let found = attachment.and_then(|attachment| Found::of(&attachment, volume.partition).ok());
        found.is_some_and(|found| found.mount_points.iter().all(|path| self.has_made(path, uid)))
    }

    /// The table may have changed since we were told.
    pub(super) fn look_at_mounts(self: &Arc<Self>) {
        if let Some(table) = self.kernel.mounts() {
            self.mounts_changed(table);
        }
    }
}

/// A disk and its partitions share their bytes: what writes to one damages the other.
fn refuse_mounted(attachment: &Snapshot, found: &Found, partition: Option<u32>) -> Result<(), Error> {
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
fn audit(what: &str, shown: &str, uid: u32, place: &Path) {
    info!(uid, mount_point = show(place), "{what}: {shown}");
}
