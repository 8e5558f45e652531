//! Follows stacked devices down to the files and disks whose bytes they show.

use std::collections::HashMap;
use std::ops::Range;

use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Device, FileIdentity};

use crate::sysfs::{Block, DeviceNumber, loop_device};

/// How many devices may be stacked on each other. More than any use of them needs.
const DEEPEST: usize = 16;

/// What is at the bottom of a stack of devices.
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

/// A stack of more than [`DEEPEST`] devices, or one that contains itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooDeep {
    /// The disk at the top.
    disk: DeviceNumber,
}

impl TooDeep {
    /// The error for a volume if this leaves its overlaps unknown. `operation` completes "cannot".
    pub fn refuse(self, stack: &Stack<'_>, operation: &str) -> Error {
        let reason = format!(
            "{} is stacked on more than {DEEPEST} other devices, so that it is unknown whether it shows the same bytes \
             as another one; detach it, or attach the file at the bottom directly",
            stack.name(self.disk)
        );
        Error::NotSupported { operation: operation.to_owned(), reason }
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
    pub fn trace(
        &mut self,
        disk: DeviceNumber,
        bytes: Range<u64>,
    ) -> Result<(Vec<Extent>, Vec<DeviceNumber>), TooDeep> {
        self.below.clear();
        let extents = self.extents(disk, bytes, 0).ok_or(TooDeep { disk })?;
        Ok((extents, std::mem::take(&mut self.below)))
    }

    /// `None` if the stack is too deep.
    fn extents(&mut self, disk: DeviceNumber, bytes: Range<u64>, depth: usize) -> Option<Vec<Extent>> {
        if depth > DEEPEST {
            return None;
        }
        if let Some(device) = self.loops.get(&disk) {
            // Another program may have changed the offset, which no event reports.
            let offset = loop_device::offset(device.number).unwrap_or(device.offset);
            let bytes = moved(&bytes, offset);
            return match device.backing_block_device {
                Some(below) => self.descend(below, bytes, depth),
                None => Some(vec![Extent { base: Base::File(device.file()), bytes }]),
            };
        }
        let slaves = Block::numbered(disk).slaves();
        if slaves.is_empty() {
            return Some(vec![Extent { base: Base::Disk(disk), bytes }]);
        }
        let mut extents = Vec::new();
        for below in slaves.iter().filter_map(Block::number) {
            extents.extend(self.descend(below, 0..size(below), depth)?);
        }
        Some(extents)
    }

    /// The same for a block device that may be a partition.
    fn descend(&mut self, block: DeviceNumber, bytes: Range<u64>, depth: usize) -> Option<Vec<Extent>> {
        let (disk, start) = disk_of(block);
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
    Block::numbered(block).size().unwrap_or(u64::MAX)
}

fn moved(bytes: &Range<u64>, by: u64) -> Range<u64> {
    bytes.start.saturating_add(by)..bytes.end.saturating_add(by)
}

/// The disk of a block device, and the offset on the disk in bytes.
fn disk_of(block: DeviceNumber) -> (DeviceNumber, u64) {
    let partition = Block::numbered(block);
    let disk = partition.disk().and_then(|disk| disk.number());
    disk.zip(partition.start()).unwrap_or((block, 0))
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;

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
        let too_deep = stack.trace(number(18), 0..512).unwrap_err();
        let error = too_deep.refuse(&stack, "mount x.img");
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        for part in ["cannot mount x.img: /dev/loop900018", "more than 16 other devices", "detach it"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_stack_that_contains_itself_is_refused() {
        let devices = [on_device(1, 2, 0), on_device(2, 1, 0)];
        assert_eq!(Stack::new(&devices).trace(number(1), 0..1), Err(TooDeep { disk: number(1) }));
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
