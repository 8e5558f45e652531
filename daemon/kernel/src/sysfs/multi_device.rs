//! File systems over several devices (btrfs, bcachefs). A mount of one has a device number of its own, so
//! only its source names a device. sysfs lists the devices of each file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::block::{Block, DeviceNumber, entries};

/// A block device of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    /// The name in `/dev`.
    name: String,
    number: DeviceNumber,
}

/// The devices of each mounted file system over several devices.
#[derive(Clone, Debug, Default)]
pub struct MultiDevice {
    file_systems: Vec<Vec<Member>>,
}

impl MultiDevice {
    /// Reads sysfs. A directory that is missing has no file systems.
    ///
    /// # Errors
    /// sysfs cannot be read.
    pub fn read() -> io::Result<Self> {
        Self::read_below(Path::new("/sys/fs"))
    }

    fn read_below(sysfs: &Path) -> io::Result<Self> {
        let mut file_systems = Vec::new();
        // /sys/fs/btrfs/FSID/devices/NAME and /sys/fs/bcachefs/FSID/dev-N/block are links to block devices.
        for fsid in entries(&sysfs.join("btrfs"))? {
            file_systems.push(members(entries(&fsid.join("devices"))?)?);
        }
        for fsid in entries(&sysfs.join("bcachefs"))? {
            let links = entries(&fsid)?.iter().map(|device| device.join("block")).collect();
            file_systems.push(members(links)?);
        }
        Ok(Self { file_systems })
    }

    /// The numbers of all devices of the file system that a line of the mount table stands for, by its
    /// type and source. The kernel chooses the source of such a line (`btrfs_show_devname`,
    /// `bch2_show_devname`), and no user can mount another file system under one of these types: a FUSE
    /// mount has the type `fuse`, `fuseblk` or `fuse.SUBTYPE`.
    #[must_use]
    pub fn devices(&self, file_system: &[u8], source: &[u8]) -> Vec<DeviceNumber> {
        let Ok(source) = std::str::from_utf8(source) else { return Vec::new() };
        let node = match file_system {
            b"btrfs" => source,
            b"bcachefs" => source.split(':').next().unwrap_or_default(),
            _ => return Vec::new(),
        };
        let found = self.with(node).or_else(|| self.with(fs::canonicalize(node).ok()?.to_str()?));
        found.map(|members| members.iter().map(|member| member.number).collect()).unwrap_or_default()
    }

    fn with(&self, node: &str) -> Option<&Vec<Member>> {
        let name = node.strip_prefix("/dev/")?;
        self.file_systems.iter().find(|members| members.iter().any(|member| member.name == name))
    }
}

/// The nodes of the mounted btrfs with this UUID.
pub fn mounted_btrfs(uuid: &str) -> Vec<String> {
    let file_system = format!("/sys/fs/btrfs/{uuid}");
    let Ok(devices) = fs::read_dir(format!("{file_system}/devices")) else {
        // It is mounted, but its devices cannot be read.
        return if fs::exists(&file_system).unwrap_or(true) { vec![file_system] } else { Vec::new() };
    };
    devices.filter_map(|entry| Some(format!("/dev/{}", entry.ok()?.file_name().to_str()?))).collect()
}

/// The block devices that these links of sysfs lead to.
fn members(links: Vec<PathBuf>) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    for link in links {
        let block = Block::at(&link);
        if let Some(name) = block.name()
            && let Some(number) = block.number()?
        {
            members.push(Member { name, number });
        }
    }
    Ok(members)
}

#[cfg(test)]
impl MultiDevice {
    /// One file system over these loop devices.
    pub fn over(numbers: &[u32]) -> Self {
        let member = |number: &u32| Member { name: format!("loop{number}"), number: (7, *number) };
        Self { file_systems: vec![numbers.iter().map(member).collect()] }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::test_descriptors::without_descriptors;

    fn add_device(devices: &Path, name: &str, number: &str, link: &Path) {
        let device = devices.join(name);
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("dev"), number).unwrap();
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(device, link).unwrap();
    }

    #[test]
    fn all_devices_of_a_file_system_are_found_by_any_of_them() {
        let sysfs = tempfile::tempdir().unwrap();
        let devices = sysfs.path().join("devices");
        let fsid = sysfs.path().join("btrfs/11111111-2222-3333-4444-555555555555");
        add_device(&devices, "loop4", "7:4\n", &fsid.join("devices/loop4"));
        add_device(&devices, "cciss!c0d0", "104:0\n", &fsid.join("devices/cciss!c0d0"));
        let other = sysfs.path().join("bcachefs/66666666-2222-3333-4444-555555555555");
        add_device(&devices, "loop5", "7:5\n", &other.join("dev-0/block"));
        add_device(&devices, "loop6", "7:6\n", &other.join("dev-1/block"));
        fs::create_dir(sysfs.path().join("btrfs/features")).unwrap();

        let table = MultiDevice::read_below(sysfs.path()).unwrap();
        let found = |kind: &str, source: &str| {
            let mut found = table.devices(kind.as_bytes(), source.as_bytes());
            found.sort_unstable();
            found
        };
        assert_eq!(found("btrfs", "/dev/loop4"), [(7, 4), (104, 0)]);
        assert_eq!(found("btrfs", "/dev/cciss/c0d0"), [(7, 4), (104, 0)]);
        assert_eq!(found("bcachefs", "/dev/loop5:/dev/loop6"), [(7, 5), (7, 6)]);
        for (kind, source) in [
            ("fuse", "/dev/loop4"),
            ("fuse.btrfs", "/dev/loop4"),
            ("tmpfs", "/dev/loop4"),
            ("btrfs", "/dev/loop7"),
            ("btrfs", "loop4"),
            ("btrfs", ""),
        ] {
            assert_eq!(found(kind, source), [], "{kind} {source}");
        }
    }

    #[test]
    fn unreadable_file_systems_are_an_error() {
        let sysfs = tempfile::tempdir().unwrap();
        assert!(without_descriptors(|| MultiDevice::read_below(sysfs.path())).is_err());
    }

    #[test]
    fn a_kernel_without_such_file_systems_has_none() {
        assert!(MultiDevice::read_below(Path::new("/nonexistent")).unwrap().file_systems.is_empty());
    }
}
