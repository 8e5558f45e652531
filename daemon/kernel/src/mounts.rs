//! The mounts of our mount namespace, and their changes: the kernel flags `/proc/self/mountinfo` with `POLLPRI`
//! (`proc_pid_mountinfo(5)`).

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Read as _, Result};
use std::time::Duration;

use loopd_common::mountinfo;
use loopd_engine::mount_table::MountTable;
use tokio::io::Interest;
use tracing::warn;

use crate::readiness::Readiness;
use crate::sysfs::MultiDevice;

/// Enough for the mount table of most machines, in bytes.
const USUAL_SIZE: usize = 16 * 1024;

/// How long to wait before the table is read again after an error.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Reads the table of our mount namespace.
///
/// # Errors
/// procfs or sysfs cannot be read.
pub fn read() -> Result<MountTable> {
    // procfs does not report a size, so that the default buffer would grow from 32 bytes.
    let mut text = Vec::with_capacity(USUAL_SIZE);
    File::open(mountinfo::FILE)?.read_to_end(&mut text)?;
    parse(&text, MultiDevice::read)
}

/// The source of a mount is free text for most file systems: fusermount passes on any text of a user. It is
/// used only for file systems over several devices.
fn parse(text: &[u8], read_devices: impl Fn() -> Result<MultiDevice>) -> Result<MountTable> {
    let multi_device = OnceCell::new();
    let table = MountTable::parse(text, |mount| match mount.file_system {
        b"btrfs" | b"bcachefs" => match multi_device.get_or_init(&read_devices) {
            Ok(devices) => devices.devices(mount.file_system, &mount.source),
            Err(_) => Vec::new(),
        },
        _ => Vec::new(),
    });
    multi_device.into_inner().transpose().map(|_devices| table)
}

/// An open mount table.
pub struct Watch {
    readiness: Readiness,
}

impl Watch {
    /// Starts watching the mount table of our mount namespace.
    ///
    /// # Errors
    /// procfs cannot be read.
    pub fn open() -> Result<Self> {
        Ok(Self { readiness: Readiness::watch(&File::open(mountinfo::FILE)?, Interest::PRIORITY)? })
    }

    /// Passes each new mount table to `publish`. Returns only if watching fails.
    pub async fn run(self, mut publish: impl FnMut(MountTable)) {
        loop {
            if let Err(error) = self.readiness.wait().await {
                return warn!("watching mounts failed: {error}");
            }
            publish(read_until_success(read).await);
        }
    }
}

/// Reads the table, again after each error: the kernel reports each change once only.
async fn read_until_success(read: impl Fn() -> Result<MountTable>) -> MountTable {
    loop {
        match read() {
            Ok(table) => return table,
            Err(error) => warn!("the mount table cannot be read, and is read again: {error}"),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashSet;
    use std::io::Error;
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn devices_and_escapes_are_read() {
        let table = parse(
            b"22 1 7:3 / /mnt/a\\040b rw - ext4 /dev/loop3 rw\n\
              23 1 7:3 / /mnt/c\\134d rw shared:7 - ext4 /dev/loop3 rw\n\
              25 1 0:42 / /proc rw - proc proc rw\n\
              nonsense\n\n",
            || Ok(MultiDevice::default()),
        )
        .unwrap();
        assert_eq!(table.of((7, 3)), [PathBuf::from("/mnt/a b"), PathBuf::from("/mnt/c\\d")]);
        assert!(table.of((7, 5)).is_empty());
        assert!(table.has(Path::new("/proc")));
    }

    #[test]
    fn a_file_system_over_two_devices_is_a_mount_of_both() {
        let table = parse(
            b"24 1 0:41 / /mnt/btrfs rw - btrfs /dev/loop4 rw\n\
              25 1 0:41 /sub /mnt/sub rw shared:9 master:3 - btrfs /dev/loop4 rw\n",
            || Ok(MultiDevice::over(&[4, 5])),
        )
        .unwrap();
        for number in [4, 5] {
            assert_eq!(table.of((7, number)), [PathBuf::from("/mnt/btrfs"), PathBuf::from("/mnt/sub")]);
        }
        assert!(table.of((7, 6)).is_empty());
    }

    #[test]
    fn a_forged_source_is_no_mount_of_the_device() {
        let table = parse(
            b"24 1 0:41 / /home/m/a rw - fuse /dev/loop4 rw,user_id=1000\n\
              25 1 0:42 / /home/m/b rw - fuse.btrfs /dev/loop4 rw,user_id=1000\n\
              26 1 0:43 / /home/m/c rw - tmpfs /dev/loop4 rw\n\
              27 1 0:44 / /home/m/d rw - fuse.x\\040-\\040btrfs /dev/loop4 rw\n\
              28 1 8:1 / /home/m/e rw - ext4 /dev/loop4 rw\n",
            || Ok(MultiDevice::over(&[4, 5])),
        )
        .unwrap();
        assert!(table.of((7, 4)).is_empty() && table.of((7, 5)).is_empty());
        assert!(table.has(Path::new("/home/m/a")));
    }

    #[test]
    fn tables_differ_in_the_devices_of_new_and_ended_mounts() {
        let table_of =
            |lines: &[&str]| parse(lines.join("\n").as_bytes(), || Ok(MultiDevice::over(&[4, 5]))).unwrap();
        let ext4 = "22 1 7:3 / /mnt/a rw - ext4 /dev/loop3 rw";
        let btrfs = "24 1 0:41 / /mnt/btrfs rw - btrfs /dev/loop4 rw";
        let proc = "25 1 0:42 / /proc rw - proc proc rw";
        let before = table_of(&[ext4, proc]);
        assert!(table_of(&[proc, ext4]).differences(&before).is_empty());
        assert!(table_of(&[ext4]).differences(&before).is_empty(), "proc is not on a device");
        let after = table_of(&[btrfs]);
        for differences in [after.differences(&before), before.differences(&after)] {
            assert_eq!(differences, HashSet::from([(7, 3), (7, 4), (7, 5)]));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_table_that_cannot_be_read_is_read_again() {
        let reads = Cell::new(0);
        let table = read_until_success(|| match reads.replace(reads.get() + 1) {
            0..3 => Err(Error::other("no descriptor is free")),
            _ => read(),
        });
        assert!(table.await.has(Path::new("/proc")));
        assert_eq!(reads.get(), 4);
    }

    #[test]
    fn the_table_of_this_process_is_read() {
        assert!(read().unwrap().has(Path::new("/proc")));
    }
}
