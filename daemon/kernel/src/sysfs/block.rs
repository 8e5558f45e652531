//! A block device in sysfs: a disk or a partition.

use std::fs::{self, DirEntry, File};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use loopd_common::mountinfo;

/// The unit of sizes and offsets in sysfs, for any block size.
const SECTOR: u64 = 512;

/// The smallest page of the kernel in bytes. An attribute has at most a page, and one read returns all of it
/// (`sysfs_kf_seq_show`).
const PAGE: usize = 4096;

/// Major and minor number.
pub type DeviceNumber = (u32, u32);

/// The directory of a block device. It may be gone: reading an attribute gives nothing then.
#[derive(Clone, Debug)]
pub struct Block {
    directory: PathBuf,
}

impl Block {
    /// The device with this name in `/dev`.
    pub fn named(name: &str) -> Self {
        Self { directory: Path::new("/sys/class/block").join(name.replace('/', "!")) }
    }

    /// The loop device with this number.
    pub fn of_loop(number: u32) -> Self {
        Self::named(&format!("loop{number}"))
    }

    /// The device with this device number.
    pub fn numbered((major, minor): DeviceNumber) -> Self {
        Self { directory: PathBuf::from(format!("/sys/dev/block/{major}:{minor}")) }
    }

    /// The device with this directory, or a link to it.
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Whether the device exists.
    pub fn exists(&self) -> bool {
        self.directory.exists()
    }

    /// Whether the attribute or directory exists.
    pub fn has(&self, attribute: &str) -> bool {
        self.directory.join(attribute).exists()
    }

    /// The bytes of an attribute, without the newline that the kernel adds.
    pub fn bytes(&self, attribute: &str) -> Option<Vec<u8>> {
        let path = self.directory.join(attribute);
        let mut buffer = [0; PAGE];
        let length = File::open(&path).ok()?.read(&mut buffer).ok()?;
        let longer = if length < PAGE { None } else { Some(fs::read(path).ok()?) };
        let bytes = longer.as_deref().unwrap_or(&buffer[..length]);
        Some(bytes.strip_suffix(b"\n").unwrap_or(bytes).to_vec())
    }

    /// The value of an attribute.
    pub fn value<T: FromStr>(&self, attribute: &str) -> Option<T> {
        std::str::from_utf8(&self.bytes(attribute)?).ok()?.parse().ok()
    }

    /// The device number.
    pub fn number(&self) -> Option<DeviceNumber> {
        mountinfo::device_number(std::str::from_utf8(&self.bytes("dev")?).ok()?)
    }

    /// The size in bytes.
    pub fn size(&self) -> Option<u64> {
        self.value::<u64>("size")?.checked_mul(SECTOR)
    }

    /// Where a partition starts on its disk, in bytes; `None` for a disk.
    pub fn start(&self) -> Option<u64> {
        self.value::<u64>("start")?.checked_mul(SECTOR)
    }

    /// Whether writing is refused.
    pub fn is_read_only(&self) -> bool {
        self.value("ro") == Some(1_u8)
    }

    /// The name of the directory.
    pub fn file_name(&self) -> Option<&str> {
        self.directory.file_name()?.to_str()
    }

    /// The name in `/dev`.
    pub fn name(&self) -> Option<String> {
        let directory = fs::canonicalize(&self.directory).ok()?;
        Some(directory.file_name()?.to_str()?.replace('!', "/"))
    }

    /// The node of the device.
    pub fn node(&self) -> Option<String> {
        Some(format!("/dev/{}", self.name()?))
    }

    /// The disk of a partition; `None` for a disk.
    pub fn disk(&self) -> Option<Self> {
        let directory = fs::canonicalize(&self.directory).ok()?;
        let disk = directory.parent().filter(|_| self.has("partition"))?;
        Some(Self { directory: disk.to_owned() })
    }

    /// The partitions of a disk.
    pub fn partitions(&self) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        let may_be_partition = |entry: &DirEntry| {
            // The name of a partition ends with its number (`disk_name` in the kernel).
            let ends_with_digit = entry.file_name().as_bytes().last().is_some_and(u8::is_ascii_digit);
            ends_with_digit && entry.file_type().is_ok_and(|kind| kind.is_dir())
        };
        let candidates = entries.flatten().filter(may_be_partition);
        let blocks = candidates.map(|entry| Self { directory: entry.path() });
        blocks.filter(|block| block.has("partition")).collect()
    }

    /// The device and its partitions.
    pub fn with_partitions(&self) -> Vec<Self> {
        let mut all = self.partitions();
        all.push(self.clone());
        all
    }

    /// The devices that are stacked on this one.
    pub fn holders(&self) -> Vec<Self> {
        self.linked("holders")
    }

    /// The devices that this one is stacked on.
    pub fn slaves(&self) -> Vec<Self> {
        self.linked("slaves")
    }

    fn linked(&self, kind: &str) -> Vec<Self> {
        let links = entries(&self.directory.join(kind)).into_iter();
        links.map(|directory| Self { directory }).collect()
    }
}

/// The entries of a directory; none if it cannot be read.
pub fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(directory: &Path, attributes: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, value) in attributes {
            fs::write(directory.join(name), format!("{value}\n")).unwrap();
        }
    }

    #[test]
    fn a_disk_and_its_partition_are_read() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("cciss!c0d0");
        write(&disk, &[("dev", "104:0"), ("size", "2048"), ("ro", "1")]);
        let partition = disk.join("cciss!c0d0p1");
        write(&partition, &[("dev", "104:1"), ("size", "1024"), ("start", "8"), ("partition", "1")]);
        write(&disk.join("queue"), &[]);

        let disk = Block::at(&disk);
        assert_eq!((disk.number(), disk.size(), disk.start()), (Some((104, 0)), Some(1 << 20), None));
        assert!(disk.is_read_only() && disk.disk().is_none());
        assert_eq!(disk.node().as_deref(), Some("/dev/cciss/c0d0"));
        let [partition] = &disk.partitions()[..] else { panic!("one partition") };
        assert_eq!(partition.name().as_deref(), Some("cciss/c0d0p1"));
        assert_eq!((partition.start(), partition.is_read_only()), (Some(4096), false));
        assert_eq!(partition.disk().and_then(|disk| disk.number()), Some((104, 0)));
    }

    #[test]
    fn stacked_devices_are_followed_through_links() {
        let root = tempfile::tempdir().unwrap();
        let [below, above] = ["sda", "dm-0"].map(|name| root.path().join(name));
        write(&below.join("holders"), &[]);
        write(&above, &[("dev", "253:0")]);
        symlink(&above, below.join("holders/dm-0")).unwrap();
        let holders = Block::at(&below).holders();
        assert_eq!(holders[0].number(), Some((253, 0)));
        assert_eq!(holders[0].node().as_deref(), Some("/dev/dm-0"));
        assert!(Block::at(&below).slaves().is_empty());
    }

    #[test]
    fn a_device_that_is_gone_has_no_attributes() {
        let gone = Block::named("no/such/device");
        assert!(!gone.exists() && gone.partitions().is_empty());
        assert_eq!((gone.number(), gone.size(), gone.name(), gone.bytes("dev")), (None, None, None, None));
    }
}
