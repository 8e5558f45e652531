//! Finds references in a superblock to other block devices, which the driver would open, and mount options that it
//! would use. loopd refuses to mount such volumes.

use loopd_common::little_endian::{bytes, u16_at, u32_at, u64_at};

/// A part of the volume: offset and length, in bytes.
type Extent = (u64, usize);

/// The parts of a volume to be mounted as `kind` that [`refusal`] reads.
pub(super) fn extents(kind: &str) -> &'static [Extent] {
    match kind {
        "ext2" | "ext3" | "ext4" => &[(1024, 0x240)],
        "erofs" => &[(1024, 0x60)],
        "btrfs" => &[(0x1_0000, 0x90)],
        // The driver takes the second copy if the first is damaged.
        "f2fs" => &[(1024, 0xb00), (5120, 0xb00)],
        "jfs" => &[(0x8000, 0x48), (0xf000, 0x48)],
        "reiserfs" => &[(0x1_0000, 0x40), (0x2000, 0x40)],
        _ => &[],
    }
}

/// Why a volume must not be mounted as `kind`, by its superblock. `parts` are the bytes of
/// [`extents`]. Without a journal the driver opens no device for one.
pub(super) fn refusal(kind: &str, parts: &[Vec<u8>], skips_journal: bool) -> Option<String> {
    let judge: fn(&[u8], bool) -> Option<String> = match kind {
        "ext2" | "ext3" | "ext4" => ext,
        "erofs" => erofs,
        "f2fs" => f2fs,
        "jfs" => jfs,
        "reiserfs" => reiserfs,
        _ => return None,
    };
    parts.iter().find_map(|part| judge(part, skips_journal))
}

/// The identity and the number of devices of a btrfs, from its superblock.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Btrfs {
    /// The UUID of the file system, as sysfs and udev write it.
    pub uuid: String,
    /// How many devices it has.
    pub devices: u64,
}

/// `None` if the bytes are not of a superblock of btrfs (`struct btrfs_super_block`).
pub(super) fn btrfs(part: &[u8]) -> Option<Btrfs> {
    if bytes::<8>(part, 0x40)? != *b"_BHRfS_M" {
        return None;
    }
    let digits: String = bytes::<16>(part, 0x20)?.iter().map(|byte| format!("{byte:02x}")).collect();
    let group = |range: std::ops::Range<usize>| digits.get(range);
    let uuid = [group(0..8)?, group(8..12)?, group(12..16)?, group(16..20)?, group(20..32)?].join("-");
    Some(Btrfs { uuid, devices: u64_at(part, 0x88)? })
}

/// `ext4_load_journal` opens the device with the number `s_journal_dev`, and
/// `parse_apply_sb_mount_options` applies the options in `s_mount_opts`, including `journal_path=`.
fn ext(part: &[u8], skips_journal: bool) -> Option<String> {
    if u16_at(part, 0x38)? != 0xef53 {
        return None;
    }
    let journal_device = u32_at(part, 0xe4)?;
    if journal_device != 0 && !skips_journal {
        return Some(other_device("journal", device_number(journal_device)));
    }
    let options = bytes::<64>(part, 0x200)?;
    let options = options.split(|byte| *byte == 0).next().unwrap_or_default();
    let refused = options.split(|byte| *byte == b',').find(|option| !is_harmless(option))?;
    Some(format!(
        "its superblock sets the mount option \"{}\"; remove that (tune2fs -E mount_opts=), or mount it as root",
        refused.escape_ascii()
    ))
}

/// Options that `tune2fs -E mount_opts` commonly sets.
fn is_harmless(option: &[u8]) -> bool {
    const KNOWN: &[&[u8]] = &[
        b"",
        b"acl",
        b"noacl",
        b"user_xattr",
        b"nouser_xattr",
        b"discard",
        b"nodiscard",
        b"barrier",
        b"nobarrier",
        b"delalloc",
        b"nodelalloc",
        b"auto_da_alloc",
        b"noauto_da_alloc",
        b"block_validity",
        b"noblock_validity",
        b"data=journal",
        b"data=ordered",
        b"data=writeback",
        b"errors=continue",
        b"errors=remount-ro",
    ];
    KNOWN.contains(&option)
}

/// Before Linux 6.4 `erofs_init_device` opens the names in the device table.
fn erofs(part: &[u8], _: bool) -> Option<String> {
    const DEVICE_TABLE: u32 = 0x8;
    let is_erofs = u32_at(part, 0)? == 0xe0f5_e1e2;
    let has_table = u32_at(part, 0x50)? & DEVICE_TABLE != 0 && u16_at(part, 0x56)? != 0;
    (is_erofs && has_table).then(|| other_device("data", "by a name in its device table".to_owned()))
}

/// `f2fs_scan_devices` opens each path in `devs`.
fn f2fs(part: &[u8], _: bool) -> Option<String> {
    const PATHS: usize = 2201;
    const EACH: usize = 68;
    if u32_at(part, 0)? != 0xf2f5_2010 {
        return None;
    }
    let path = part.get(PATHS..)?.chunks(EACH).take(8).find(|device| device.first() != Some(&0))?;
    let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(other_device("data", path.get(..path.len().min(64))?.escape_ascii().to_string()))
}

/// `lmLogOpen` opens the device with the number `s_logdev` unless the log is inline.
fn jfs(part: &[u8], _: bool) -> Option<String> {
    const INLINE_LOG: u32 = 0x800;
    let is_outside = bytes(part, 0)? == *b"JFS1" && u32_at(part, 36)? & INLINE_LOG == 0;
    let device = u32_at(part, 64)?;
    is_outside.then(|| other_device("log", device_number(device)))
}

/// `journal_init_dev` opens the device with the number `jp_journal_dev`.
fn reiserfs(part: &[u8], _: bool) -> Option<String> {
    if bytes(part, 52)? != *b"ReIsE" {
        return None;
    }
    let device = u32_at(part, 16)?;
    (device != 0).then(|| other_device("journal", device_number(device)))
}

fn other_device(what: &str, which: String) -> String {
    format!(
        "its superblock says that its {what} is on another block device ({which}), which loopd does not open; mount it as root"
    )
}

/// `new_decode_dev` of the kernel.
fn device_number(encoded: u32) -> String {
    format!("{}:{}", (encoded & 0xf_ff00) >> 8, (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A superblock that a driver would accept, with these bytes changed.
    fn with(kind: &str, changes: &[(usize, &[u8])]) -> Vec<u8> {
        let length = extents(kind)[0].1;
        let mut part = vec![0; length];
        let (at, magic): (usize, &[u8]) = match kind {
            "ext4" | "ext3" | "ext2" => (0x38, &[0x53, 0xef]),
            "erofs" => (0, &[0xe2, 0xe1, 0xf5, 0xe0]),
            "f2fs" => (0, &[0x10, 0x20, 0xf5, 0xf2]),
            "jfs" => (0, b"JFS1"),
            "reiserfs" => (52, b"ReIsEr3Fs"),
            "btrfs" => (0x40, b"_BHRfS_M"),
            _ => (0, &[]),
        };
        for (at, bytes) in changes.iter().copied().chain([(at, magic)]) {
            part[at..at + bytes.len()].copy_from_slice(bytes);
        }
        part
    }

    #[test]
    fn a_superblock_that_names_another_device_is_refused() {
        for (kind, at, bytes, named) in [
            ("ext4", 0xe4, &[0x03_u8, 0x08, 0, 0][..], "journal is on another block device (8:3)"),
            ("ext3", 0xe4, &[0x02, 0xfe, 0x10, 0], "journal is on another block device (254:258)"),
            ("ext2", 0xe4, &[1, 0, 0, 0], "(0:1)"),
            ("ext4", 0x200, b"journal_path=/dev/sda3", "mount option \"journal_path=/dev/sda3\""),
            ("ext4", 0x200, b"acl,journal_dev=0x803", "\"journal_dev=0x803\""),
            ("ext4", 0x200, b"errors=panic", "\"errors=panic\""),
            ("ext4", 0x200, b"x\x1b[2J", "\"x\\x1b[2J\""),
            ("jfs", 64, &[0x03, 0x08, 0, 0], "log is on another block device (8:3)"),
            ("reiserfs", 16, &[0x03, 0x08, 0, 0], "journal is on another block device (8:3)"),
            ("f2fs", 2201, b"/dev/sda3", "data is on another block device (/dev/sda3)"),
            ("f2fs", 2201 + 68, b"/dev/sda3", "(/dev/sda3)"),
        ] {
            let reason = refusal(kind, &[with(kind, &[(at, bytes)])], false).expect(kind);
            assert!(reason.contains(named), "{kind}: {reason}");
        }
        let erofs = with("erofs", &[(0x50, &[8, 0, 0, 0]), (0x56, &[1, 0])]);
        assert!(refusal("erofs", &[erofs], false).unwrap().contains("device table"));
    }

    #[test]
    fn the_second_copy_is_checked_too() {
        let parts = [vec![0; 0xb00], with("f2fs", &[(2201, b"/dev/sda3")])];
        assert!(refusal("f2fs", &parts, false).is_some());
    }

    #[test]
    fn other_superblocks_are_accepted() {
        for kind in ["ext2", "ext3", "ext4", "erofs", "f2fs", "reiserfs", "xfs", "vfat"] {
            let part = extents(kind).first().map_or_else(Vec::new, |_| with(kind, &[]));
            assert_eq!(refusal(kind, &[part], false), None, "{kind}");
        }
        assert_eq!(refusal("jfs", &[with("jfs", &[(36, &[0, 8, 0, 0])])], false), None);
        assert_eq!(refusal("ext4", &[with("ext4", &[(0x200, b"nodelalloc,discard")])], false), None);
        let external = with("ext4", &[(0xe4, &[3, 8, 0, 0])]);
        assert_eq!(refusal("ext4", &[external], true), None, "no journal is loaded");
        // A blob that is part of the image has no device table.
        assert_eq!(refusal("erofs", &[with("erofs", &[(0x56, &[1, 0])])], false), None);
    }

    #[test]
    fn uuid_and_devices_of_a_btrfs_are_read() {
        let id: Vec<u8> = (0x10..0x20).collect();
        let part = with("btrfs", &[(0x20, &id), (0x88, &[2])]);
        let uuid = "10111213-1415-1617-1819-1a1b1c1d1e1f".to_owned();
        assert_eq!(btrfs(&part), Some(Btrfs { uuid, devices: 2 }));
        assert_eq!(btrfs(&part[..0x8f]), None);
        assert_eq!(btrfs(&[0; 0x90]), None);
    }

    #[test]
    fn any_bytes_are_handled() {
        bolero::check!().with_type::<(u8, Vec<u8>, bool)>().for_each(|(kind, part, skips_journal)| {
            let kinds = ["ext2", "ext4", "erofs", "f2fs", "jfs", "reiserfs", "btrfs"];
            let kind = kinds[usize::from(*kind) % kinds.len()];
            let reason = refusal(kind, std::slice::from_ref(part), *skips_journal);
            assert!(reason.is_none_or(|reason| reason.len() < 600 && reason.is_ascii()));
            let _ = btrfs(part);
        });
    }
}
