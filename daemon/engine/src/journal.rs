//! Whether the journal of a file system must be replayed before it can be read, which writes to the device: a few
//! bytes of its superblock.

use loopd_common::little_endian::{bytes, u16_at, u32_at, u64_at};

/// Where a superblock says whether its journal is clean.
pub(super) struct Journal {
    /// Offset of what is read, in bytes.
    pub offset: u64,
    /// How much is read, in bytes.
    pub length: usize,
    needs_replay: fn(&[u8]) -> bool,
}

impl Journal {
    /// The journal of a file system of this kind; `None` if it has none that loopd can judge.
    pub fn of(kind: &str) -> Option<Self> {
        match kind {
            // Documentation/filesystems/ext4/super.rst
            "ext3" | "ext4" => Some(Self { offset: 1024, length: 0x64, needs_replay: ext_needs_replay }),
            // `struct btrfs_super_block`
            "btrfs" => Some(Self { offset: 0x1_0000, length: 0x68, needs_replay: btrfs_needs_replay }),
            _ => None,
        }
    }

    /// Whether these bytes are of a superblock whose journal must be replayed.
    pub fn needs_replay(&self, bytes: &[u8]) -> bool {
        (self.needs_replay)(bytes)
    }
}

/// The feature `needs_recovery`.
fn ext_needs_replay(superblock: &[u8]) -> bool {
    const NEEDS_RECOVERY: u32 = 0x4;
    u16_at(superblock, 0x38) == Some(0xef53)
        && u32_at(superblock, 0x60).is_some_and(|features| features & NEEDS_RECOVERY != 0)
}

/// A log tree, which the last fsync has left.
fn btrfs_needs_replay(superblock: &[u8]) -> bool {
    bytes(superblock, 0x40) == Some(*b"_BHRfS_M") && u64_at(superblock, 0x60).is_some_and(|log| log != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_superblock_with_the_feature_needs_a_replay() {
        let journal = Journal::of("ext4").unwrap();
        let mut superblock = vec![0; journal.length];
        superblock[0x60] = 0x46;
        assert!(!journal.needs_replay(&superblock), "no magic");
        superblock[0x38..0x3a].copy_from_slice(&0xef53_u16.to_le_bytes());
        assert!(journal.needs_replay(&superblock));
        superblock[0x60] = 0x42;
        assert!(!journal.needs_replay(&superblock));
        for length in 0..journal.length {
            assert!(!journal.needs_replay(&superblock[..length]));
        }
    }

    #[test]
    fn only_a_btrfs_with_a_log_tree_needs_a_replay() {
        let journal = Journal::of("btrfs").unwrap();
        let mut superblock = vec![0; journal.length];
        superblock[0x67] = 1;
        assert!(!journal.needs_replay(&superblock), "no magic");
        superblock[0x40..0x48].copy_from_slice(b"_BHRfS_M");
        assert!(journal.needs_replay(&superblock));
        superblock[0x67] = 0;
        assert!(!journal.needs_replay(&superblock));
        for length in 0..journal.length {
            assert!(!journal.needs_replay(&superblock[..length]));
        }
    }

    #[test]
    fn other_file_systems_have_none_to_judge() {
        assert!(
            Journal::of("ext2").is_none() && Journal::of("xfs").is_none() && Journal::of("vfat").is_none()
        );
    }
}
