//! The end of a backing file, which the device does not show.

use std::os::fd::AsFd;

use loopd_engine::kernel::{FileEnd, ImageFormat};
use loopd_partition_table::Image as _;

use super::format;
use crate::partition_table::Bytes;

/// The unit of a device's size in bytes.
const SECTOR: u64 = 512;

/// The end of a file of this size, attached with this offset and size limit; `None` is a block device, which has
/// whole sectors. Reads the last 512 bytes if they are not those of the device.
pub fn file_end(file: impl AsFd, size: Option<u64>, offset: u64, size_limit: u64) -> FileEnd {
    let Some(size) = size else { return FileEnd::default() };
    let rest = size.saturating_sub(offset);
    let is_limited = size_limit != 0 && size_limit < rest;
    let bytes = if is_limited { size_limit } else { rest };
    let is_shown = is_limited || bytes.is_multiple_of(SECTOR) || rest < SECTOR;
    let format = if is_shown { None } else { trailer(&file, size) };
    FileEnd { bytes, format }
}

fn trailer(file: &impl AsFd, size: u64) -> Option<ImageFormat> {
    let mut end = [0; 512];
    let mut bytes = Bytes::new(file, 0, size);
    bytes.read_at(size.checked_sub(SECTOR)?, &mut end).ok()?;
    format::of_end(&end)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(bytes: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn end(bytes: &[u8], offset: u64, size_limit: u64) -> FileEnd {
        file_end(file(bytes), Some(bytes.len() as u64), offset, size_limit)
    }

    #[test]
    fn the_size_is_that_of_the_part_that_is_attached() {
        let content = vec![0; 10_001];
        for (offset, limit, bytes) in [
            (0, 0, 10_001),
            (1, 0, 10_000),
            (512, 1000, 1000),
            (9000, 5000, 1001),
            (10_001, 0, 0),
            (u64::MAX, u64::MAX, 0),
        ] {
            assert_eq!(end(&content, offset, limit), FileEnd { bytes, format: None }, "{offset} {limit}");
        }
        assert_eq!(file_end(file(&content), None, 0, 0), FileEnd::default(), "a block device");
    }

    #[test]
    fn a_trailer_at_any_place_is_read() {
        for length in [0, 1, 100, 511, 512, 5000] {
            let mut content = vec![7; length];
            content.extend_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
            content.resize(length + 512, 0);
            // That of a whole number of sectors is found through the device.
            let expected = (length % 512 != 0).then_some(ImageFormat::Dmg);
            assert_eq!(end(&content, 0, 0).format, expected, "{length}");
            assert_eq!(end(&content, 0, 512).format, None, "not attached");
        }
    }
}
