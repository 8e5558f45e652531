//! The reference and the mark of an attach, both stored in `lo_file_name`.
//!
//! The mark follows the NUL of the reference: the kernel keeps all 64 bytes, and no tool shows the bytes after
//! the NUL. A reference of more than 54 bytes leaves no space for a mark.

use std::ops::Range;

const MARK: Range<usize> = 55..63;

/// The `lo_file_name` for a reference of at most 63 bytes and a mark.
pub fn encode_file_name(reference: &str, mark: u64) -> [u8; 64] {
    let mut file_name = [0; 64];
    for (byte, wanted) in file_name.iter_mut().zip(reference.bytes()) {
        *byte = wanted;
    }
    if reference.len() < MARK.start {
        file_name[MARK].copy_from_slice(&mark.to_ne_bytes());
    }
    file_name
}

/// The reference and the mark in a `lo_file_name`; the mark is 0 if there is none.
pub fn decode_file_name(file_name: &[u8; 64]) -> (String, u64) {
    let length = file_name.iter().position(|byte| *byte == 0).unwrap_or(file_name.len());
    let mark = file_name[MARK].try_into().map(u64::from_ne_bytes).unwrap_or_default();
    let reference = String::from_utf8_lossy(&file_name[..length]).into_owned();
    (reference, if length < MARK.start { mark } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_fits_behind_a_reference_of_54_bytes() {
        let mark = 0x0102_0304_0506_0708;
        for (length, expected) in [(0, mark), (54, mark), (55, 0), (63, 0)] {
            let reference = "x".repeat(length);
            let file_name = encode_file_name(&reference, mark);
            assert_eq!(file_name[length], 0);
            assert_eq!(decode_file_name(&file_name), (reference, expected), "{length}");
        }
    }

    #[test]
    fn a_name_without_nul_is_read_to_its_end() {
        assert_eq!(decode_file_name(&[b'x'; 64]), ("x".repeat(64), 0));
    }
}
