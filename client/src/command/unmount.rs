//! `loopctl unmount`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use loopd_dbus::properties::from_bus_path;
use loopd_dbus::proxy::{Attachment, Interaction};
use loopd_dbus::{DetachOptions, Error, ErrorKind, Lifetime, ListOptions, UnmountOptions};
use nix::unistd::getuid;
use zbus::wire::OwnedObjectPath;

use super::detach;
use crate::agent::{Interrupted, with_agent};
use crate::cli::Unmount;
use crate::connection::{self, Bus, explain};
use crate::mount_table::{MountTable, resolve};
use crate::output::{escaped, message, printable, report};
use crate::target::{Attached, Target, attached_at, list};
use crate::volume::{self, Volume};
use crate::{desktop, holder, partition, throwaway};

/// Unmounts the target.
pub async fn run(args: &Unmount, interaction: Interaction) -> anyhow::Result<u8> {
    let results = unmount(args, interaction).await.unwrap_or_else(|error| vec![Err(error)]);
    let mut status = 0;
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        status = status.max(report(error));
        holders_in(error).iter().for_each(|holder| message(holder));
        if args.notify && !error.is::<Interrupted>() {
            let name = printable(args.target.as_bytes());
            desktop::notify(&format!("{name} is not unmounted"), &explanation(error).join("\n")).await;
        }
    }
    Ok(status)
}

/// Each attachment that is meant by itself: one that fails does not stop the others.
async fn unmount(args: &Unmount, interaction: Interaction) -> anyhow::Result<Vec<anyhow::Result<()>>> {
    let bus = connection::open(interaction).await?;
    let orders = find(&bus, &args.target).await?;
    let options = UnmountOptions { lazy: args.lazy };
    with_agent(interaction, async {
        let mut results = Vec::new();
        for order in &orders {
            results.push(carry_out(&bus, order, options).await);
        }
        Ok(results)
    })
    .await
}

/// A file system is in use.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct InUse {
    /// What loopd says.
    pub error: Error,
    /// Who holds it, as far as can be seen.
    pub holders: Vec<String>,
}

/// What is to be unmounted of an attachment.
#[derive(Clone, Debug)]
pub struct Order {
    attached: Attached,
    /// This volume only; `None` stands for all that is mounted.
    only: Option<OwnedObjectPath>,
}

impl Order {
    /// Those that are mounted, what is deepest in the tree first.
    fn mounted(&self) -> Vec<Volume<'_>> {
        let mut volumes = volume::of(&self.attached);
        volumes.retain(|volume| self.only.as_ref().is_none_or(|only| only == volume.path));
        volumes.retain(|volume| volume.mount_points().next().is_some());
        volumes.sort_by_key(|volume| std::cmp::Reverse(volume.mount_points().map(<[u8]>::len).max()));
        volumes
    }

    fn goes_with_its_mounts(&self) -> bool {
        self.attached.attachment.lifetime == Lifetime::Mount.as_str()
    }
}

/// Unmounts it; where the attachment ends with that, it is back when the device is free.
///
/// # Errors
/// [`InUse`], another error of loopd's, or nothing of it is mounted.
pub async fn carry_out(bus: &Bus, order: &Order, options: UnmountOptions) -> anyhow::Result<()> {
    let mounted = order.mounted();
    let device = &order.attached.attachment.device;
    anyhow::ensure!(
        !mounted.is_empty() || (order.goes_with_its_mounts() && order.only.is_none()),
        "{device} is not mounted; `loopctl detach {device}` detaches it"
    );
    for volume in mounted {
        let unmounted = bus.volume(volume.path).await?.unmount(options).await.map_err(explain);
        match unmounted {
            Err(error) if detach::is_gone(&error) => {}
            result => result.map_err(|error| with_holders(error, &volume))?,
        }
    }
    if options.lazy { Ok(()) } else { settle(bus, order).await }
}

/// Adds to a `Busy` who it is.
fn with_holders(error: anyhow::Error, volume: &Volume<'_>) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) if error.kind == ErrorKind::Busy => {
            let points: Vec<&Path> =
                volume.mount_points().map(|point| Path::new(OsStr::from_bytes(point))).collect();
            let found = points.iter().flat_map(|point| holder::of(point));
            let mut holders: Vec<String> = found.map(|holder| holder.to_string()).collect();
            if let (true, Some(point)) = (holders.is_empty(), points.first()) {
                let point = escaped(point.as_os_str().as_bytes());
                holders.push(format!(
                    "which process that is cannot be seen from here; `sudo fuser -vm {point}` shows it"
                ));
            }
            InUse { error, holders }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// Waits for the end of an attachment whose last mount is gone: to detach it is to be told when it is
/// free, or who still holds it.
async fn settle(bus: &Bus, order: &Order) -> anyhow::Result<()> {
    let path = &order.attached.path;
    let Some(attached) = attached_at(bus, path).await? else { return Ok(()) };
    let rest = Order { attached, only: None };
    if !rest.goes_with_its_mounts() || !rest.mounted().is_empty() {
        return Ok(());
    }
    // Nobody is asked for it: it ends by itself, and may be another's.
    let object = path.clone().into_inner();
    let attachment =
        Attachment::new(&bus.connection, object, Interaction::Forbidden).await.map_err(explain)?;
    match attachment.detach(DetachOptions::default()).await.map_err(explain) {
        Err(error) if detach::is_gone(&error) || is_refused(&error) => Ok(()),
        result => result,
    }
}

fn is_refused(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<Error>().map(|error| error.kind);
    matches!(kind, Some(ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired))
}

/// What the word stands for: an image, a device, a partition, or a folder that lies on one of them. At
/// least one attachment.
///
/// # Errors
/// There is none, or loopd could not be asked.
pub async fn find(bus: &Bus, word: &OsStr) -> anyhow::Result<Vec<Order>> {
    let target = Target::resolve(word);
    match &target {
        Target::File(path) if is_folder(path) => return Ok(vec![at_folder(bus, path).await?]),
        Target::Partition { disk, number } => {
            let found = Target::Device(*disk).find(&bus.manager).await?;
            return with_partitions(bus, found)
                .await?
                .into_iter()
                .map(|order| order.of_partition(*number))
                .collect();
        }
        Target::Device(_) | Target::File(_) => {}
    }
    let found = match (target.find(&bus.manager).await, &target) {
        (Ok(found), _) => own_first(found),
        (Err(error), Target::File(path)) => {
            let views = throwaway_views(bus, path).await?;
            if views.is_empty() {
                return Err(error);
            }
            views
        }
        (Err(error), _) => return Err(error),
    };
    let mut orders = with_partitions(bus, found).await?;
    // Those that are attached and not mounted are not meant, where there are others.
    if orders.iter().any(|order| !order.mounted().is_empty()) {
        orders.retain(|order| !order.mounted().is_empty());
    }
    Ok(orders)
}

/// Also a mount point that the user may not look at: another's.
fn is_folder(path: &Path) -> bool {
    path.is_dir() || MountTable::read().is_ok_and(|table| table.holding(path) == Some(path))
}

impl Order {
    fn of_partition(self, number: u32) -> anyhow::Result<Self> {
        let only = volume::choose(&self.attached, Some(number))?.path.clone();
        Ok(Self { only: Some(only), ..self })
    }
}

async fn with_partitions(bus: &Bus, mut found: Vec<Attached>) -> anyhow::Result<Vec<Order>> {
    partition::add(&bus.connection, &mut found).await?;
    Ok(found.into_iter().map(|attached| Order { attached, only: None }).collect())
}

/// The user's own, where there are any: a file may be attached by others as well.
fn own_first(mut found: Vec<Attached>) -> Vec<Attached> {
    let is_own = |attached: &Attached| attached.attachment.owner == getuid().as_raw();
    if found.iter().any(is_own) {
        found.retain(is_own);
    }
    found
}

/// The throwaway views that the user has of the file: their copies have no name, but lie beside it, and
/// their reference is its name.
async fn throwaway_views(bus: &Bus, path: &Path) -> anyhow::Result<Vec<Attached>> {
    let Ok(folder) = throwaway::folder_of(path) else { return Ok(Vec::new()) };
    let reference = throwaway::reference(path);
    let mut found = list(&bus.manager, &ListOptions::default()).await?;
    found.retain(|attached| {
        let attachment = &attached.attachment;
        let copy = Path::new(OsStr::from_bytes(from_bus_path(&attachment.backing_file)));
        let is_nameless = copy.as_os_str().as_bytes().ends_with(b" (deleted)");
        let is_beside = copy.parent() == Some(&folder);
        let is_own = attachment.owner == getuid().as_raw();
        is_own && is_nameless && is_beside && attachment.reference == reference
    });
    Ok(found)
}

/// The volume that the folder lies on.
///
/// # Errors
/// No loop device is mounted there.
async fn at_folder(bus: &Bus, folder: &Path) -> anyhow::Result<Order> {
    let table = MountTable::read()?;
    let real = resolve(folder);
    let shown = printable(folder.as_os_str().as_bytes());
    let none = || {
        anyhow::anyhow!("{shown} is not on a loop device; `loopctl list --all` shows what is mounted where")
    };
    let point = table.holding(&real).ok_or_else(none)?.as_os_str().as_bytes();
    let all = ListOptions { all: true, ..ListOptions::default() };
    for mut order in with_partitions(bus, list(&bus.manager, &all).await?).await? {
        let volumes = volume::of(&order.attached);
        let here = volumes.iter().find(|volume| volume.mount_points().any(|other| other == point));
        let here = here.filter(|volume| is_seen_at(&table, volume, point));
        if let Some(path) = here.map(|volume| volume.path.clone()) {
            order.only = Some(path);
            return Ok(order);
        }
    }
    Err(none())
}

/// Another file system may be mounted on top of the volume's.
fn is_seen_at(table: &MountTable, volume: &Volume<'_>, point: &[u8]) -> bool {
    let device = std::fs::metadata(&volume.properties.device).map(|node| node.rdev());
    device.is_ok_and(|device| table.shows(Path::new(OsStr::from_bytes(point)), device))
}

/// What went wrong, and who is to blame: lines.
#[must_use]
pub fn explanation(error: &anyhow::Error) -> Vec<String> {
    std::iter::once(format!("{error:#}")).chain(holders_in(error).iter().cloned()).collect()
}

fn holders_in(error: &anyhow::Error) -> &[String] {
    error.downcast_ref::<InUse>().map(|in_use| in_use.holders.as_slice()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use loopd_dbus::properties::to_bus_path;

    use super::*;
    use crate::output::json::tests::{example, partition};

    fn order(points: &[&[&str]]) -> Order {
        let mut attached = example();
        attached.partitions = (1..)
            .zip(points)
            .map(|(number, points)| {
                let mut partition = partition(12, number);
                partition.volume.mount_points =
                    points.iter().map(|point| to_bus_path(point.as_bytes())).collect();
                partition
            })
            .collect();
        Order { attached, only: None }
    }

    fn numbers(order: &Order) -> Vec<u32> {
        order.mounted().iter().filter_map(|volume| volume.partition).collect()
    }

    #[test]
    fn what_is_deeper_is_unmounted_first() {
        assert_eq!(numbers(&order(&[&["/a"], &[], &["/b", "/a/b/c"], &["/a/b"]])), [3, 4, 1]);
    }

    #[test]
    fn one_volume_can_be_meant() {
        let order = order(&[&["/a"], &["/b"], &[]]);
        assert_eq!(numbers(&order.clone().of_partition(2).unwrap()), [2]);
        assert_eq!(numbers(&order.clone().of_partition(3).unwrap()), [0; 0]);
        assert!(order.of_partition(4).is_err());
    }

    #[test]
    fn one_s_own_attachments_come_first() {
        let mut others = example();
        others.attachment.owner = getuid().as_raw() + 1;
        let mut own = example();
        own.attachment.owner = getuid().as_raw();
        assert_eq!(own_first(vec![others.clone(), own]).len(), 1);
        assert_eq!(own_first(vec![others.clone(), others]).len(), 2);
    }

    #[test]
    fn whoever_holds_it_is_told_with_a_busy_only() {
        let attached = order(&[&["/nonexistent/a"]]).attached;
        let volume = volume::of(&attached)[1];
        let error = with_holders(Error::new(ErrorKind::Busy, "it is busy").into(), &volume);
        let lines = explanation(&error);
        assert_eq!(lines[0], "it is busy");
        assert!(lines[1].contains("sudo fuser -vm /nonexistent/a"), "{lines:?}");
        let error = with_holders(Error::new(ErrorKind::Kernel, "EIO").into(), &volume);
        assert_eq!(explanation(&error), ["EIO"]);
        assert_eq!(error.downcast::<Error>().unwrap().kind, ErrorKind::Kernel);
    }
}
