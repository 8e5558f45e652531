//! Detaches devices, and removes their nodes.

use std::fs;

use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{DetachOptions, ListOptions};
use nix::errno::Errno;

use super::device::Device;
use super::failure::{Failure, Reason};
use super::listing;
use crate::bus::attachment::{AttachmentInfo, add_partitions};
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_busy, is_gone};
use crate::device_node::device_node;

/// Detaches the devices; a failure does not stop the others. Returns whether all succeeded.
pub async fn detach(bus: &Bus, devices: &[Device]) -> bool {
    let mut is_done = true;
    for device in devices {
        let detached = match device.number() {
            Ok(number) => detach_number(bus, number).await,
            Err(errno) => Err(errno.into()),
        };
        is_done &= print_failure(device, "detach failed", detached);
    }
    is_done
}

/// Detaches all devices. Returns whether all succeeded.
///
/// # Errors
/// The list could not be read.
pub async fn detach_all(bus: &Bus) -> anyhow::Result<bool> {
    let all = listing::all(bus, ListOptions::default()).await?;
    let named = |one: &AttachmentInfo| Device { path: one.attachment.device.clone().into() };
    Ok(detach(bus, &all.iter().map(named).collect::<Vec<_>>()).await)
}

/// Removes the nodes of the devices. Returns whether all succeeded.
pub async fn remove(bus: &Bus, devices: &[Device]) -> bool {
    let mut is_done = true;
    for device in devices {
        let removed = match device.named_number() {
            Some(number) => remove_number(bus, number).await,
            None => Err(Errno::EINVAL.into()),
        };
        is_done &= print_failure(device, "remove failed", removed);
    }
    is_done
}

async fn remove_number(bus: &Bus, number: u32) -> Result<(), Reason> {
    let removed = bus.manager.remove_device(&device_node(number)).await;
    removed.map_err(|error| match Reason::of(&explain(error)) {
        Reason::Errno(Errno::ENXIO) => Errno::ENODEV.into(),
        reason => reason,
    })
}

fn print_failure(device: &Device, what: &str, result: Result<(), Reason>) -> bool {
    result.map_err(|reason| Failure::of(&device.path, what, &reason).print()).is_ok()
}

/// Detaches the device even if it is in use, as losetup does; but prints a message if it remains in use.
async fn detach_number(bus: &Bus, number: u32) -> Result<(), Reason> {
    let node = device_node(number);
    let detach = |lazy| async move {
        bus.manager.detach(&device_node(number), DetachOptions { lazy }).await.map_err(explain)
    };
    match detach(false).await {
        Err(error) if is_busy(&error) => {}
        detached => return detached.map_err(|error| Reason::of(&error)),
    }
    let user = user_of(bus, number).await;
    match detach(true).await {
        // It was detached in the meantime.
        Err(error) if is_gone(&error) => return Ok(()),
        detached => detached.map_err(|error| Reason::of(&error))?,
    }
    Failure::new(format!("{node}: still in use ({user}); the last close detaches it")).print();
    Ok(())
}

/// The visible users: mounts, or holder devices.
async fn user_of(bus: &Bus, number: u32) -> String {
    let mounts = mounts(bus, number).await.unwrap_or_default();
    if !mounts.is_empty() {
        return format!("mounted on {}", mounts.join(", "));
    }
    let holders = holders(number);
    if holders.is_empty() {
        "opened by a process".to_owned()
    } else {
        format!("held by {}", holders.join(", "))
    }
}

/// The mount points of the device and its partitions.
async fn mounts(bus: &Bus, number: u32) -> anyhow::Result<Vec<String>> {
    let Some(mut info) = listing::attachment_of(bus, number).await? else { return Ok(Vec::new()) };
    add_partitions(&bus.connection, std::slice::from_mut(&mut info)).await?;
    let partitions = info.partitions.iter().map(|partition| &partition.volume);
    let mounts = std::iter::once(&info.volume).chain(partitions).flat_map(|one| &one.mount_points);
    Ok(mounts.map(|path| String::from_utf8_lossy(from_bus_path(path)).into_owned()).collect())
}

/// The holders of the device and its partitions.
fn holders(number: u32) -> Vec<String> {
    let directory = format!("/sys/block/loop{number}");
    let names = |directory: &str| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let prefix = format!("loop{number}p");
    let partitions = names(&directory).into_iter().filter(|name| name.starts_with(&prefix));
    let directories =
        std::iter::once(directory.clone()).chain(partitions.map(|name| format!("{directory}/{name}")));
    directories.flat_map(|directory| names(&format!("{directory}/holders"))).collect()
}
