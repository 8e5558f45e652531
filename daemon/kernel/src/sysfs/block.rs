//! A block device in sysfs: a disk or a partition.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use loopd_common::mountinfo;

use crate::error::{errno_of, is_gone};

/// The unit of sizes and offsets in sysfs, for any block size.
const SECTOR: u64 = 512;

/// The smallest page of the kernel in bytes. An attribute has at most a page, and one read returns all of it
/// (`sysfs_kf_seq_show`).
const PAGE: usize = 4096;

/// Major and minor number.
pub type DeviceNumber = (u32, u32);

/// The directory of a block device. It may be gone: reading an attribute gives nothing then.
///
/// # Errors
/// Methods that return an error fail if sysfs cannot be read, for example because no descriptor is free.
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

    /// The bytes of an attribute, without the newline that the kernel adds; `None` if the device is gone.
    fn read(&self, attribute: &str) -> io::Result<Option<Vec<u8>>> {
        let path = self.directory.join(attribute);
        let mut buffer = [0; PAGE];
        let bytes = match File::open(&path).and_then(|mut file| file.read(&mut buffer)) {
            Ok(length) if length < PAGE => buffer[..length].to_vec(),
            Ok(_) => fs::read(path)?,
            Err(error) if is_gone(errno_of(&error)) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(bytes.strip_suffix(b"\n").unwrap_or(&bytes).to_vec()))
    }

    /// The value of an attribute; `None` if the device is gone.
    fn parse<T>(&self, attribute: &str, parse: impl Fn(&str) -> Option<T>) -> io::Result<Option<T>> {
        let Some(bytes) = self.read(attribute)? else { return Ok(None) };
        let value = std::str::from_utf8(&bytes).ok().and_then(parse);
        value.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The value of an attribute; `None` if the device is gone.
    pub fn read_value<T: FromStr>(&self, attribute: &str) -> io::Result<Option<T>> {
        self.parse(attribute, |text| text.parse().ok())
    }

    /// The bytes of an attribute; `None` if it cannot be read.
    pub fn bytes(&self, attribute: &str) -> Option<Vec<u8>> {
        self.read(attribute).ok().flatten()
    }

    /// The value of an attribute; `None` if it cannot be read.
    pub fn value<T: FromStr>(&self, attribute: &str) -> Option<T> {
        self.read_value(attribute).ok().flatten()
    }

    /// The device number; `None` if the device is gone.
    pub fn number(&self) -> io::Result<Option<DeviceNumber>> {
        self.parse("dev", mountinfo::device_number)
    }

    /// The size in bytes; `None` if the device is gone.
    pub fn size(&self) -> io::Result<Option<u64>> {
        Ok(self.read_value::<u64>("size")?.and_then(|sectors| sectors.checked_mul(SECTOR)))
    }

    /// Where a partition starts on its disk, in bytes; `None` for a disk.
    pub fn start(&self) -> io::Result<Option<u64>> {
        Ok(self.read_value::<u64>("start")?.and_then(|sectors| sectors.checked_mul(SECTOR)))
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

    fn is_numbered(&self) -> bool {
        let name = self.directory.file_name().unwrap_or_default();
        name.as_bytes().last().is_some_and(u8::is_ascii_digit)
    }

    /// The partitions of a disk.
    pub fn partitions(&self) -> io::Result<Vec<Self>> {
        let mut blocks = blocks_in(&self.directory)?;
        // The name of a partition ends with its number (`disk_name` in the kernel).
        blocks.retain(|block| block.is_numbered() && block.has("partition"));
        Ok(blocks)
    }

    /// The device and its partitions.
    pub fn with_partitions(&self) -> io::Result<Vec<Self>> {
        let mut all = self.partitions()?;
        all.push(self.clone());
        Ok(all)
    }

    /// The devices that are stacked on this one.
    pub fn holders(&self) -> io::Result<Vec<Self>> {
        blocks_in(&self.directory.join("holders"))
    }

    /// The devices that this one is stacked on.
    pub fn slaves(&self) -> io::Result<Vec<Self>> {
        blocks_in(&self.directory.join("slaves"))
    }
}

fn blocks_in(directory: &Path) -> io::Result<Vec<Block>> {
    Ok(entries(directory)?.into_iter().map(|directory| Block { directory }).collect())
}

/// The entries of a directory; none if there is no directory with this path.
pub fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if is_gone(errno_of(&error)) || error.kind() == io::ErrorKind::NotADirectory => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::test_descriptors::without_descriptors;

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
        assert_eq!(disk.number().unwrap(), Some((104, 0)));
        assert_eq!((disk.size().unwrap(), disk.start().unwrap()), (Some(1 << 20), None));
        assert!(disk.is_read_only() && disk.disk().is_none());
        assert_eq!(disk.node().as_deref(), Some("/dev/cciss/c0d0"));
        let [partition] = &disk.partitions().unwrap()[..] else { panic!("one partition") };
        assert_eq!(partition.name().as_deref(), Some("cciss/c0d0p1"));
        assert_eq!((partition.start().unwrap(), partition.is_read_only()), (Some(4096), false));
        assert_eq!(partition.disk().unwrap().number().unwrap(), Some((104, 0)));
    }

    #[test]
    fn stacked_devices_are_followed_through_links() {
        let root = tempfile::tempdir().unwrap();
        let [below, above] = ["sda", "dm-0"].map(|name| root.path().join(name));
        write(&below.join("holders"), &[]);
        write(&above, &[("dev", "253:0")]);
        symlink(&above, below.join("holders/dm-0")).unwrap();
        let holders = Block::at(&below).holders().unwrap();
        assert_eq!(holders[0].number().unwrap(), Some((253, 0)));
        assert_eq!(holders[0].node().as_deref(), Some("/dev/dm-0"));
        assert!(Block::at(&below).slaves().unwrap().is_empty());
    }

    #[test]
    fn a_device_that_is_gone_has_no_attributes() {
        let gone = Block::named("no/such/device");
        assert!(!gone.exists() && gone.partitions().unwrap().is_empty());
        assert_eq!((gone.number().unwrap(), gone.start().unwrap()), (None, None));
        assert_eq!((gone.size().unwrap(), gone.name(), gone.bytes("dev")), (None, None, None));
    }

    #[test]
    fn a_device_that_cannot_be_read_is_not_gone() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("loop3");
        write(&disk, &[("dev", "7:3")]);
        write(&disk.join("slaves"), &[]);
        let block = Block::at(&disk);
        assert!(block.slaves().is_ok() && block.number().is_ok());
        without_descriptors(|| {
            assert!(block.slaves().is_err() && block.holders().is_err() && block.partitions().is_err());
            assert!(block.number().is_err() && block.start().is_err());
        });
        write(&disk, &[("dev", "no number")]);
        assert!(block.number().is_err());
    }
}
