//! Compares known loop devices with sysfs, which never waits for a backing file.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use loopd_engine::kernel::{Device, Difference};

use crate::sysfs::loop_device;

/// The numbers that differ from `known`: attached, ended, or changed since.
///
/// # Errors
/// sysfs cannot be read.
pub fn differences(known: &[Device]) -> io::Result<Vec<(u32, Difference)>> {
    let known: BTreeMap<u32, &Device> = known.iter().map(|device| (device.number, device)).collect();
    let bound: BTreeSet<u32> = loop_device::bound_numbers()?.into_iter().collect();
    let ended = known.keys().filter(|number| !bound.contains(number));
    let ended = ended.map(|number| (*number, Difference::Other));
    let mut differences: Vec<_> = ended.collect();
    for number in &bound {
        let difference = match known.get(number) {
            Some(device) => difference(device)?,
            None => Some(Difference::Other),
        };
        differences.extend(difference.map(|difference| (*number, difference)));
    }
    Ok(differences)
}

/// `None` if there is none, or if the device has been detached since.
fn difference(device: &Device) -> io::Result<Option<Difference>> {
    let Some(shown) = loop_device::Attributes::read(device.number)? else { return Ok(None) };
    if shown != loop_device::Attributes::of(device) {
        return Ok(Some(Difference::Other));
    }
    let path = loop_device::backing_file(device.number);
    Ok(path.filter(|path| *path != device.backing_file).map(Difference::Renamed))
}
