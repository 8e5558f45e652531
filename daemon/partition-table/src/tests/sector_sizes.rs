//! DOS tables that were written for another sector size than that of the device.

use super::images::{DosEntry, Memory, dos, put_record};
use crate::{TableKind, Warning, read};

/// An image of 16 MiB with these entries, and contents at byte offsets.
fn image(entries: &[DosEntry], contents: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = dos(32768, entries);
    for (offset, bytes) in contents {
        image[*offset..*offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

fn other_size(image: Vec<u8>, block_size: u32) -> Option<u32> {
    let found = read(&mut Memory::from(image), block_size).unwrap();
    let mut sizes = found.warnings.iter().filter_map(|warning| match warning {
        Warning::OtherSectorSize { table: TableKind::Dos, written, read } => {
            assert_eq!(*read, block_size);
            assert_eq!(found.described, None, "its size is not known then");
            Some(*written)
        }
        _ => None,
    });
    sizes.next_back()
}

#[test]
fn contents_show_the_size_of_the_sectors() {
    let first = 256;
    for written in [512, 1024, 2048, 4096_u32] {
        let start = first as usize * written as usize;
        for (place, signature) in [
            (0, &b"XFSB"[..]),
            (0, b"hsqs"),
            (0, b"LUKS\xba\xbe"),
            (510, b"\x55\xaa"),
            (512, b"LABELONE"),
            (1080, b"\x53\xef"),
            (4086, b"SWAPSPACE2"),
            (65600, b"_BHRfS_M"),
        ] {
            let image = image(&[(0, 0x83, first, 100)], &[(start + place, signature)]);
            for block_size in [512, 2048, 4096] {
                let expected = (block_size != written).then_some(written);
                assert_eq!(other_size(image.clone(), block_size), expected, "{written} {place} {block_size}");
            }
        }
    }
}

#[test]
fn contents_at_the_place_for_the_device_take_precedence() {
    let (superblock, entries) = (&b"\x53\xef"[..], [(0, 0x83, 256, 100), (0, 0x83, 2048, 100)]);
    // The second partition lies where the first would with sectors of 4096 bytes.
    let found = image(&entries, &[(256 * 4096 + 1080, superblock)]);
    assert_eq!(other_size(found, 512), None);
}

#[test]
fn empty_partitions_show_nothing() {
    assert_eq!(other_size(image(&[(0, 0x83, 256, 100)], &[]), 512), None);
    assert_eq!(other_size(image(&[(0, 0x83, u32::MAX, 100)], &[]), 512), None);
    // A partition from sector 0 on starts at the same place with any size.
    assert_eq!(other_size(image(&[(0, 0x83, 0, 100)], &[]), 512), None);
}

#[test]
fn the_chain_of_logical_partitions_shows_the_size_too() {
    let mut found = image(&[(0, 5, 256, 2000)], &[]);
    put_record(&mut found[256 * 2048..], &[(0, 0x83, 8, 8)]);
    assert_eq!(other_size(found, 512), Some(2048));
}
