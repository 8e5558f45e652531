//! Follows stacked devices down to the files and disks whose bytes they show.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Device, FileIdentity};
use nix::errno::Errno;

use crate::error::{described, errno_of};
use crate::sysfs::{Block, DeviceNumber, loop_device};

/// How many devices may be stacked on each other. More than any use of them needs.
const DEEPEST: usize = 16;

/// The bottom of a stack of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    File(FileIdentity),
    Disk(DeviceNumber),
}

/// Bytes of a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    base: Base,
    bytes: Range<u64>,
}

impl Extent {
    /// Whether they have a byte in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.base == other.base && self.bytes.start < other.bytes.end && other.bytes.start < self.bytes.end
    }
}

/// Why a disk was not followed to its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is stacked on more than [`DEEPEST`] devices, or on itself.
    TooDeep,
    /// sysfs cannot be read.
    Unreadable(Errno),
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(errno_of(&error))
    }
}

impl Obstacle {
    /// The error for an operation, if it is unknown whether this disk shows the same bytes. `operation` completes
    /// "cannot".
    pub fn refuse(self, operation: &str, disk: &str) -> Error {
        let operation = operation.to_owned();
        match self {
            Self::TooDeep => {
                let reason = format!(
                    "{disk} is stacked on more than {DEEPEST} other devices, so that it is unknown whether it shows \
                     the same bytes as another one; detach it, or attach the file at the bottom directly"
                );
                Error::NotSupported { operation, reason }
            }
            Self::Unreadable(errno) => {
                let reason = format!(
                    "whether {disk} shows the same bytes as another device is unknown, since sysfs cannot be read: {}; \
                     try again",
                    described(errno)
                );
                Error::Failed { operation, reason }
            }
        }
    }
}

/// Follows stacked devices.
#[derive(Default)]
pub struct Stack<'a> {
    loops: HashMap<DeviceNumber, &'a Device>,
    /// The disks on the way down of the current trace.
    below: Vec<DeviceNumber>,
}

impl<'a> Stack<'a> {
    /// Knows these loop devices.
    pub fn new(loops: impl IntoIterator<Item = &'a Device>) -> Self {
        let loops = loops.into_iter().map(|device| (device.device_number, device)).collect();
        Self { loops, below: Vec::new() }
    }

    /// The sources of bytes of a disk, and the disks on the way. Bytes of a dm or md device may come from any
    /// place on the devices below.
    ///
    /// # Errors
    /// The sources are not all known: there may be others.
    pub fn trace(
        &mut self,
        disk: DeviceNumber,
        bytes: Range<u64>,
    ) -> Result<(Vec<Extent>, Vec<DeviceNumber>), Obstacle> {
        self.below.clear();
        let extents = self.extents(disk, bytes, 0)?;
        Ok((extents, std::mem::take(&mut self.below)))
    }

    fn extents(
        &mut self,
        disk: DeviceNumber,
        bytes: Range<u64>,
        depth: usize,
    ) -> Result<Vec<Extent>, Obstacle> {
        if depth > DEEPEST {
            return Err(Obstacle::TooDeep);
        }
        if let Some(device) = self.loops.get(&disk) {
            // Another program may have changed the offset, which no event reports.
            let offset = loop_device::offset(device.number)?.unwrap_or(device.offset);
            let bytes = moved(&bytes, offset);
            return match device.backing_block_device {
                Some(below) => self.descend(below, bytes, depth),
                None => Ok(vec![Extent { base: Base::File(device.file()), bytes }]),
            };
        }
        let slaves = Block::numbered(disk).slaves()?;
        if slaves.is_empty() {
            return Ok(vec![Extent { base: Base::Disk(disk), bytes }]);
        }
        let mut extents = Vec::new();
        for slave in slaves {
            if let Some(below) = slave.number()? {
                extents.extend(self.descend(below, 0..size(below), depth)?);
            }
        }
        Ok(extents)
    }

    /// The same for a block device that may be a partition.
    fn descend(
        &mut self,
        block: DeviceNumber,
        bytes: Range<u64>,
        depth: usize,
    ) -> Result<Vec<Extent>, Obstacle> {
        let (disk, start) = disk_of(block)?;
        self.below.push(disk);
        self.extents(disk, moved(&bytes, start), depth + 1)
    }

    /// The node of a disk for messages, with the backing file of a loop device.
    pub fn name(&self, disk: DeviceNumber) -> String {
        match self.loops.get(&disk) {
            Some(device) => format!("{} ({})", device.node(), printable(&device.backing_file)),
            None => Block::numbered(disk).node().unwrap_or_else(|| format!("device {}:{}", disk.0, disk.1)),
        }
    }
}

/// The size of a device in bytes; as large as can be if it is unknown.
pub fn size(block: DeviceNumber) -> u64 {
    Block::numbered(block).size().ok().flatten().unwrap_or(u64::MAX)
}

fn moved(bytes: &Range<u64>, by: u64) -> Range<u64> {
    bytes.start.saturating_add(by)..bytes.end.saturating_add(by)
}

/// The disk of a block device, and the offset on the disk in bytes.
fn disk_of(block: DeviceNumber) -> io::Result<(DeviceNumber, u64)> {
    let partition = Block::numbered(block);
    let Some(disk) = partition.disk() else { return Ok((block, 0)) };
    Ok(disk.number()?.zip(partition.start()?).unwrap_or((block, 0)))
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;
    use crate::test_descriptors::without_descriptors;

    /// No such device exists, so that sysfs has none of these numbers.
    fn number(device: u32) -> DeviceNumber {
        (7, 900_000 + device)
    }

    fn on_file(device: u32, inode: u64, offset: u64) -> Device {
        let device_number = number(device);
        Device { number: device_number.1, device_number, backing_inode: inode, offset, ..Device::default() }
    }

    fn on_device(device: u32, below: u32, offset: u64) -> Device {
        Device { backing_block_device: Some(number(below)), ..on_file(device, 0, offset) }
    }

    /// The devices 1 to `count`, each on the one before and the first on a file.
    fn chain(count: u32) -> Vec<Device> {
        let above = (2..=count).map(|device| on_device(device, device - 1, 0));
        std::iter::once(on_file(1, 1, 0)).chain(above).collect()
    }

    #[test]
    fn a_loop_on_a_loop_shows_the_bytes_of_the_file() {
        let devices = [on_file(1, 1, 1000), on_device(2, 1, 200), on_device(3, 2, 30), on_file(4, 2, 0)];
        let mut stack = Stack::new(&devices);
        let (top, below) = stack.trace(number(3), 4..14).unwrap();
        let bottom = |bytes| Extent { base: Base::File(FileIdentity { device: 0, inode: 1 }), bytes };
        assert_eq!(top, [bottom(1234..1244)]);
        assert_eq!(below, [number(2), number(1)]);
        assert!(top[0].overlaps(&bottom(1000..1235)) && top[0].overlaps(&bottom(1243..2000)));
        assert!(!top[0].overlaps(&bottom(1000..1234)) && !top[0].overlaps(&bottom(1244..2000)));
        let (other, _) = stack.trace(number(4), 0..5000).unwrap();
        assert!(!other[0].overlaps(&top[0]));
    }

    #[test]
    fn sixteen_devices_below_another_one_are_followed() {
        let devices = chain(17);
        let (extents, below) = Stack::new(&devices).trace(number(17), 0..512).unwrap();
        assert_eq!((extents.len(), below.len()), (1, 16));
    }

    #[test]
    fn more_stacked_devices_are_refused_with_a_remedy() {
        let devices = chain(18);
        let mut stack = Stack::new(&devices);
        let obstacle = stack.trace(number(18), 0..512).unwrap_err();
        let error = obstacle.refuse("mount x.img", &stack.name(number(18)));
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        for part in ["cannot mount x.img: /dev/loop900018", "more than 16 other devices", "detach it"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_stack_that_contains_itself_is_refused() {
        let devices = [on_device(1, 2, 0), on_device(2, 1, 0)];
        assert_eq!(Stack::new(&devices).trace(number(1), 0..1), Err(Obstacle::TooDeep));
    }

    #[test]
    fn unreadable_devices_are_refused() {
        let devices = [on_file(1, 1, 0), on_device(2, 3, 0)];
        for disk in [1, 2, 3] {
            let traced = without_descriptors(|| Stack::new(&devices).trace(number(disk), 0..1));
            assert_eq!(traced, Err(Obstacle::Unreadable(Errno::EMFILE)), "{disk}");
        }
        let error = Obstacle::Unreadable(Errno::EMFILE).refuse("mount x.img", "/dev/loop3");
        assert_eq!(error.kind(), ErrorKind::Kernel);
        assert!(error.to_string().contains("/dev/loop3 shows the same bytes"), "{error}");
        assert!(error.to_string().contains("EMFILE"), "{error}");
    }

    #[test]
    fn the_minor_number_need_not_be_the_number_of_the_device() {
        // With the module parameter max_part=15 the minor number of /dev/loopN is 16 N.
        let mut device = on_file(1, 1, 0);
        device.device_number = number(16);
        let devices = [device];
        let (extents, _) = Stack::new(&devices).trace(number(16), 0..1).unwrap();
        assert_eq!(extents[0].base, Base::File(FileIdentity { device: 0, inode: 1 }));
    }
}
