//! Boot sectors of file systems, which have the same signature as a partition table.

use crate::disk::{bytes, u32_at};

/// The most clusters of FAT12 and FAT16, and of FAT32 (libblkid's `superblocks/vfat.c`).
const MOST_CLUSTERS: (u32, u32) = (0xfff4, 0x0fff_fff6);
/// Bytes of an entry of the root directory.
const DIRECTORY_ENTRY: u32 = 32;

/// Whether this is the first sector of a volume: FAT, exFAT, NTFS or `BitLocker`.
pub fn is_of_volume(sector: &[u8; 512]) -> bool {
    matches!(&sector[3..11], b"EXFAT   " | b"NTFS    " | b"-FVE-FS-") || is_fat(sector)
}

/// libblkid's `fat_valid_superblock`. The kernel's `msdos_partition` checks less: reserved sectors, tables and medium.
fn is_fat(sector: &[u8; 512]) -> bool {
    let sector_size = u32::from(u16_at(sector, 11));
    let (cluster, tables, medium) = (u32::from(sector[13]), u32::from(sector[16]), sector[21]);
    let reserved = u32::from(u16_at(sector, 14));
    (medium == 0xf0 || medium >= 0xf8)
        && cluster.is_power_of_two()
        && sector_size.is_power_of_two()
        && (512..=4096).contains(&sector_size)
        && reserved != 0
        && tables != 0
        && fat_clusters(sector, sector_size, reserved, tables, cluster).is_some()
}

/// The number of clusters; `None` if FAT cannot have so many.
fn fat_clusters(
    sector: &[u8; 512],
    sector_size: u32,
    reserved: u32,
    tables: u32,
    cluster: u32,
) -> Option<u32> {
    let either = |short: usize, long: usize| match u16_at(sector, short) {
        0 => u32_at(sector, long),
        short => u32::from(short),
    };
    let (sectors, table) = (either(19, 32), either(22, 36));
    let root = (u32::from(u16_at(sector, 17)) * DIRECTORY_ENTRY).div_ceil(sector_size);
    let before = table.checked_mul(tables)?.checked_add(reserved)?.checked_add(root)?;
    let clusters = sectors.checked_sub(before)? / cluster;
    let is_fat32 = u16_at(sector, 22) == 0 && table != 0;
    let most = if is_fat32 { MOST_CLUSTERS.1 } else { MOST_CLUSTERS.0 };
    (clusters <= most).then_some(clusters)
}

fn u16_at(sector: &[u8; 512], offset: usize) -> u16 {
    u16::from_le_bytes(bytes(sector, offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::images::fat_boot_sector;

    #[test]
    fn boot_sectors_of_volumes_are_recognized() {
        assert!(is_of_volume(&fat_boot_sector(4096)));
        for name in [b"EXFAT   ", b"NTFS    ", b"-FVE-FS-"] {
            let mut sector = [0; 512];
            sector[3..11].copy_from_slice(name);
            assert!(is_of_volume(&sector));
        }
        assert!(!is_of_volume(&[0; 512]));
        assert!(!is_of_volume(&[0xff; 512]));
    }

    #[test]
    fn a_boot_sector_with_one_invalid_field_is_not_fat() {
        let changes: [(usize, &[u8]); 9] = [
            (11, &[0, 1]),
            (11, &[1, 2]),
            (11, &[0, 0x20]),
            (13, &[3]),
            (14, &[0, 0]),
            (16, &[0]),
            (21, &[0xf7]),
            (19, &[1, 0]),
            // More clusters than FAT16 has.
            (19, &[0, 0, 0xf8, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff]),
        ];
        for (offset, change) in changes {
            let mut sector = fat_boot_sector(4096);
            sector[offset..offset + change.len()].copy_from_slice(change);
            assert!(!is_of_volume(&sector), "{offset} {change:?}");
        }
    }

    #[test]
    fn fat32_can_have_more_clusters() {
        let mut sector = fat_boot_sector(0);
        sector[32..36].copy_from_slice(&10_000_000_u32.to_le_bytes());
        assert!(!is_of_volume(&sector));
        sector[22..24].fill(0);
        sector[36..40].copy_from_slice(&10_000_u32.to_le_bytes());
        assert!(is_of_volume(&sector));
    }
}
