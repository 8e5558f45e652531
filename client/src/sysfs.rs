//! Attributes of loop devices in sysfs.

use std::fs;

/// An attribute of the device.
#[must_use]
pub fn attribute(number: u32, name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/block/loop{number}/{name}")).ok()?;
    Some(text.trim_end().to_owned())
}

/// The path that the backing file has now. The kernel follows renames, and appends ` (deleted)` if the file was
/// unlinked.
#[must_use]
pub fn backing_file(number: u32) -> Option<Vec<u8>> {
    let mut path = fs::read(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    path.pop_if(|byte| *byte == b'\n');
    Some(path)
}

/// The device's disk sequence.
#[must_use]
pub fn disk_sequence(number: u32) -> Option<u64> {
    attribute(number, "diskseq")?.parse().ok()
}
