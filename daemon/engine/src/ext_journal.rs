//! Whether an ext file system's journal must be replayed before it can be read: a few bytes of its
//! superblock (Documentation/filesystems/ext4/super.rst).

/// Offset of the superblock, in bytes.
pub(super) const SUPERBLOCK: u64 = 1024;
/// How much of it is read, in bytes.
pub(super) const LENGTH: usize = 0x64;

const MAGIC_AT: usize = 0x38;
const MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();
const INCOMPATIBLE_AT: usize = 0x60;
const NEEDS_RECOVERY: u32 = 0x4;

/// Whether these bytes are a superblock with the feature `needs_recovery`.
pub(super) fn needs_replay(superblock: &[u8]) -> bool {
    let is_ext = superblock.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) == Some(&MAGIC);
    let features = superblock.get(INCOMPATIBLE_AT..).and_then(|rest| rest.first_chunk());
    is_ext && features.is_some_and(|features| u32::from_le_bytes(*features) & NEEDS_RECOVERY != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_superblock_with_the_feature_needs_a_replay() {
        let mut superblock = vec![0; LENGTH];
        superblock[INCOMPATIBLE_AT] = 0x46;
        assert!(!needs_replay(&superblock), "no magic");
        superblock[MAGIC_AT..MAGIC_AT + 2].copy_from_slice(&MAGIC);
        assert!(needs_replay(&superblock));
        superblock[INCOMPATIBLE_AT] = 0x42;
        assert!(!needs_replay(&superblock));
        for length in 0..LENGTH {
            assert!(!needs_replay(&superblock[..length]));
        }
    }
}
