//! Recognizes formats and described sizes in the bytes of a device.

use loopd_engine::kernel::{Describer, Findings};
use loopd_partition_table::{Image, Reading};

use super::file_system::{self, ISO_DESCRIPTOR};
use super::format;
use super::table::{self, Nodes};

/// How many bytes are read at the start of a device.
const START: usize = 2048;
/// How many bytes are read at its end.
const END: usize = 512;
/// The size of a volume descriptor.
const DESCRIPTOR: usize = 2048;

/// The findings in the bytes; none in bytes that cannot be read.
pub fn find(image: &mut impl Image, reading: &Reading, nodes: Nodes<'_>) -> Findings {
    let size = image.size();
    let start = part(image, 0, START);
    let format = format::of_start(&start);
    if format.is_some() {
        // In such an image, bytes that look like a table or a superblock are neither.
        return Findings { format, ..Findings::default() };
    }
    let end = part(image, size.saturating_sub(END as u64), END);
    let described = described(image, &start, reading);
    let is_cut_short = described.is_some_and(|(_, described)| described > size);
    let warnings = table::warnings(reading, nodes, is_cut_short);
    Findings { format: format::of_end(&end), described, warnings }
}

/// The largest size that the image describes.
fn described(image: &mut impl Image, start: &[u8], reading: &Reading) -> Option<(Describer, u64)> {
    let table = reading.described.map(|size| (Describer::PartitionTable, size));
    let descriptor = part(image, ISO_DESCRIPTOR, DESCRIPTOR);
    // A superblock behind a partition table is left from an earlier use; only ISO 9660 and a table exist together, in
    // hybrid images. A boot loader in front of a file system reads as a table without partitions.
    let has_partitions = reading.table.as_ref().is_some_and(|table| !table.partitions.is_empty());
    let file_system = if has_partitions || table.is_some() { None } else { file_system::of_start(start) };
    let all = [table, file_system, file_system::of_descriptor(&descriptor)];
    all.into_iter().flatten().max_by_key(|(_, size)| *size)
}

/// At most `length` bytes from an offset on: fewer at the end of the image, none if they cannot be read.
fn part(image: &mut impl Image, offset: u64, length: usize) -> Vec<u8> {
    let available = usize::try_from(image.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(available)];
    if bytes.is_empty() || image.read_at(offset, &mut bytes).is_err() {
        bytes.clear();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::io;

    use loopd_engine::Warning;
    use loopd_engine::kernel::ImageFormat;

    use super::*;

    struct Memory {
        bytes: Vec<u8>,
        reads: usize,
        bytes_read: usize,
        is_readable: bool,
    }

    impl Memory {
        fn new(bytes: Vec<u8>) -> Self {
            Self { bytes, reads: 0, bytes_read: 0, is_readable: true }
        }
    }

    impl Image for Memory {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            if !self.is_readable {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let offset = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.bytes[offset..offset + buffer.len()]);
            (self.reads, self.bytes_read) = (self.reads + 1, self.bytes_read + buffer.len());
            Ok(())
        }
    }

    const NODES: Nodes<'_> = Nodes { nodes: &[], wanted: true, incomplete: false };

    fn found(bytes: Vec<u8>, reading: &Reading) -> Findings {
        find(&mut Memory::new(bytes), reading, NODES)
    }

    fn image(size: usize, contents: &[(usize, &[u8])]) -> Vec<u8> {
        let mut image = vec![0; size];
        for (offset, bytes) in contents {
            image[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        }
        image
    }

    /// An ext file system of 8 MiB.
    const EXT: [(usize, &[u8]); 2] = [(1028, b"\0\x20\0\0"), (1080, b"\x53\xef")];
    /// An ISO 9660 file system of 4 MiB.
    const ISO: [(usize, &[u8]); 3] =
        [(32768, b"\x01CD001"), (32768 + 80, b"\0\x08\0\0"), (32768 + 128, b"\0\x08")];

    #[test]
    fn few_bytes_are_read_of_any_image() {
        for size in [0, 1, 511, 512, 2048, 33_000, 1 << 20] {
            let mut image = Memory::new(vec![0; size]);
            assert_eq!(find(&mut image, &Reading::default(), NODES), Findings::default(), "{size}");
            assert!(image.reads <= 3 && image.bytes_read <= START + END + DESCRIPTOR, "{size}");
        }
    }

    #[test]
    fn unreadable_bytes_show_nothing() {
        let mut image = Memory::new(image(4096, &[(0, b"QFI\xfb")]));
        image.is_readable = false;
        assert_eq!(find(&mut image, &Reading::default(), NODES), Findings::default());
    }

    #[test]
    fn the_largest_description_counts() {
        let reading = |described| Reading { described, ..Reading::default() };
        let of =
            |contents: &[(usize, &[u8])], table| found(image(1 << 17, contents), &reading(table)).described;
        assert_eq!(of(&EXT, None), Some((Describer::Ext, 8 << 20)));
        assert_eq!(of(&ISO, None), Some((Describer::Iso9660, 4 << 20)));
        assert_eq!(of(&ISO, Some(5 << 20)), Some((Describer::PartitionTable, 5 << 20)), "a hybrid image");
        assert_eq!(of(&ISO, Some(3 << 20)), Some((Describer::Iso9660, 4 << 20)));
        assert_eq!(of(&EXT, Some(3 << 20)), Some((Describer::PartitionTable, 3 << 20)), "an old superblock");
        assert_eq!(of(&[], None), None);
    }

    #[test]
    fn a_boot_loader_does_not_hide_the_file_system_behind_it() {
        let mut image = Memory::new(image(1 << 17, &[&EXT[..], &[(510, b"\x55\xaa")]].concat()));
        let mut reading = loopd_partition_table::read(&mut image, 512).unwrap();
        assert!(reading.table.is_some());
        assert_eq!(find(&mut image, &reading, NODES).described, Some((Describer::Ext, 8 << 20)));
        image.bytes[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0]);
        reading = loopd_partition_table::read(&mut image, 512).unwrap();
        assert_eq!(find(&mut image, &reading, NODES).described, Some((Describer::PartitionTable, 16 * 512)));
    }

    #[test]
    fn the_start_of_another_format_is_no_disk() {
        let reading = Reading {
            warnings: vec![loopd_partition_table::Warning::UnprotectedGpt],
            described: Some(1 << 40),
            ..Reading::default()
        };
        let contents = [&[(0, &b"\xfd7zXZ\0"[..])], &ISO[..]].concat();
        let findings = found(image(1 << 17, &contents), &reading);
        assert_eq!(findings, Findings { format: Some(ImageFormat::Xz), ..Findings::default() });
    }

    #[test]
    fn a_trailer_does_not_hide_the_table() {
        let koly = (4096 - 512, &b"koly\0\0\0\x04\0\0\x02\0"[..]);
        let reading =
            Reading { warnings: vec![loopd_partition_table::Warning::UnprotectedGpt], ..Reading::default() };
        let findings = found(image(4096, &[koly]), &reading);
        assert_eq!(findings.format, Some(ImageFormat::Dmg));
        assert!(matches!(findings.warnings[..], [Warning::TableIgnored(_)]));
    }
}
