//! File systems by their signatures, for a volume of which udev knows none: it was made after udev looked, or udev
//! found more than one, or udev does not run.

use loopd_common::little_endian::{u16_at, u32_at};

use crate::kernel::FileSystem;

/// How much of the start of a volume [`found`] looks at, in bytes.
pub(super) const LENGTH: usize = 0x1_1000;

/// A name, an offset, and the bytes there.
type Signature = (&'static str, usize, &'static [u8]);

const SIGNATURES: &[Signature] = &[
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("exfat", 3, b"EXFAT   "),
    ("ntfs", 3, b"NTFS    "),
    ("iso9660", 0x8001, b"CD001"),
    ("jfs", 0x8000, b"JFS1"),
    ("reiserfs", 0x1_0034, b"ReIsEr"),
];

/// The signatures of FAT: the end of the boot sector, and the names of its types.
const FAT_SIGNATURES: [(usize, &[u8]); 5] =
    [(0x1fe, b"\x55\xaa"), (0x36, b"FAT"), (0x36, b"MSDOS"), (0x52, b"FAT32   "), (0x52, b"MSWIN")];

/// Where the fields of an ext superblock that [`ext`] reads end, in bytes.
const EXT_END: usize = 1024 + 0x68;

/// Encrypted volumes and members of others.
const OTHERS: &[(&str, Signature)] = &[
    ("crypto", ("crypto_LUKS", 0, b"LUKS\xba\xbe")),
    ("crypto", ("BitLocker", 3, b"-FVE-FS-")),
    ("raid", ("LVM2_member", 512, b"LABELONE")),
    ("other", ("swap", 4086, b"SWAPSPACE2")),
];

/// Whether the start of a volume proves that it has no file system of this kind any more. Never true if the start is
/// too short, or for a kind of which libblkid finds some file systems without a signature at a fixed offset.
pub(super) fn is_gone(kind: &str, start: &[u8]) -> bool {
    let lacks = |(offset, bytes): (usize, &[u8])| {
        start.get(offset..offset + bytes.len()).is_some_and(|found| found != bytes)
    };
    match kind {
        "ext2" | "ext3" | "ext4" => start.len() >= EXT_END && ext(start) != Some(kind),
        // libblkid needs one of these only.
        "vfat" => FAT_SIGNATURES.into_iter().all(lacks),
        "iso9660" => [(0x8001, &b"CD001"[..]), (0x8009, b"CDROM")].into_iter().all(lacks),
        // Older ones have their superblock at 8 KiB, and other versions of the signature.
        "reiserfs" => false,
        _ => {
            let signature = SIGNATURES.iter().find(|(name, ..)| *name == kind);
            signature.is_some_and(|(_, offset, bytes)| lacks((*offset, bytes)))
        }
    }
}

/// All that the start of a volume shows, by the names of libblkid.
pub(super) fn found(start: &[u8]) -> Vec<FileSystem> {
    let has =
        |(_, offset, bytes): &Signature| start.get(*offset..).is_some_and(|rest| rest.starts_with(bytes));
    let of = |usage: &str, kind: &str| FileSystem {
        usage: usage.to_owned(),
        kind: kind.to_owned(),
        ..FileSystem::default()
    };
    let known = SIGNATURES.iter().filter(|signature| has(signature)).map(|(name, ..)| *name);
    let all = known.chain(ext(start)).chain(fat(start)).chain(udf(start));
    let others = OTHERS.iter().filter(|(_, signature)| has(signature));
    all.map(|kind| of("filesystem", kind)).chain(others.map(|(usage, (kind, ..))| of(usage, kind))).collect()
}

/// ext2 has no journal, and ext3 none of the features of ext4 (`ext4_probe` in libblkid's superblocks/ext.c).
fn ext(start: &[u8]) -> Option<&'static str> {
    const HAS_JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    /// Filetype, recovery, `meta_bg`; and sparse superblocks, large files, btree directories.
    const OF_EXT3: (u32, u32) = (0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4);
    let superblock = start.get(1024..)?;
    if u16_at(superblock, 0x38)? != 0xef53 {
        return None;
    }
    let (compatible, incompatible, read_only) =
        (u32_at(superblock, 0x5c)?, u32_at(superblock, 0x60)?, u32_at(superblock, 0x64)?);
    if incompatible & JOURNAL_DEVICE != 0 {
        return None;
    }
    let is_newer = incompatible & !OF_EXT3.0 != 0 || read_only & !OF_EXT3.1 != 0;
    Some(match (is_newer, compatible & HAS_JOURNAL != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    })
}

/// The name of the type in a boot sector: FAT12, FAT16, FAT32.
fn fat(start: &[u8]) -> Option<&'static str> {
    let boot = start.get(..512)?;
    let is_boot_sector = boot.ends_with(b"\x55\xaa") && matches!(boot[0], 0xeb | 0xe9);
    let names = [&boot[0x36..0x3e], &boot[0x52..0x5a]];
    let is_fat = names.iter().any(|name| {
        name.starts_with(b"FAT12 ") || name.starts_with(b"FAT16 ") || name.starts_with(b"FAT32 ")
    });
    (is_boot_sector && is_fat).then_some("vfat")
}

/// A volume recognition sequence of 2048-byte sectors (ECMA-167) that has a descriptor of UDF.
fn udf(start: &[u8]) -> Option<&'static str> {
    let descriptors = (0x8000..).step_by(2048).map_while(|offset| start.get(offset + 1..offset + 6)).take(8);
    let mut descriptors =
        descriptors.take_while(|name| matches!(*name, b"BEA01" | b"CD001" | b"NSR02" | b"NSR03" | b"TEA01"));
    descriptors.any(|name| matches!(name, b"NSR02" | b"NSR03")).then_some("udf")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(contents: &[(usize, &[u8])]) -> Vec<u8> {
        let mut image = vec![0; LENGTH];
        for (offset, bytes) in contents {
            image[*offset..*offset + bytes.len()].copy_from_slice(bytes);
        }
        image
    }

    fn kinds(contents: &[(usize, &[u8])]) -> Vec<String> {
        found(&image(contents)).into_iter().map(|found| found.kind).collect()
    }

    const EXT: (usize, &[u8]) = (1024 + 0x38, b"\x53\xef");
    const FAT: [(usize, &[u8]); 3] = [(0, b"\xeb\x3c\x90"), (0x36, b"FAT16   "), (510, b"\x55\xaa")];

    #[test]
    fn file_systems_are_found_by_their_signatures() {
        for (kind, offset, bytes) in SIGNATURES {
            assert_eq!(kinds(&[(*offset, bytes)]), [*kind]);
        }
        for (_, (kind, offset, bytes)) in OTHERS {
            assert_eq!(kinds(&[(*offset, bytes)]), [*kind]);
        }
        assert_eq!(kinds(&FAT), ["vfat"]);
        assert_eq!(kinds(&[(0x8001, b"BEA01"), (0x8801, b"NSR03"), (0x9001, b"TEA01")]), ["udf"]);
    }

    #[test]
    fn versions_of_ext_differ_in_their_features() {
        assert_eq!(kinds(&[EXT]), ["ext2"]);
        assert_eq!(kinds(&[EXT, (1024 + 0x5c, b"\x04")]), ["ext3"]);
        assert_eq!(kinds(&[EXT, (1024 + 0x5c, b"\x04"), (1024 + 0x60, b"\xc2\x02")]), ["ext4"]);
        assert_eq!(kinds(&[EXT, (1024 + 0x60, b"\x08")]), [""; 0], "a journal of another file system");
    }

    #[test]
    fn bytes_without_a_signature_have_no_file_system() {
        assert_eq!(kinds(&[]), [""; 0]);
        assert_eq!(kinds(&[(510, b"\x55\xaa")]), [""; 0], "a partition table");
        assert_eq!(kinds(&[(0x8801, b"NSR03")]), [""; 0], "what an earlier one has left");
        for length in [0, 1, 511, 512, 1025, 1100, 0x8002, 0x8800] {
            assert_eq!(found(&image(&[])[..length]), []);
        }
    }

    #[test]
    fn several_signatures_are_all_found() {
        assert_eq!(kinds(&[(0, b"XFSB"), EXT]), ["xfs", "ext2"]);
    }

    #[test]
    fn a_file_system_is_gone_without_its_signature() {
        for (kind, offset, bytes) in SIGNATURES.iter().filter(|(kind, ..)| *kind != "reiserfs") {
            assert!(!is_gone(kind, &image(&[(*offset, bytes)])), "{kind}");
            assert!(is_gone(kind, &image(&[EXT])), "{kind}");
        }
        let journal: (usize, &[u8]) = (1024 + 0x5c, b"\x04");
        assert!(!is_gone("ext2", &image(&[EXT])));
        assert!(is_gone("ext2", &image(&[EXT, journal])), "it is an ext3 now");
        assert!(is_gone("ext4", &image(&[(0, b"XFSB")])));
        assert!(!is_gone("iso9660", &image(&[(0x8009, b"CDROM")])), "a High Sierra");
    }

    #[test]
    fn a_fat_is_gone_without_all_of_its_signatures() {
        for signature in FAT_SIGNATURES {
            assert!(!is_gone("vfat", &image(&[signature, EXT])), "{signature:?}");
        }
        assert!(is_gone("vfat", &image(&[EXT])));
        assert!(is_gone("vfat", &image(&[(0, b"\xeb\x3c\x90"), EXT])), "a jump proves nothing");
    }

    #[test]
    fn nothing_is_gone_without_proof() {
        for kind in ["", "udf", "reiserfs", "hfsplus", "fs7"] {
            assert!(!is_gone(kind, &image(&[EXT])), "{kind}");
        }
        for kind in SIGNATURES.iter().map(|(kind, ..)| *kind).chain(["ext2", "ext3", "ext4", "vfat"]) {
            assert!(!is_gone(kind, &[0; 4][..1]), "{kind}: too short");
        }
        assert!(!is_gone("ext4", &[0; EXT_END - 1]) && is_gone("ext4", &[0; EXT_END]));
        assert!(!is_gone("vfat", &[0; 511]) && is_gone("vfat", &[0; 512]));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| {
            for kind in ["ext4", "vfat", "iso9660", "btrfs"] {
                let _any = is_gone(kind, bytes);
            }
            let _any = found(bytes);
            let _any = found(&[&[0; 1024], &bytes[..]].concat());
            let _any = found(&[&[0; 0x8000], &bytes[..]].concat());
        });
    }
}
