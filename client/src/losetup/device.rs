//! The devices that a user of losetup names.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use crate::target::{decimal, loop_number};

/// The device number of /dev/loop-control.
const LOOP_CONTROL: (u64, u64) = (10, 237);
/// The loop driver's minor numbers have 20 bits.
const LARGEST_NUMBER: u32 = (1 << 20) - 1;

/// A device by its name, which is shown as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// A path; a name without a slash in front stands for one in /dev.
    pub path: OsString,
}

/// What an ioctl of the loop driver would find there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// `/dev/loopN`, or a partition of it.
    Loop(u32),
    /// It cannot be opened.
    Closed(Errno),
    /// Something that is no loop device, and says so.
    Other(Errno),
}

impl Device {
    /// The device that the word names.
    #[must_use]
    pub fn named(word: &OsStr) -> Self {
        let mut path = OsString::new();
        if !word.as_bytes().starts_with(b"/") {
            path.push("/dev/");
        }
        path.push(word);
        Self { path }
    }

    /// What there is.
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

    /// Its number, where there is a loop device.
    ///
    /// # Errors
    /// What an ioctl would say otherwise.
    pub fn number(&self) -> Result<u32, Errno> {
        match self.node() {
            Node::Loop(number) => Ok(number),
            Node::Closed(errno) | Node::Other(errno) => Err(errno),
        }
    }

    /// Whether it is a folder, which cannot be opened for writing.
    #[must_use]
    pub fn is_folder(&self) -> bool {
        Path::new(&self.path).is_dir()
    }

    /// N where the name is that of `/dev/loopN`, which need not be there yet.
    #[must_use]
    pub fn wanted(&self) -> Option<u32> {
        let path = Path::new(&self.path);
        let is_in_dev = path.parent() == Some(Path::new("/dev"));
        let number = path.file_name()?.to_str().and_then(loop_number);
        number.filter(|number| is_in_dev && *number <= LARGEST_NUMBER)
    }

    /// N of `loopN` in the name's last part, whether there is such a device or not.
    #[must_use]
    pub fn named_number(&self) -> Option<u32> {
        decimal(Path::new(&self.path).file_name()?.to_str()?.strip_prefix("loop")?)
    }
}

/// N of the loop device with this device number, or of the one that it is a partition of.
fn number_of((major, minor): (u64, u64)) -> Option<u32> {
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let mut names = link.components().rev().filter_map(|part| part.as_os_str().to_str());
    let last = names.next()?;
    loop_number(last).or_else(|| loop_number(names.next()?).filter(|_| last.starts_with("loop")))
}

/// Major and minor number of `/dev/loopN`, as sysfs tells them.
#[must_use]
pub fn device_number(number: u32) -> Option<(u32, u32)> {
    let text = attribute(number, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// An attribute of the device in sysfs.
#[must_use]
pub fn attribute(number: u32, name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/block/loop{number}/{name}")).ok()?;
    Some(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(word: &str) -> Device {
        Device::named(OsStr::new(word))
    }

    #[test]
    fn names_without_a_slash_in_front_are_in_dev() {
        assert_eq!(device("loop3").path, "/dev/loop3");
        assert_eq!(device("./loop3").path, "/dev/./loop3");
        assert_eq!(device("/tmp/x").path, "/tmp/x");
        assert_eq!(device("").path, "/dev/");
    }

    #[test]
    fn only_names_of_loop_devices_can_be_made() {
        for word in ["loop7", "/dev/loop7", "/dev//loop7", "/dev/./loop7"] {
            assert_eq!(device(word).wanted(), Some(7), "{word}");
        }
        for word in
            ["loop", "7", "loop07", "loop7x", "loop1048576", "loop4294967296", "/tmp/loop7", "loop/7", ""]
        {
            assert_eq!(device(word).wanted(), None, "{word}");
        }
    }

    #[test]
    fn what_is_no_loop_device_says_so() {
        assert_eq!(device("/dev/null").node(), Node::Other(Errno::ENOTTY));
        assert_eq!(device("/nonexistent").node(), Node::Closed(Errno::ENOENT));
        assert_eq!(device("/dev/null/x").node(), Node::Closed(Errno::ENOTDIR));
        if Path::new("/dev/loop-control").exists() {
            assert_eq!(device("loop-control").number(), Err(Errno::ENOSYS));
        }
    }
}
