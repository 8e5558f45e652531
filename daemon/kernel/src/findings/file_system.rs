//! The size of a file system according to its superblock, in bytes.

use loopd_common::little_endian::{bytes, u16_at, u32_at, u64_at};
use loopd_engine::kernel::Describer;

/// Where the superblock of ext2, ext3 and ext4 is.
const EXT: usize = 1024;
/// `EXT4_FEATURE_INCOMPAT_64BIT`.
const EXT_64_BIT: u32 = 0x80;
/// The largest block of ext is 64 KiB: 1024 << 6.
const EXT_LARGEST_BLOCK: u32 = 6;

/// Where the primary volume descriptor of ISO 9660 is.
pub const ISO_DESCRIPTOR: u64 = 32 * 1024;

/// The size that the first bytes of a device describe; 2048 are enough.
pub fn of_start(start: &[u8]) -> Option<(Describer, u64)> {
    ext(start).map(|size| (Describer::Ext, size)).or_else(|| Some((Describer::Squashfs, squashfs(start)?)))
}

fn ext(start: &[u8]) -> Option<u64> {
    let superblock = start.get(EXT..)?;
    if u16_at(superblock, 56)? != 0xef53 {
        return None;
    }
    let block = u32_at(superblock, 24).filter(|log| *log <= EXT_LARGEST_BLOCK)?;
    let has_high_half = u32_at(superblock, 96)? & EXT_64_BIT != 0;
    let high = if has_high_half { u32_at(superblock, 0x150)? } else { 0 };
    let blocks = (u64::from(high) << 32) | u64::from(u32_at(superblock, 4)?);
    plausible(blocks.checked_mul(1024 << block)?)
}

/// Version 4, the only one that Linux mounts.
fn squashfs(start: &[u8]) -> Option<u64> {
    let is_squashfs = bytes(start, 0)? == *b"hsqs" && u16_at(start, 28)? == 4;
    is_squashfs.then(|| u64_at(start, 40)).flatten().and_then(plausible)
}

/// The size according to the volume descriptor at [`ISO_DESCRIPTOR`].
pub fn of_descriptor(descriptor: &[u8]) -> Option<(Describer, u64)> {
    if bytes(descriptor, 0)? != *b"\x01CD001" {
        return None;
    }
    let block = u16_at(descriptor, 128).filter(|size| matches!(size, 512 | 1024 | 2048))?;
    let size = u64::from(u32_at(descriptor, 80)?) * u64::from(block);
    Some((Describer::Iso9660, plausible(size)?))
}

/// No device is larger: the kernel's offsets are signed.
fn plausible(size: u64) -> Option<u64> {
    (size > 0 && i64::try_from(size).is_ok()).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(structure: &mut [u8], offset: usize, bytes: &[u8]) {
        structure[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn ext_image(blocks: u32, high: u32, block: u32, features: u32) -> Vec<u8> {
        let mut start = vec![0; 2048];
        put(&mut start, EXT + 4, &blocks.to_le_bytes());
        put(&mut start, EXT + 24, &block.to_le_bytes());
        put(&mut start, EXT + 56, b"\x53\xef");
        put(&mut start, EXT + 96, &features.to_le_bytes());
        put(&mut start, EXT + 0x150, &high.to_le_bytes());
        start
    }

    #[test]
    fn sizes_of_ext_are_read() {
        let size = |blocks, high, block, features| {
            of_start(&ext_image(blocks, high, block, features)).map(|(by, size)| {
                assert_eq!(by, Describer::Ext);
                size
            })
        };
        assert_eq!(size(16384, 0, 0, 0), Some(16 << 20));
        assert_eq!(size(4096, 0, 2, 0x2c2), Some(16 << 20));
        assert_eq!(size(1, 1, 2, EXT_64_BIT), Some(((1 << 32) + 1) * 4096));
        assert_eq!(size(1, 1, 2, 0), Some(4096), "the high half has another meaning");
        assert_eq!(size(1, 0, 6, 0), Some(65536));
        for (blocks, high, block, features) in [
            (1, 0, 7, 0),
            (1, 0, u32::MAX, 0),
            (0, 0, 0, 0),
            (u32::MAX, u32::MAX, 6, EXT_64_BIT),
            (u32::MAX, u32::MAX >> 12, 2, EXT_64_BIT),
        ] {
            let found = size(blocks, high, block, features);
            assert!(found.is_none_or(|size| i64::try_from(size).is_ok()), "{found:?}");
        }
        assert_eq!(size(u32::MAX, u32::MAX, 6, EXT_64_BIT), None);
    }

    #[test]
    fn sizes_of_squashfs_are_read() {
        let image = |version: u16, size: u64| {
            let mut start = vec![0; 96];
            put(&mut start, 0, b"hsqs");
            put(&mut start, 28, &version.to_le_bytes());
            put(&mut start, 40, &size.to_le_bytes());
            of_start(&start)
        };
        assert_eq!(image(4, 188_392), Some((Describer::Squashfs, 188_392)));
        assert_eq!((image(3, 188_392), image(4, 0), image(4, u64::MAX)), (None, None, None));
    }

    #[test]
    fn sizes_of_iso_9660_are_read() {
        let image = |kind: &[u8], blocks: u32, block: u16| {
            let mut descriptor = vec![0; 2048];
            put(&mut descriptor, 0, kind);
            put(&mut descriptor, 80, &blocks.to_le_bytes());
            put(&mut descriptor, 128, &block.to_le_bytes());
            of_descriptor(&descriptor)
        };
        assert_eq!(image(b"\x01CD001\x01", 1000, 2048), Some((Describer::Iso9660, 2_048_000)));
        let largest = u64::from(u32::MAX) * 2048;
        assert_eq!(image(b"\x01CD001\x01", u32::MAX, 2048), Some((Describer::Iso9660, largest)));
        for (kind, blocks, block) in [
            (&b"\x02CD001"[..], 1000, 2048),
            (b"\x01NSR02", 1000, 2048),
            (b"\x01CD001", 1000, 0),
            (b"\x01CD001", 1000, 4096),
            (b"\x01CD001", 0, 2048),
        ] {
            assert_eq!(image(kind, blocks, block), None);
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| {
            for start in [&bytes[..], &[b"hsqs", &bytes[..]].concat(), &[&[0; EXT], &bytes[..]].concat()] {
                let found = [of_start(start), of_descriptor(start)];
                assert!(found.iter().flatten().all(|(_, size)| i64::try_from(*size).is_ok()));
            }
        });
    }
}
