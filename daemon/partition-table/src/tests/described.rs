//! The size of the image that a table was written for.

use super::images::{Gpt, Memory, chain, dos, put_u64};
use crate::read;

fn described(image: &[u8], block_size: u32) -> Option<u64> {
    read(&mut Memory::from(image.to_vec()), block_size).unwrap().described
}

#[test]
fn a_gpt_describes_the_image_up_to_its_backup() {
    for (size, block_size) in [(512, 512), (4096, 4096), (2048, 2048)] {
        let blocks = 1000;
        let image = Gpt::new(size, blocks, &[(1, 300, 400)]).image;
        let whole = image.len();
        for kept in [whole, whole - 1, whole - 33 * size, whole / 2, 2 * size] {
            assert_eq!(described(&image[..kept], block_size), Some(whole as u64), "{size} {kept}");
        }
    }
}

#[test]
fn a_gpt_for_other_sectors_that_was_cut_short_is_recognized() {
    let image = Gpt::new(4096, 1000, &[(1, 300, 400)]).image;
    assert_eq!(described(&image[..8192], 512), Some(4_096_000));
    assert_eq!(described(&image, 512), None, "whole: its sector size is the subject");
}

#[test]
fn a_gpt_whose_header_is_damaged_describes_nothing() {
    let mut gpt = Gpt::new(512, 1000, &[(1, 300, 400)]);
    gpt.image[512 + 40] ^= 1;
    assert_eq!(described(&gpt.image[..1024], 512), None);
}

#[test]
fn impossible_sizes_of_a_gpt_are_ignored() {
    for last in [u64::MAX, u64::MAX - 1, 1 << 60, (1 << 54) - 1] {
        let mut gpt = Gpt::new(512, 1000, &[(1, 300, 400)]);
        put_u64(gpt.block(1), 32, last);
        gpt.seal(1);
        assert_eq!(described(&gpt.image, 512), None, "{last}");
    }
    let mut gpt = Gpt::new(512, 1000, &[(1, 300, 400)]);
    put_u64(gpt.block(1), 32, (1 << 54) - 2);
    gpt.seal(1);
    assert_eq!(described(&gpt.image, 512), Some((1 << 63) - 512));
}

#[test]
fn a_dos_table_describes_the_image_up_to_its_last_partition() {
    let image = dos(4096, &[(0, 0x83, 64, 100), (0, 0x83, 2048, 2048)]);
    for kept in [4096, 3000, 64, 1] {
        assert_eq!(described(&image[..kept * 512], 512), Some(4096 * 512), "{kept}");
    }
    let largest = dos(64, &[(0, 0x83, u32::MAX, u32::MAX)]);
    assert_eq!(described(&largest, 512), Some(2 * u64::from(u32::MAX) * 512));
}

#[test]
fn extended_and_logical_partitions_count() {
    let image = chain(1000, &[(100, &[(0, 0x83, 10, 1500)])]);
    assert_eq!(described(&image, 512), Some(1610 * 512), "the logical one");
    let image = chain(1000, &[(100, &[(0, 0x83, 10, 20)])]);
    assert_eq!(described(&image, 512), Some(1000 * 512), "the extended one");
}

#[test]
fn images_without_a_table_describe_nothing() {
    assert_eq!(described(&[0; 8192], 512), None);
    assert_eq!(described(&[0; 100], 512), None);
    assert_eq!(described(&dos(100, &[]), 512), None, "no entry in use");
}
