//! The mount table of this process's namespace.

use std::path::{Path, PathBuf};
use std::{fs, io};

use loopd_common::mountinfo;
use nix::sys::stat::{major, minor};

/// File systems that span several devices. Their mounts have anonymous device numbers. A user's FUSE mount
/// cannot have these types: it is `fuse`, `fuseblk` or `fuse.SUBTYPE`.
const MULTI_DEVICE: &[&[u8]] = &[b"btrfs", b"bcachefs"];

/// The mounts in mount order.
#[derive(Clone, Debug, Default)]
pub struct MountTable {
    mounts: Vec<Mount>,
}

#[derive(Clone, Debug)]
struct Mount {
    device: (u32, u32),
    point: PathBuf,
    is_multi_device: bool,
}

impl MountTable {
    /// Reads the current table.
    ///
    /// # Errors
    /// procfs cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read(mountinfo::FILE)?))
    }

    fn parse(text: &[u8]) -> Self {
        let mounts = mountinfo::mounts(text).map(|mount| Mount {
            device: mount.device,
            point: mount.point,
            is_multi_device: is_multi_device(mount.file_system),
        });
        Self { mounts: mounts.collect() }
    }

    fn points(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().map(|mount| mount.point.as_path())
    }

    /// The mount point of the file system that contains the path.
    #[must_use]
    pub fn holding(&self, path: &Path) -> Option<&Path> {
        self.points().filter(|point| path.starts_with(point)).max_by_key(|point| point.as_os_str().len())
    }

    /// The mount points below this one.
    pub fn below(&self, point: &Path) -> impl Iterator<Item = &Path> {
        self.points().filter(move |other| *other != point && other.starts_with(point))
    }

    /// Whether the topmost mount at the mount point is of the block device with this number. loopd
    /// publishes mount points of the host's namespace; another file system may be mounted over one, and
    /// this process may be in another namespace.
    #[must_use]
    pub fn shows(&self, point: &Path, device: u64) -> bool {
        let top = self.mounts.iter().rfind(|mount| mount.point == point);
        top.is_some_and(|mount| mount.is_multi_device || device_number(device) == Some(mount.device))
    }
}

/// Whether file systems of this type span several devices. The kernel chooses the sources of their mounts.
#[must_use]
pub fn is_multi_device(file_system: &[u8]) -> bool {
    MULTI_DEVICE.contains(&file_system)
}

fn device_number(device: u64) -> Option<(u32, u32)> {
    Some((major(device).try_into().ok()?, minor(device).try_into().ok()?))
}

/// The path without symbolic links; unchanged if it cannot be resolved, for example on a damaged file
/// system.
#[must_use]
pub fn resolve(path: &Path) -> PathBuf {
    fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 7:0 / /run/media/a/data rw,nosuid,nodev shared:1 - ext4 /dev/loop0 rw
31 22 7:1 / /run/media/a/my\\040disk\\134 ro - iso9660 /dev/loop1 ro
32 30 0:50 / /run/media/a/data/sub rw - tmpfs none rw
";

    #[test]
    fn the_innermost_mount_holds_a_path() {
        let table = MountTable::parse(TABLE);
        for (path, point) in [
            ("/run/media/a/data", "/run/media/a/data"),
            ("/run/media/a/data/x/y", "/run/media/a/data"),
            ("/run/media/a/data/sub", "/run/media/a/data/sub"),
            ("/run/media/a/data2", "/"),
            ("/run/media/a/my disk\\/x", "/run/media/a/my disk\\"),
        ] {
            assert_eq!(table.holding(Path::new(path)), Some(Path::new(point)), "{path}");
        }
        assert_eq!(MountTable::default().holding(Path::new("/")), None);
    }

    #[test]
    fn mounts_below_a_mount_point_are_found() {
        let table = MountTable::parse(TABLE);
        let below = |point: &'static str| table.below(Path::new(point)).collect::<Vec<_>>();
        assert_eq!(below("/run/media/a/data"), [Path::new("/run/media/a/data/sub")]);
        assert_eq!(below("/").len(), 3);
        assert_eq!(below("/run/media/a/data/sub").len(), 0);
    }

    #[test]
    fn only_the_topmost_mount_is_shown() {
        let table = MountTable::parse(
            b"30 22 7:0 / /m/a rw,nosuid,nodev shared:1 - ext4 /dev/loop0 rw\n\
              31 30 0:50 / /m/a rw - fuse.sshfs /dev/loop0 rw\n\
              32 22 0:51 / /m/b rw - fuse /dev/loop0 rw\n\
              33 22 0:52 / /m/b rw - btrfs /dev/loop1 rw\n\
              34 22 7:0 / /m/c rw - ext4 /dev/loop0 rw\n\
              35 22 0:53 / /m/d rw - fuse.btrfs /dev/loop0 rw\n",
        );
        let shown = |point: &str| table.shows(Path::new(point), nix::sys::stat::makedev(7, 0));
        assert_eq!(["/m/a", "/m/b", "/m/c", "/m/d", "/m/e"].map(shown), [false, true, true, false, false]);
    }

    #[test]
    fn the_table_of_the_machine_can_be_read() {
        let table = MountTable::read().unwrap();
        assert_eq!(table.holding(Path::new("/proc/self")), Some(Path::new("/proc")));
    }
}
