//! Numbers in the bytes of an image.

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
