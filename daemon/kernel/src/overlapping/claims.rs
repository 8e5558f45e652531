//! Claims the disks that show bytes of a volume.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use loopd_engine::Error;
use loopd_engine::kernel::{Claim, Device, node};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::stack::{self, Extent, Stack, size};
use crate::error::{described, errno_of, is_gone};
use crate::sysfs::{Block, DeviceNumber};
use crate::{users, wait};

fn in_use(operation: &str, name: &str, users: &[String]) -> Error {
    let (users, remedy) = if users.is_empty() {
        (Claim::default().to_string(), "end that first")
    } else {
        (users.join(", "), "use that one, or end it first")
    };
    let reason = format!(
        "{name} shows the same bytes and is {users}; two file systems on the same bytes would destroy each other; \
         {remedy}"
    );
    Error::Busy { operation: operation.to_owned(), reason }
}

fn unanswered(operation: &str, name: &str) -> Error {
    let reason = format!(
        "{name} is in use, and its backing file does not answer, so that it may be the same file; try again when it \
         does"
    );
    Error::Timeout { operation: operation.to_owned(), reason }
}

fn unknown(operation: &str, name: &str, errno: Errno) -> Error {
    let reason = format!(
        "{name} shows the same bytes, and whether it is in use is unknown: open failed with {}",
        described(errno)
    );
    Error::Failed { operation: operation.to_owned(), reason }
}

/// Exclusive claims on disks: while they exist no other program can mount or map those.
#[derive(Debug, Default)]
pub struct Claims(Vec<File>);

impl Drop for Claims {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.0);
        // The last close of a device may write to a backing file.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !files.is_empty() => drop(runtime.spawn_blocking(move || drop(files))),
            _ => drop(files),
        }
    }
}

/// Why a disk was not claimed.
enum Obstacle {
    /// In use, by these users as far as they are known.
    Users(Vec<String>),
    Open(Errno),
}

/// Claims every disk that shows some of these bytes of the device, other than the device itself. `others`
/// are all other loop devices; `None` stands for one whose backing file does not answer. `operation` completes
/// "cannot" in the texts.
///
/// # Errors
/// `Busy` if one is in use, unless neither can be written to; `Timeout` if it is unknown whether that one
/// shows the same bytes; `NotSupported` if too many devices are stacked on each other; `Kernel`, also if sysfs cannot
/// be read.
pub fn claim(
    device: &Device,
    bytes: &Range<u64>,
    others: &[(u32, Option<Device>)],
    operation: &str,
) -> Result<Claims, Error> {
    let known = others.iter().filter_map(|(_, other)| other.as_ref());
    let mut stack = Stack::new(known.chain([device]));
    let (own, below) = stack
        .trace(device.device_number, bytes.clone())
        .map_err(|obstacle| obstacle.refuse(operation, &stack.name(device.device_number)))?;
    let mut disks = overlapping(&mut stack, device, &own, others, operation)?;
    disks.extend(below.iter().map(|disk| (*disk, true)));
    disks.remove(&device.device_number);
    let mut claims = Claims::default();
    for (disk, answers) in disks {
        if is_harmless(device, disk) {
            continue;
        }
        match claim_disk(disk, &below) {
            Ok(claimed) => claims.0.extend(claimed),
            Err(_) if !answers => return Err(unanswered(operation, &stack.name(disk))),
            Err(Obstacle::Users(users)) => return Err(in_use(operation, &stack.name(disk), &users)),
            Err(Obstacle::Open(errno)) => return Err(unknown(operation, &stack.name(disk), errno)),
        }
    }
    Ok(claims)
}

/// Neither of the two can be written to.
fn is_harmless(device: &Device, disk: DeviceNumber) -> bool {
    device.read_only && Block::numbered(disk).is_read_only()
}

/// The other loop devices that show some of these bytes, or may do so, each with whether its backing file
/// answers.
fn overlapping(
    stack: &mut Stack<'_>,
    device: &Device,
    own: &[Extent],
    others: &[(u32, Option<Device>)],
    operation: &str,
) -> Result<BTreeMap<DeviceNumber, bool>, Error> {
    let mut disks = BTreeMap::new();
    for (number, other) in others {
        let Some(other) = other else {
            let disk = Block::of_loop(*number).number();
            let disk =
                disk.map_err(|error| stack::Obstacle::from(error).refuse(operation, &node(*number)))?;
            disks.extend(disk.map(|disk| (disk, false)));
            continue;
        };
        let disk = other.device_number;
        if is_harmless(device, disk) {
            continue;
        }
        let traced = stack.trace(disk, 0..size(disk));
        let (extents, _) = traced.map_err(|obstacle| obstacle.refuse(operation, &stack.name(disk)))?;
        if extents.iter().any(|extent| own.iter().any(|own| extent.overlaps(own))) {
            disks.insert(disk, true);
        }
    }
    Ok(disks)
}

/// Claims the disk; `None` if it is gone, or claimed only by the devices below the volume.
fn claim_disk(disk: DeviceNumber, below: &[DeviceNumber]) -> Result<Option<File>, Obstacle> {
    let Some(node) = Block::numbered(disk).node() else { return Ok(None) };
    let is_claimed_below = || is_claimed_by(disk, below).unwrap_or(false);
    let may_end = || !is_claimed_below() && users::of_disk(disk).is_empty();
    match wait::while_busy(Path::new(&node), || open_exclusively(disk, &node), may_end) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::EBUSY) if is_claimed_below() => Ok(None),
        Err(Errno::EBUSY) => Err(Obstacle::Users(users::of_disk(disk))),
        // The sandbox of the unit allows no other disks than loop devices.
        Err(Errno::EPERM | Errno::EACCES) => match users::of_disk(disk) {
            users if users.is_empty() => Ok(None),
            users => Err(Obstacle::Users(users)),
        },
        Err(errno) if is_gone(errno) => Ok(None),
        Err(errno) => Err(Obstacle::Open(errno)),
    }
}

fn open_exclusively(disk: DeviceNumber, node: &str) -> nix::Result<File> {
    let flags = OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(node)
        .map_err(|error| errno_of(&error))?;
    let opened = file.metadata().map(|metadata| metadata.rdev()).unwrap_or_default();
    if opened == nix::sys::stat::makedev(disk.0.into(), disk.1.into()) {
        Ok(file)
    } else {
        Err(Errno::ENODEV)
    }
}

/// Whether only devices of the stack that the volume is on claim the disk.
fn is_claimed_by(disk: DeviceNumber, below: &[DeviceNumber]) -> io::Result<bool> {
    let mut is_held = false;
    for block in Block::numbered(disk).with_partitions()? {
        for holder in block.holders()? {
            if !holder.number()?.is_some_and(|number| below.contains(&number)) {
                return Ok(false);
            }
            is_held = true;
        }
    }
    Ok(is_held && !users::is_mounted(disk)?)
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;
    use crate::test_descriptors::without_descriptors;

    /// The devices 1 to `count`, each on the one before and the first on a file. None of them exists.
    fn chain(count: u32) -> Vec<Device> {
        let device = |number| Device { number, device_number: (7, 900_000 + number), ..Device::default() };
        let below = |number| (number > 1).then_some((7, 900_000 + number - 1));
        (1..=count).map(|number| Device { backing_block_device: below(number), ..device(number) }).collect()
    }

    fn claim_among(device: &Device, all: &[Device]) -> Result<Claims, Error> {
        let others = all.iter().filter(|other| other.number != device.number);
        let others: Vec<_> = others.map(|other| (other.number, Some(other.clone()))).collect();
        claim(device, &(0..512), &others, "mount x.img")
    }

    #[test]
    fn a_volume_on_too_many_devices_is_refused() {
        let devices = chain(18);
        let error = claim_among(&devices[17], &devices).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
    }

    #[test]
    fn a_volume_is_refused_if_another_device_is_on_too_many_devices() {
        let devices = chain(18);
        let error = claim_among(&devices[0], &devices).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        assert!(error.to_string().starts_with("cannot mount x.img: /dev/loop18"), "{error}");
    }

    #[test]
    fn a_volume_is_refused_if_the_devices_cannot_be_read() {
        let devices = chain(3);
        let error = without_descriptors(|| claim_among(&devices[0], &devices)).unwrap_err();
        assert!(error.to_string().contains("sysfs cannot be read: EMFILE"), "{error}");
        let hung = [(900_001, None)];
        let mut stack = Stack::default();
        let error = without_descriptors(|| overlapping(&mut stack, &devices[1], &[], &hung, "mount x.img"));
        assert!(error.unwrap_err().to_string().contains("/dev/loop900001 shows the same bytes"));
    }

    #[test]
    fn a_claim_of_unknown_users_is_not_one_of_the_devices_below() {
        assert!(without_descriptors(|| is_claimed_by((7, 900_001), &[])).is_err());
    }

    #[test]
    fn disks_that_are_gone_are_not_claimed() {
        let devices = chain(17);
        assert!(claim_among(&devices[16], &devices).unwrap().0.is_empty());
    }
}
