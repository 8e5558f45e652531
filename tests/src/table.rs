//! Partition tables: as tools and the kernel read them, and tables that no tool writes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use linux_raw_sys::loop_device::{LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN};
use serde_json::Value;

use crate::image::Image;
use crate::loop_ioctl;
use crate::process::run;
use crate::sysfs::{Extent, Extents};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A partition as util-linux reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its first byte.
    pub offset: u64,
    /// Bytes; two sectors for an extended partition, as for the kernel.
    pub size: u64,
    /// `gpt` or `dos`.
    pub table: String,
    /// A GUID, or `0x83`.
    pub kind: String,
    /// The UUID, as in `/dev/disk/by-partuuid`.
    pub uuid: String,
    /// The name in the table.
    pub label: String,
}

/// The partitions in an image or on a device, as libblkid reports them through partx, with the names that
/// sfdisk reads. Fails if the two disagree.
///
/// # Errors
/// They cannot be run, or disagree.
pub async fn of(target: &str, sector_size: u32) -> Result<BTreeMap<u32, Entry>> {
    let columns = "NR,START,SECTORS,TYPE,UUID,SCHEME";
    let size = sector_size.to_string();
    let shown = run("partx", ["--sector-size", &size, "--pairs", "-o", columns, target]).await?;
    let mut entries = shown.lines().map(partx_line).collect::<Option<BTreeMap<_, _>>>().context(shown)?;
    let listed: Value = serde_json::from_str(&run("sfdisk", ["--json", target]).await?)?;
    let listed = &listed["partitiontable"];
    let unit = listed["sectorsize"].as_u64().unwrap_or(SECTOR);
    for partition in listed["partitions"].as_array().context("sfdisk lists no partitions")? {
        let node = partition["node"].as_str().context("no node")?;
        let number =
            node.strip_prefix(target).context("a node of another")?.trim_start_matches('p').parse()?;
        let entry: &mut Entry = entries.get_mut(&number).with_context(|| format!("partx has no {number}"))?;
        let [start, size] = ["start", "size"].map(|name| partition[name].as_u64().unwrap_or(0) * unit);
        anyhow::ensure!(
            (entry.offset, entry.size) == (start, size),
            "partx has {entry:?}, sfdisk has {partition}"
        );
        partition["name"].as_str().unwrap_or_default().clone_into(&mut entry.label);
    }
    for entry in entries.values_mut() {
        if entry.table == "dos" && ["0x5", "0xf", "0x85"].contains(&entry.kind.as_str()) {
            entry.size = u64::from(sector_size).max(2 * SECTOR);
        }
    }
    Ok(entries)
}

/// `NR="1" START="2048" …`
fn partx_line(line: &str) -> Option<(u32, Entry)> {
    let value = |name: &str| {
        let start = line.find(&format!("{name}=\""))? + name.len() + 2;
        line[start..].split('"').next()
    };
    // partx prints sectors of 512 bytes, independent of the device.
    let sectors = |name: &str| Some(value(name)?.parse::<u64>().ok()? * SECTOR);
    let entry = Entry {
        offset: sectors("START")?,
        size: sectors("SECTORS")?,
        table: value("SCHEME")?.to_owned(),
        kind: value("TYPE")?.to_owned(),
        uuid: value("UUID")?.to_owned(),
        label: String::new(),
    };
    Some((value("NR")?.parse().ok()?, entry))
}

/// The number of partitions that a loop device can have, more than a GPT has by default.
pub const MOST_PARTITIONS: u32 = 255;

/// An image with the maximum number of partitions, each of four KiB.
///
/// # Errors
/// sfdisk's.
pub async fn with_most_partitions(directory: &Path, name: &str) -> Result<Image> {
    let image = Image::sparse(directory, name, 8 << 20)?;
    let script = directory.join(format!("{name}.sfdisk"));
    let mut text = "label: gpt\nfirst-lba: 256\ntable-length: 256\n\n".to_owned();
    for number in 0..MOST_PARTITIONS {
        text.push_str(&format!("start={}, size=8\n", 2048 + 8 * number));
    }
    std::fs::write(&script, text)?;
    let command = r#"exec sfdisk --quiet --no-reread --no-tell-kernel "$1" <"$2" >/dev/null"#;
    let [image_name, script] = [image.path.as_os_str(), script.as_os_str()];
    run("sh", ["-c", command, "sh"].map(OsStr::new).into_iter().chain([image_name, script])).await?;
    Ok(image)
}

/// Whether the kernel reads partition tables itself.
///
/// # Errors
/// The kernel's.
pub fn kernel_reads() -> Result<bool> {
    let directory = crate::host::get()?.new_directory()?;
    let image = Image::sparse(directory.path(), "image", 1 << 20)?;
    Mbr::new(&[(0x83, 8, 8)]).write(&image, 0)?;
    Ok(!by_kernel(&image)?.is_empty())
}

/// The partitions that the kernel finds in an image.
///
/// # Errors
/// The kernel's.
pub fn by_kernel(image: &Image) -> Result<Extents> {
    let control = loop_ioctl::control()?;
    let flags = LO_FLAGS_PARTSCAN as u32 | LO_FLAGS_AUTOCLEAR as u32;
    loop {
        let device = loop_ioctl::get_free(&control)?;
        let file = std::fs::File::open(device.node())?;
        match loop_ioctl::configure(&file, &image.open()?, flags) {
            // Another program has taken the device.
            Err(nix::Error::EBUSY) => {}
            configured => return configured.map(|()| device.partitions()).map_err(Into::into),
        }
    }
}

/// Extents, from sectors.
#[must_use]
pub fn extents(sectors: &[(u32, u64, u64)]) -> Extents {
    let extent = |start, size| Extent { start: start * SECTOR, size: size * SECTOR };
    sectors.iter().map(|&(number, start, size)| (number, extent(start, size))).collect()
}

/// A GUID partition table, both copies, with any entries.
#[derive(Clone, Debug)]
pub struct Gpt<'a> {
    /// First and last sector of each partition.
    entries: &'a [(u64, u64)],
    sector_size: u64,
}

/// The number of entries, and the bytes of each.
const ENTRIES: usize = 128;
const ENTRY_SIZE: usize = 128;
/// The entries.
type Array = [u8; ENTRIES * ENTRY_SIZE];

impl<'a> Gpt<'a> {
    /// With these partitions, from number 1 on: their first and last sectors, of 512 bytes each.
    #[must_use]
    pub const fn new(entries: &'a [(u64, u64)]) -> Self {
        Self { entries, sector_size: SECTOR }
    }

    /// The same numbers, in sectors of this many bytes.
    #[must_use]
    pub const fn with_sector_size(self, sector_size: u64) -> Self {
        Self { sector_size, ..self }
    }

    /// The position of the primary header, with sectors of 512 bytes.
    pub const HEADER: u64 = SECTOR;
    /// The position of the primary entries, with sectors of 512 bytes.
    pub const ENTRIES: u64 = 2 * SECTOR;

    /// Writes it into the image, for the size of the image.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn write(&self, image: &Image) -> Result<()> {
        let last = std::fs::metadata(&image.path)?.len() / self.sector_size - 1;
        Mbr::new(&[(0xee, 1, u32::try_from(last)?)]).write(image, 0)?;
        let file = image.open()?;
        let array = self.array()?;
        let array_sectors = u64::try_from(array.len())? / self.sector_size;
        // Both copies need as many sectors: the header, the entries, and the boot record before the primary.
        let usable = (2 + array_sectors, last - (2 + array_sectors));
        for (place, other, array_place) in [(1, last, 2), (last, 1, last - array_sectors)] {
            let header = header((place, other), usable, array_place, crc32(&array));
            file.write_all_at(&header, place * self.sector_size)?;
            file.write_all_at(&array, array_place * self.sector_size)?;
        }
        Ok(())
    }

    fn array(&self) -> Result<Array> {
        let mut entries = [0; ENTRIES * ENTRY_SIZE];
        for (index, (first, end)) in self.entries.iter().enumerate() {
            let entry = &mut entries[index * ENTRY_SIZE..][..ENTRY_SIZE];
            // 0fc63daf-8483-4772-8e79-3d69d8477de4: a Linux file system
            entry[..16].copy_from_slice(b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4");
            entry[16..32].fill(u8::try_from(index + 1)?);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&end.to_le_bytes());
        }
        Ok(entries)
    }
}

/// A header at the first place, for an array with this checksum. All places are sectors.
fn header(
    (place, other_copy): (u64, u64),
    (first_usable, last_usable): (u64, u64),
    array: u64,
    array_checksum: u32,
) -> [u8; 512] {
    let mut header = [0; 512];
    header[..16].copy_from_slice(b"EFI PART\0\0\x01\0\x5c\0\0\0");
    let places = [(24, place), (32, other_copy), (40, first_usable), (48, last_usable), (72, array)];
    for (offset, value) in places {
        header[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    header[56..72].fill(0xdd);
    for (offset, value) in [(80, 128_u32), (84, 128), (88, array_checksum)] {
        header[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    let checksum = crc32(&header[..92]);
    header[16..20].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn crc32(bytes: &[u8]) -> u32 {
    let shift = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), shift))
}

/// A boot record: of a disk, or an extended one in the chain of logical partitions.
#[derive(Clone, Debug)]
pub struct Mbr<'a> {
    entries: &'a [(u8, u32, u32)],
}

impl<'a> Mbr<'a> {
    /// With these entries: type, first sector, number of sectors.
    #[must_use]
    pub const fn new(entries: &'a [(u8, u32, u32)]) -> Self {
        Self { entries }
    }

    /// Writes it to a sector of the image.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn write(&self, image: &Image, sector: u64) -> Result<()> {
        let mut record = [0; 512];
        record[440..444].copy_from_slice(b"loop");
        for (index, (kind, first, sectors)) in self.entries.iter().enumerate() {
            let entry = &mut record[446 + 16 * index..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
        }
        record[510..].copy_from_slice(&[0x55, 0xaa]);
        Ok(image.open()?.write_all_at(&record, sector * SECTOR)?)
    }
}

#[cfg(test)]
mod tests {
    use super::{crc32, partx_line};

    #[test]
    fn checksum_matches_a_known_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn lines_of_partx_are_parsed() {
        let line = r#"NR="5" START="8" SECTORS="2" TYPE="0x83" UUID="6c6f6f70-05" SCHEME="dos""#;
        let (number, entry) = partx_line(line).unwrap();
        assert_eq!((number, entry.offset, entry.size), (5, 4096, 1024));
        assert_eq!((entry.table.as_str(), entry.uuid.as_str()), ("dos", "6c6f6f70-05"));
    }
}
