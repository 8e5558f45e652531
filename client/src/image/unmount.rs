//! Unmounts an image, a device, a partition or a directory.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use loopd_dbus::properties::from_bus_path;
use loopd_dbus::proxy::{Attachment, Interaction};
use loopd_dbus::{DetachOptions, Error, ErrorKind, Lifetime, ListOptions, UnmountOptions};
use nix::unistd::getuid;
use zbus::wire::OwnedObjectPath;

use super::file_state::{DELETED, add_file_states};
use super::mount_table::{MountTable, resolve};
use super::target::Target;
use super::unlock::lock;
use super::volume::{self, Volume};
use super::{busy_device, holder, throwaway};
use crate::bus::attachment::{self, AttachmentInfo, FileState, add_partitions, list};
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_gone, is_refused};
use crate::in_use::InUse;
use crate::message::{escaped, printable};

/// An attachment to unmount.
#[derive(Clone, Debug)]
pub struct UnmountRequest {
    info: AttachmentInfo,
    /// Unmount this volume only; `None` for every mounted one.
    only: Option<OwnedObjectPath>,
}

impl UnmountRequest {
    /// The mounted volumes, deepest mount point first. An unlocked one is mounted if its cleartext is.
    fn mounted(&self) -> Vec<Volume<'_>> {
        let mut volumes = volume::of(&self.info);
        volumes.retain(|volume| self.only.as_ref().is_none_or(|only| only == volume.path));
        volumes.iter_mut().for_each(|volume| *volume = volume.content());
        volumes.retain(|volume| volume.mount_points().next().is_some());
        volumes.sort_by_key(|volume| std::cmp::Reverse(volume.mount_points().map(<[u8]>::len).max()));
        volumes
    }

    fn ends_with_its_mounts(&self) -> bool {
        self.info.attachment.lifetime == Lifetime::Mount.as_str()
    }

    fn of_partition(self, number: u32) -> anyhow::Result<Self> {
        let only = volume::choose(&self.info, Some(number))?.path.clone();
        Ok(Self { only: Some(only), ..self })
    }
}

/// Unmounts, and locks encrypted volumes after that; if the attachment ends with its last mount, returns after the device is
/// free.
///
/// # Errors
/// [`InUse`], another error of loopd's, or nothing is mounted.
pub async fn unmount(bus: &Bus, request: &UnmountRequest, options: UnmountOptions) -> anyhow::Result<()> {
    let mounted = request.mounted();
    let device = &request.info.attachment.device;
    anyhow::ensure!(
        !mounted.is_empty() || (request.ends_with_its_mounts() && request.only.is_none()),
        "{device} is not mounted; `loopctl detach {device}` detaches it"
    );
    for volume in mounted {
        let unmounted = bus.volume(volume.path).await?.unmount(options).await.map_err(explain);
        match unmounted {
            Err(error) if is_gone(&error) => {}
            result => result.map_err(|error| with_holders(error, &volume))?,
        }
        if let Some(encrypted) = volume.encrypted {
            // loopd itself may be about to lock it.
            lock(bus, encrypted, options.lazy).await?;
        }
    }
    if options.lazy { Ok(()) } else { wait_for_detach(bus, request).await }
}

/// Adds the holders to a `Busy`.
fn with_holders(error: anyhow::Error, volume: &Volume<'_>) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) if error.kind == ErrorKind::Busy => {
            let points: Vec<&Path> =
                volume.mount_points().map(|point| Path::new(OsStr::from_bytes(point))).collect();
            let found = points.iter().flat_map(|point| holder::of(point));
            let mut holders: Vec<String> = found.map(|holder| holder.to_string()).collect();
            if let (true, Some(point)) = (holders.is_empty(), points.first()) {
                let point = escaped(point.as_os_str().as_bytes());
                holders.push(format!("the process is not visible to you; `sudo fuser -vm {point}` shows it"));
            }
            InUse { error, holders }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// Waits for the end of an attachment whose last mount is gone. A detach call returns when the device is
/// free, or with its users.
async fn wait_for_detach(bus: &Bus, request: &UnmountRequest) -> anyhow::Result<()> {
    let path = &request.info.path;
    let Some(info) = attachment::find(bus, path).await? else { return Ok(()) };
    let rest = UnmountRequest { info, only: None };
    if !rest.ends_with_its_mounts() || !rest.mounted().is_empty() {
        return Ok(());
    }
    // Without a prompt: the attachment ends anyway, and may belong to another user.
    let object = path.clone().into_inner();
    let attachment =
        Attachment::new(&bus.connection, object, Interaction::Forbidden).await.map_err(explain)?;
    match attachment.detach(DetachOptions::default()).await.map_err(explain) {
        Err(error) if is_gone(&error) || is_refused(&error) => Ok(()),
        Err(error) => Err(busy_device::explained(bus, error, rest.info.attachment.number).await),
        Ok(()) => Ok(()),
    }
}

/// Finds what an argument names: an image, a device, a partition, or a directory on one of them. Returns
/// at least one request.
///
/// # Errors
/// There is none, or the call failed.
pub async fn find(bus: &Bus, argument: &OsStr) -> anyhow::Result<Vec<UnmountRequest>> {
    let target = Target::resolve(argument);
    match &target {
        Target::File(path) if is_directory(path) => return Ok(vec![at_directory(bus, path).await?]),
        Target::Partition { disk, number } => {
            let found = Target::Device(*disk).find(&bus.manager).await?;
            return with_partitions(bus, found)
                .await?
                .into_iter()
                .map(|request| request.of_partition(*number))
                .collect();
        }
        Target::Device(_) | Target::File(_) => {}
    }
    let found = match (target.find(&bus.manager).await, &target) {
        (Ok(found), _) => prefer_own(found),
        (Err(error), Target::File(path)) => {
            let views = throwaway_views(bus, path).await?;
            if views.is_empty() {
                return Err(error);
            }
            views
        }
        (Err(error), _) => return Err(error),
    };
    let mut requests = with_partitions(bus, found).await?;
    // If any attachment is mounted, the unmounted ones are ignored.
    if requests.iter().any(|request| !request.mounted().is_empty()) {
        requests.retain(|request| !request.mounted().is_empty());
    }
    Ok(requests)
}

/// Also a mount point of another user, which this one may not read.
fn is_directory(path: &Path) -> bool {
    path.is_dir() || MountTable::read().is_ok_and(|table| table.holding(path) == Some(path))
}

async fn with_partitions(bus: &Bus, mut found: Vec<AttachmentInfo>) -> anyhow::Result<Vec<UnmountRequest>> {
    add_partitions(&bus.connection, &mut found).await?;
    Ok(found.into_iter().map(|info| UnmountRequest { info, only: None }).collect())
}

/// The user's own attachments if there are any: other users may have attached the same file.
fn prefer_own(mut found: Vec<AttachmentInfo>) -> Vec<AttachmentInfo> {
    let is_own = |info: &AttachmentInfo| info.attachment.owner == getuid().as_raw();
    if found.iter().any(is_own) {
        found.retain(is_own);
    }
    found
}

/// The user's throwaway views of the file. Their copies have no name, but are in the same directory, and
/// their reference is the file's name.
async fn throwaway_views(bus: &Bus, path: &Path) -> anyhow::Result<Vec<AttachmentInfo>> {
    let Ok(directory) = throwaway::directory_of(path) else { return Ok(Vec::new()) };
    let reference = throwaway::reference(path);
    let mut found = list(&bus.manager, &ListOptions::default()).await?;
    found.retain(|info| {
        let attachment = &info.attachment;
        let copy = Path::new(OsStr::from_bytes(from_bus_path(&attachment.backing_file)));
        let is_unnamed = copy.as_os_str().as_bytes().ends_with(DELETED);
        let is_beside = copy.parent() == Some(&directory);
        let is_own = attachment.owner == getuid().as_raw();
        is_own && is_unnamed && is_beside && attachment.reference == reference
    });
    // The name of a file may also end like this.
    add_file_states(&mut found).await;
    found.retain(|info| info.file_state != Some(FileState::Present));
    Ok(found)
}

/// The volume on which the directory lies.
///
/// # Errors
/// It is not on a loop device.
async fn at_directory(bus: &Bus, directory: &Path) -> anyhow::Result<UnmountRequest> {
    let table = MountTable::read()?;
    let real = resolve(directory);
    let shown = printable(directory.as_os_str().as_bytes());
    let none =
        || anyhow::anyhow!("{shown} is not on a loop device; `loopctl list --all` shows the mount points");
    let point = table.holding(&real).ok_or_else(none)?.as_os_str().as_bytes();
    let all = ListOptions { all: true, ..ListOptions::default() };
    for mut request in with_partitions(bus, list(&bus.manager, &all).await?).await? {
        let volumes = volume::of(&request.info);
        let is_here = |volume: &&Volume<'_>| {
            let content = volume.content();
            content.mount_points().any(|other| other == point) && is_topmost(&table, &content, point)
        };
        let here = volumes.iter().find(is_here);
        if let Some(path) = here.map(|volume| volume.path.clone()) {
            request.only = Some(path);
            return Ok(request);
        }
    }
    Err(none())
}

/// Whether no other file system is mounted over the volume's.
fn is_topmost(table: &MountTable, volume: &Volume<'_>, point: &[u8]) -> bool {
    let device = std::fs::metadata(&volume.properties.device).map(|node| node.rdev());
    device.is_ok_and(|device| table.shows(Path::new(OsStr::from_bytes(point)), device))
}

#[cfg(test)]
mod tests {
    use loopd_dbus::properties::to_bus_path;

    use super::*;
    use crate::bus::example::{attachment, cleartext, partition};
    use crate::bus::fake::FakeLoopd;
    use crate::in_use::explanation;

    fn request(points: &[&[&str]]) -> UnmountRequest {
        let mut info = attachment();
        info.partitions = (1..)
            .zip(points)
            .map(|(number, points)| {
                let mut partition = partition(12, number);
                partition.volume.mount_points =
                    points.iter().map(|point| to_bus_path(point.as_bytes())).collect();
                partition
            })
            .collect();
        UnmountRequest { info, only: None }
    }

    fn numbers(request: &UnmountRequest) -> Vec<u32> {
        request.mounted().iter().filter_map(|volume| volume.partition).collect()
    }

    #[test]
    fn the_deepest_mount_point_is_unmounted_first() {
        assert_eq!(numbers(&request(&[&["/a"], &[], &["/b", "/a/b/c"], &["/a/b"]])), [3, 4, 1]);
    }

    #[test]
    fn the_cleartext_of_a_volume_is_unmounted() {
        let mut request = request(&[&[]]);
        request.info.partitions[0].cleartext = Some(cleartext(Some(1)));
        assert!(request.mounted().is_empty());
        let unlocked = request.info.partitions[0].cleartext.as_mut().unwrap();
        unlocked.volume.mount_points = vec![to_bus_path(b"/a")];
        let request = request.of_partition(1).unwrap();
        let [mounted] = request.mounted()[..] else { panic!("{request:?}") };
        assert_eq!(mounted.path.as_str(), "/org/loopd1/attachment/12/p1/cleartext");
        assert_eq!(mounted.encrypted, Some(&request.info.partitions[0].path));
    }

    #[test]
    fn an_encrypted_volume_is_locked_after_its_unmount_and_then_detached() {
        for (lifetime, calls) in [
            ("persistent", &["Unmount 12/cleartext", "Lock 12"][..]),
            ("mount", &["Unmount 12/cleartext", "Lock 12", "Detach 12"]),
        ] {
            let mut info = request(&[]).info;
            info.attachment.lifetime = lifetime.to_owned();
            info.cleartext = Some(cleartext(None));
            info.cleartext.as_mut().unwrap().volume.mount_points = vec![to_bus_path(b"/nonexistent/a")];
            let loopd = FakeLoopd::new(info.clone());
            loopd.state().is_attached = true;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let unmounted = runtime.block_on(async {
                let bus = loopd.connect().await;
                unmount(&bus, &UnmountRequest { info, only: None }, UnmountOptions::default()).await
            });
            unmounted.unwrap();
            assert_eq!(loopd.state().calls, calls);
        }
    }

    #[test]
    fn a_request_can_be_limited_to_one_partition() {
        let request = request(&[&["/a"], &["/b"], &[]]);
        assert_eq!(numbers(&request.clone().of_partition(2).unwrap()), [2]);
        assert_eq!(numbers(&request.clone().of_partition(3).unwrap()), [0; 0]);
        assert!(request.of_partition(4).is_err());
    }

    #[test]
    fn own_attachments_are_preferred() {
        let mut foreign = attachment();
        foreign.attachment.owner = getuid().as_raw() + 1;
        let mut own = attachment();
        own.attachment.owner = getuid().as_raw();
        assert_eq!(prefer_own(vec![foreign.clone(), own]).len(), 1);
        assert_eq!(prefer_own(vec![foreign.clone(), foreign]).len(), 2);
    }

    #[test]
    fn holders_are_listed_for_busy_only() {
        let info = request(&[&["/nonexistent/a"]]).info;
        let volume = volume::of(&info)[1];
        let error = with_holders(Error::new(ErrorKind::Busy, "it is busy").into(), &volume);
        let lines = explanation(&error);
        assert_eq!(lines[0], "it is busy");
        assert!(lines[1].contains("sudo fuser -vm /nonexistent/a"), "{lines:?}");
        let error = with_holders(Error::new(ErrorKind::Kernel, "EIO").into(), &volume);
        assert_eq!(explanation(&error), ["EIO"]);
        assert_eq!(error.downcast::<Error>().unwrap().kind, ErrorKind::Kernel);
    }
}
