//! Little-endian numbers in the bytes of an image.

/// The bytes at an offset; `None` if the structure ends before.
pub fn bytes<const N: usize>(structure: &[u8], offset: usize) -> Option<[u8; N]> {
    structure.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// Two bytes, little-endian.
pub fn u16_at(structure: &[u8], offset: usize) -> Option<u16> {
    bytes(structure, offset).map(u16::from_le_bytes)
}

/// Four bytes, little-endian.
pub fn u32_at(structure: &[u8], offset: usize) -> Option<u32> {
    bytes(structure, offset).map(u32::from_le_bytes)
}

/// Eight bytes, little-endian.
pub fn u64_at(structure: &[u8], offset: usize) -> Option<u64> {
    bytes(structure, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_up_to_the_end() {
        let structure = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(bytes(&structure, 7), Some([8, 9]));
        assert_eq!(u16_at(&structure, 7), Some(0x0908));
        assert_eq!(u32_at(&structure, 5), Some(0x0908_0706));
        assert_eq!(u64_at(&structure, 1), Some(0x0908_0706_0504_0302));
        assert_eq!((u16_at(&structure, 8), u32_at(&structure, 6), u64_at(&structure, 2)), (None, None, None));
        assert_eq!(bytes::<2>(&structure, usize::MAX), None, "no overflow");
    }
}
