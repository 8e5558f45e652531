//! Detaches devices, and takes their nodes away.

use std::fs;
use std::time::Duration;

use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{DetachOptions, ListOptions, State};
use nix::errno::Errno;
use tokio::time::{Instant, sleep};

use super::device::Device;
use super::failure::{Failure, Reason};
use super::{listing, say};
use crate::connection::{Bus, explain};
use crate::partition;
use crate::target::{Attached, device_node};

/// How long a passing user, such as a probe of udev, may keep a device.
const PASSING: Duration = Duration::from_secs(1);
const GLANCE: Duration = Duration::from_millis(5);

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

/// A passing user is waited for.
async fn remove_number(bus: &Bus, number: u32) -> Result<(), Reason> {
    let start = Instant::now();
    loop {
        let removed = bus.manager.remove_device(&device_node(number)).await;
        let Err(reason) = removed.map_err(|error| Reason::of(&explain(error))) else { return Ok(()) };
        match reason {
            Reason::Errno(Errno::ENXIO) => return Err(Errno::ENODEV.into()),
            Reason::Errno(Errno::EBUSY) if start.elapsed() < PASSING => {
                if !matches!(listing::attached_to(bus, number).await, Ok(None)) {
                    return Err(reason);
                }
            }
            reason => return Err(reason),
        }
        sleep(GLANCE).await;
    }
}

fn tell(device: &Device, what: &str, result: Result<(), Reason>) -> bool {
    result.map_err(|reason| say(&Failure::of(&device.path, what, &reason))).is_ok()
}

/// As losetup, without waiting for those who use it; but says so where somebody does.
async fn detach_number(bus: &Bus, number: u32) -> Result<(), Reason> {
    let node = device_node(number);
    let detached = bus.manager.detach(&node, DetachOptions { lazy: true }).await;
    detached.map_err(|error| Reason::of(&explain(error)))?;
    // The detach is done, whatever becomes of the look at it.
    if let Ok(Some(user)) = who_stays(bus, number).await {
        say(&Failure::new(format!("{node}: still in use ({user}); the last close detaches it")));
    }
    Ok(())
}

/// Who still uses the device that is being detached; nobody where it is gone.
async fn who_stays(bus: &Bus, number: u32) -> anyhow::Result<Option<String>> {
    let start = Instant::now();
    loop {
        let attached = listing::attached_to(bus, number).await?;
        let is_going = |one: &Attached| one.attachment.state == State::Detaching.as_str();
        let Some(attached) = attached.filter(is_going) else { return Ok(None) };
        let user = user(bus, attached).await?;
        if user.is_some() || start.elapsed() > PASSING {
            return Ok(Some(user.unwrap_or_else(|| "opened by a process".to_owned())));
        }
        sleep(GLANCE).await;
    }
}

/// A user that stays: a mount, or a device that stands on this one.
async fn user(bus: &Bus, mut attached: Attached) -> anyhow::Result<Option<String>> {
    partition::add(&bus.connection, std::slice::from_mut(&mut attached)).await?;
    let partitions = attached.partitions.iter().map(|partition| &partition.volume);
    let mounts = std::iter::once(&attached.volume).chain(partitions).flat_map(|one| &one.mount_points);
    let mounts: Vec<_> = mounts.map(|path| String::from_utf8_lossy(from_bus_path(path))).collect();
    if !mounts.is_empty() {
        return Ok(Some(format!("mounted on {}", mounts.join(", "))));
    }
    let holders = holders(attached.attachment.number);
    Ok((!holders.is_empty()).then(|| format!("held by {}", holders.join(", "))))
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
