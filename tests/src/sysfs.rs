//! The state of loop devices in sysfs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};

/// A loop device, bound or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoopDevice(
    /// N of `/dev/loopN`.
    pub u32,
);

impl LoopDevice {
    /// The device with this node.
    ///
    /// # Errors
    /// The node has another name.
    pub fn from_node(node: &str) -> Result<Self> {
        let number = node.strip_prefix("/dev/loop").and_then(|digits| digits.parse().ok());
        number.map(Self).with_context(|| format!("{node:?} is no loop device"))
    }

    /// Its node.
    #[must_use]
    pub fn node(self) -> String {
        format!("/dev/loop{}", self.0)
    }

    /// The bytes of an attribute without the newline at the end; `None` if it does not exist.
    #[must_use]
    pub fn attribute(self, name: &str) -> Option<Vec<u8>> {
        let mut value = std::fs::read(format!("/sys/block/loop{}/{name}", self.0)).ok()?;
        value.pop_if(|byte| *byte == b'\n');
        Some(value)
    }

    /// An attribute that is a number.
    ///
    /// # Errors
    /// There is none.
    pub fn number<T: FromStr>(self, name: &str) -> Result<T> {
        let value = self.attribute(name).with_context(|| format!("{self:?} has no {name}"))?;
        let value = String::from_utf8(value)?;
        value.parse().ok().with_context(|| format!("{self:?}: {name} is {value:?}"))
    }

    /// An attribute that is 0 or 1.
    ///
    /// # Errors
    /// There is none.
    pub fn flag(self, name: &str) -> Result<bool> {
        Ok(self.number::<u8>(name)? != 0)
    }

    /// The path of its backing file.
    #[must_use]
    pub fn backing_file(self) -> Option<Vec<u8>> {
        self.attribute("loop/backing_file")
    }

    /// Whether a file is attached to it.
    #[must_use]
    pub fn bound(self) -> bool {
        self.backing_file().is_some()
    }
}

/// The position and size of a partition, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first byte.
    pub start: u64,
    /// Its size.
    pub size: u64,
}

/// The extents of partitions, by number.
pub type Extents = BTreeMap<u32, Extent>;

impl LoopDevice {
    /// The node of a partition.
    #[must_use]
    pub fn partition_node(self, number: u32) -> String {
        format!("{}p{number}", self.node())
    }

    /// The partitions that the kernel has.
    #[must_use]
    pub fn partitions(self) -> Extents {
        let directory = format!("/sys/block/loop{}", self.0);
        let sectors = |number: u32, name: &str| -> Option<u64> {
            let path = format!("{directory}/loop{}p{number}/{name}", self.0);
            Some(std::fs::read_to_string(path).ok()?.trim_end().parse::<u64>().ok()? * 512)
        };
        let extent =
            |number| Some(Extent { start: sectors(number, "start")?, size: sectors(number, "size")? });
        numbers_in(&directory, &format!("loop{}p", self.0))
            .into_iter()
            .filter_map(|number| Some((number, extent(number)?)))
            .collect()
    }

    /// The partitions that have a node in `/dev`.
    #[must_use]
    pub fn partition_nodes(self) -> BTreeSet<u32> {
        numbers_in("/dev", &format!("loop{}p", self.0))
    }
}

/// The numbers that follow this prefix in the file names of a directory.
fn numbers_in(directory: &str, prefix: &str) -> BTreeSet<u32> {
    let Ok(entries) = Path::new(directory).read_dir() else { return BTreeSet::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()).collect()
}

/// The free devices that still have partitions.
#[must_use]
pub fn stale_partitions() -> Vec<LoopDevice> {
    all().into_iter().filter(|device| !device.bound() && !device.partitions().is_empty()).collect()
}

/// All loop devices.
#[must_use]
pub fn all() -> Vec<LoopDevice> {
    numbers_in("/sys/block", "loop").into_iter().map(LoopDevice).collect()
}

/// The devices that a test with this directory has attached: their file is in it, or is a memory file or a loop
/// device. Other devices belong to other programs.
#[must_use]
pub fn bound_by_tests(directory: &Path) -> Vec<LoopDevice> {
    let ours = [directory.as_os_str().as_bytes(), b"/memfd:loopd-", b"/dev/loop"];
    let is_ours = |file: Vec<u8>| ours.iter().any(|prefix| file.starts_with(prefix));
    all().into_iter().filter(|device| device.backing_file().is_some_and(is_ours)).collect()
}

/// The free device with the highest number, which other programs are unlikely to choose.
///
/// # Errors
/// None is free.
pub fn last_free() -> Result<LoopDevice> {
    all().into_iter().rev().find(|device| !device.bound()).context("no loop device is free")
}

/// Whether something is mounted on this directory.
#[must_use]
pub fn is_mount_point(directory: &Path) -> bool {
    mounts_below(directory).iter().any(|mount| mount == directory)
}

/// The mount points below this directory.
#[must_use]
pub fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(directory))
        .collect()
}
