//! Detaches devices, and takes their nodes away.

use std::fs;

use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{DetachOptions, ListOptions};
use nix::errno::Errno;

use super::device::Device;
use super::failure::{Failure, Reason};
use super::{listing, say};
use crate::command::detach::{is_busy, is_gone};
use crate::connection::{Bus, explain};
use crate::partition;
use crate::target::{Attached, device_node};

/// Detaches each of them; one that fails does not stop the others. Tells whether all went well.
pub async fn detach(bus: &Bus, devices: &[Device]) -> bool {
    let mut is_done = true;
    for device in devices {
        let detached = match device.number() {
            Ok(number) => detach_number(bus, number).await,
            Err(errno) => Err(errno.into()),
        };
        is_done &= tell(device, "detach failed", detached);
    }
    is_done
}

/// Detaches all that there are. Tells whether all went well.
///
/// # Errors
/// loopd could not be asked what there is.
pub async fn detach_all(bus: &Bus) -> anyhow::Result<bool> {
    let all = listing::all(bus, ListOptions::default()).await?;
    let named = |one: &Attached| Device { path: one.attachment.device.clone().into() };
    Ok(detach(bus, &all.iter().map(named).collect::<Vec<_>>()).await)
}

/// Takes away each of them. Tells whether all went well.
pub async fn remove(bus: &Bus, devices: &[Device]) -> bool {
    let mut is_done = true;
    for device in devices {
        let removed = match device.named_number() {
            Some(number) => remove_number(bus, number).await,
            None => Err(Errno::EINVAL.into()),
        };
        is_done &= tell(device, "remove failed", removed);
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

fn tell(device: &Device, what: &str, result: Result<(), Reason>) -> bool {
    result.map_err(|reason| say(&Failure::of(&device.path, what, &reason))).is_ok()
}

/// As losetup, whoever uses it; but says so where somebody does who is more than a passing user.
async fn detach_number(bus: &Bus, number: u32) -> Result<(), Reason> {
    let node = device_node(number);
    let detach = |lazy| async move {
        bus.manager.detach(&device_node(number), DetachOptions { lazy }).await.map_err(explain)
    };
    match detach(false).await {
        Err(error) if is_busy(&error) => {}
        detached => return detached.map_err(|error| Reason::of(&error)),
    }
    let user = user(bus, number).await;
    match detach(true).await {
        // It went meanwhile.
        Err(error) if is_gone(&error) => return Ok(()),
        detached => detached.map_err(|error| Reason::of(&error))?,
    }
    say(&Failure::new(format!("{node}: still in use ({user}); the last close detaches it")));
    Ok(())
}

/// Who uses it, as far as that can be seen: a mount, or a device that stands on this one.
async fn user(bus: &Bus, number: u32) -> String {
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

/// Where the device and its partitions are mounted.
async fn mounts(bus: &Bus, number: u32) -> anyhow::Result<Vec<String>> {
    let Some(mut attached) = listing::attached_to(bus, number).await? else { return Ok(Vec::new()) };
    partition::add(&bus.connection, std::slice::from_mut(&mut attached)).await?;
    let partitions = attached.partitions.iter().map(|partition| &partition.volume);
    let mounts = std::iter::once(&attached.volume).chain(partitions).flat_map(|one| &one.mount_points);
    Ok(mounts.map(|path| String::from_utf8_lossy(from_bus_path(path)).into_owned()).collect())
}

/// The devices that stand on this one or on a partition of it.
fn holders(number: u32) -> Vec<String> {
    let folder = format!("/sys/block/loop{number}");
    let names = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let prefix = format!("loop{number}p");
    let partitions = names(&folder).into_iter().filter(|name| name.starts_with(&prefix));
    let folders = std::iter::once(folder.clone()).chain(partitions.map(|name| format!("{folder}/{name}")));
    folders.flat_map(|folder| names(&format!("{folder}/holders"))).collect()
}
