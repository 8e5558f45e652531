//! Devices on losetup's command line.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use crate::device_node::{decimal, loop_number};
use crate::sysfs::attribute;

/// The device number of /dev/loop-control.
const LOOP_CONTROL: (u64, u64) = (10, 237);
/// The loop driver's minor numbers have 20 bits.
const LARGEST_NUMBER: u32 = (1 << 20) - 1;

/// A device by its name, which messages repeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The path; a name without a leading slash is in /dev.
    pub path: OsString,
}

/// The file that an ioctl of the loop driver would be called on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// `/dev/loopN`, or a partition of it.
    Loop(u32),
    /// It cannot be opened.
    Closed(Errno),
    /// Not a loop device; the errno of the ioctl.
    Other(Errno),
}

impl Device {
    /// The device of an argument.
    #[must_use]
    pub fn named(name: &OsStr) -> Self {
        let mut path = OsString::new();
        if !name.as_bytes().starts_with(b"/") {
            path.push("/dev/");
        }
        path.push(name);
        Self { path }
    }

    /// Examines the path.
    #[must_use]
    pub fn node(&self) -> Node {
        let metadata = match fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) => return Node::Closed(Errno::from_raw(error.raw_os_error().unwrap_or_default())),
        };
        let number = (major(metadata.rdev()), minor(metadata.rdev()));
        if !metadata.file_type().is_block_device() {
            let is_control = metadata.file_type().is_char_device() && number == LOOP_CONTROL;
            return Node::Other(if is_control { Errno::ENOSYS } else { Errno::ENOTTY });
        }
        number_of(number).map_or(Node::Other(Errno::ENOTTY), Node::Loop)
    }

    /// The number of the loop device.
    ///
    /// # Errors
    /// The errno of an ioctl, if it is not a loop device.
    pub fn number(&self) -> Result<u32, Errno> {
        match self.node() {
            Node::Loop(number) => Ok(number),
            Node::Closed(errno) | Node::Other(errno) => Err(errno),
        }
    }

    /// Whether it is a directory, which cannot be opened for writing.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        Path::new(&self.path).is_dir()
    }

    /// N if the path is `/dev/loopN`, whether it exists or not.
    #[must_use]
    pub fn number_to_create(&self) -> Option<u32> {
        let path = Path::new(&self.path);
        let is_in_dev = path.parent() == Some(Path::new("/dev"));
        let number = path.file_name()?.to_str().and_then(loop_number);
        number.filter(|number| is_in_dev && *number <= LARGEST_NUMBER)
    }

    /// N if the file name is `loopN`, whether the device exists or not.
    #[must_use]
    pub fn named_number(&self) -> Option<u32> {
        decimal(Path::new(&self.path).file_name()?.to_str()?.strip_prefix("loop")?)
    }
}

/// N of the loop device with this device number, or of the device of this partition.
fn number_of((major, minor): (u64, u64)) -> Option<u32> {
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let mut names = link.components().rev().filter_map(|part| part.as_os_str().to_str());
    let last = names.next()?;
    loop_number(last).or_else(|| loop_number(names.next()?).filter(|_| last.starts_with("loop")))
}

/// Major and minor number of `/dev/loopN` from sysfs.
#[must_use]
pub fn device_number(number: u32) -> Option<(u32, u32)> {
    let text = attribute(number, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> Device {
        Device::named(OsStr::new(name))
    }

    #[test]
    fn names_without_a_leading_slash_are_in_dev() {
        assert_eq!(device("loop3").path, "/dev/loop3");
        assert_eq!(device("./loop3").path, "/dev/./loop3");
        assert_eq!(device("/tmp/x").path, "/tmp/x");
        assert_eq!(device("").path, "/dev/");
    }

    #[test]
    fn only_loop_devices_in_dev_can_be_created() {
        for name in ["loop7", "/dev/loop7", "/dev//loop7", "/dev/./loop7"] {
            assert_eq!(device(name).number_to_create(), Some(7), "{name}");
        }
        for name in
            ["loop", "7", "loop07", "loop7x", "loop1048576", "loop4294967296", "/tmp/loop7", "loop/7", ""]
        {
            assert_eq!(device(name).number_to_create(), None, "{name}");
        }
    }

    #[test]
    fn other_files_have_the_errno_of_the_ioctl() {
        assert_eq!(device("/dev/null").node(), Node::Other(Errno::ENOTTY));
        assert_eq!(device("/nonexistent").node(), Node::Closed(Errno::ENOENT));
        assert_eq!(device("/dev/null/x").node(), Node::Closed(Errno::ENOTDIR));
        if Path::new("/dev/loop-control").exists() {
            assert_eq!(device("loop-control").number(), Err(Errno::ENOSYS));
        }
    }
}
