//! Compares known loop devices with sysfs, which never waits for a backing file.

use std::collections::{BTreeMap, BTreeSet};

use loopd_engine::kernel::{Device, Difference};

use crate::sysfs::loop_device;

/// The numbers that differ from `known`: attached, ended, or changed since. None if sysfs cannot be read.
pub fn differences(known: &[Device]) -> Vec<(u32, Difference)> {
    let known: BTreeMap<u32, &Device> = known.iter().map(|device| (device.number, device)).collect();
    let Ok(bound) = loop_device::bound_numbers() else { return Vec::new() };
    let bound: BTreeSet<u32> = bound.into_iter().collect();
    let ended = known.keys().filter(|number| !bound.contains(number));
    let ended = ended.map(|number| (*number, Difference::Other));
    let differs = |number: &u32| match known.get(number) {
        Some(device) => Some((*number, difference(device)?)),
        None => Some((*number, Difference::Other)),
    };
    ended.chain(bound.iter().filter_map(differs)).collect()
}

fn difference(device: &Device) -> Option<Difference> {
    let shown = loop_device::Attributes::read(device.number)?;
    if shown != loop_device::Attributes::of(device) {
        return Some(Difference::Other);
    }
    let path = loop_device::backing_file(device.number)?;
    (path != device.backing_file).then_some(Difference::Renamed(path))
}
