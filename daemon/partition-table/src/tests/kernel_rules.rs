//! The kernel's rules for sound and for unusual tables, one test for each.

use super::images::{DosEntry, Gpt, Memory, chain, dos, fat_boot_sector, put_record, put_u32, put_u64};
use crate::{Reading, Refusal, TableKind, Warning, read, sector_size};

fn reading(image: Vec<u8>, block_size: u32) -> Reading {
    read(&mut Memory::from(image), block_size).unwrap()
}

/// Number, first and last sector of 512 bytes.
fn extents(reading: &Reading) -> Vec<(u32, u64, u64)> {
    let partitions = reading.table.iter().flat_map(|table| &table.partitions);
    partitions.map(|found| (found.number, found.start / 512, found.end() / 512 - 1)).collect()
}

#[test]
fn a_sound_gpt_reads_with_all_names() {
    let reading = reading(Gpt::new(512, 4096, &[(1, 40, 99), (3, 100, 4000)]).image, 512);
    assert_eq!(reading.warnings, []);
    assert_eq!(extents(&reading), [(1, 40, 99), (3, 100, 4000)]);
    let table = reading.table.unwrap();
    assert_eq!((table.kind, table.from_backup), (TableKind::Gpt, false));
    assert_eq!(table.uuid, "d1d1d1d1-d1d1-d1d1-d1d1-d1d1d1d1d1d1");
    let third = &table.partitions[1];
    assert_eq!(third.kind, "0fc63daf-8483-4772-8e79-3d69d8477de4");
    assert_eq!(third.uuid, "03030303-0303-0303-0303-030303030303");
    assert_eq!((third.label.as_str(), third.refusal), ("number 3", None));
}

#[test]
fn a_sane_image_costs_few_reads() {
    let mut image = Memory::from(Gpt::new(512, 4096, &[(1, 40, 99)]).image);
    read(&mut image, 512).unwrap();
    assert_eq!((image.reads, image.bytes_read), (6, 4 * 512 + 2 * 128 * 128));
}

#[test]
fn labels_end_at_nul_and_half_characters_are_replaced() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99), (2, 100, 200)]);
    gpt.change(|_, entries| {
        entries[56..66].copy_from_slice(b"\xf6\x00\x00\xd8a\x00\x00\x00b\x00");
        entries[128 + 56..128 + 128].fill(b'x');
    });
    let table = reading(gpt.image, 512).table.unwrap();
    assert_eq!(table.partitions[0].label, "ö\u{fffd}a");
    assert_eq!(table.partitions[1].label, "\u{7878}".repeat(36));
}

#[test]
fn every_sector_size_is_recognized_and_read() {
    for size in [512, 1024, 2048, 4096] {
        let mut gpt = Gpt::new(size, 300, &[(1, 50, 99)]);
        let bytes = u32::try_from(size).unwrap();
        let check = |gpt: &Gpt| {
            let mut image = Memory::from(gpt.image.clone());
            assert_eq!(sector_size(&mut image).unwrap(), Some(bytes));
            let partition = read(&mut image, bytes).unwrap().table.unwrap().partitions.remove(0);
            assert_eq!((partition.start, partition.size), (50 * size as u64, 50 * size as u64));
        };
        check(&gpt);
        gpt.block(1).fill(0);
        check(&gpt);
    }
}

#[test]
fn a_gpt_for_other_sectors_is_reported_and_not_read() {
    let gpt = Gpt::new(4096, 300, &[(1, 50, 99)]);
    let found = reading(gpt.image, 512);
    assert_eq!(found.table, None);
    assert_eq!(
        found.warnings.last(),
        Some(&Warning::OtherSectorSize { table: TableKind::Gpt, written: 4096, read: 512 })
    );
    let found = reading(Gpt::new(512, 4096, &[(1, 50, 99)]).image, 4096);
    assert_eq!(
        found.warnings.last(),
        Some(&Warning::OtherSectorSize { table: TableKind::Gpt, written: 512, read: 4096 })
    );
}

#[test]
fn a_stale_backup_does_not_determine_the_sector_size() {
    let old = Gpt::new(512, 4096, &[(1, 40, 99)]).image;
    let mut new = Gpt::new(4096, 512, &[(1, 40, 99)]).image;
    let end = new.len() - 40 * 512;
    new[end..].copy_from_slice(&old[end..]);
    assert_eq!(sector_size(&mut Memory::from(new)).unwrap(), Some(4096));
}

#[test]
fn images_without_gpt_have_no_sector_size() {
    for image in [vec![], vec![0; 511], vec![0; 1 << 20], dos(100, &[(0, 0x83, 1, 50)])] {
        assert_eq!(sector_size(&mut Memory::from(image)).unwrap(), None);
    }
    let mut unprotected = Gpt::new(4096, 300, &[(1, 50, 99)]).image;
    unprotected[446..510].fill(0);
    assert_eq!(sector_size(&mut Memory::from(unprotected)).unwrap(), None);
}

#[test]
fn a_gpt_needs_its_entry_in_the_mbr() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    put_record(&mut gpt.image, &[(0, 0x83, 7, 50)]);
    let found = reading(gpt.image.clone(), 512);
    assert_eq!(found.warnings, [Warning::UnprotectedGpt]);
    assert_eq!(found.table.as_ref().unwrap().kind, TableKind::Dos);
    assert_eq!(extents(&found), [(1, 7, 56)]);

    gpt.image[..512].fill(0);
    let found = reading(gpt.image, 512);
    assert_eq!(found, Reading { warnings: vec![Warning::UnprotectedGpt], ..Reading::default() });
}

#[test]
fn the_mbr_entry_of_a_gpt_must_start_at_sector_1() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    put_record(&mut gpt.image, &[(0, 0xee, 0, 4095), (0, 0x83, 7, 50)]);
    let found = reading(gpt.image, 512);
    assert_eq!(found, Reading { warnings: vec![Warning::MisplacedProtection], ..Reading::default() });
}

#[test]
fn in_a_hybrid_mbr_the_gpt_takes_precedence() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    put_record(&mut gpt.image, &[(0x80, 0x83, 7, 50), (0x11, 0xee, 1, 4095)]);
    let found = reading(gpt.image.clone(), 512);
    assert_eq!((extents(&found), found.warnings), (vec![(1, 40, 99)], vec![Warning::HybridMbr]));
    // The same partition in both, and xorriso's entry without a type.
    put_record(&mut gpt.image, &[(0x80, 0x83, 40, 60), (0, 0xee, 1, 4095), (0x80, 0, 0, 1)]);
    assert_eq!(reading(gpt.image, 512).warnings, []);
}

#[test]
fn headers_may_be_longer_than_their_fields() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    gpt.change(|header, _| put_u32(header, 12, 512));
    assert_eq!(reading(gpt.image, 512).warnings, []);
}

#[test]
fn gpt_partitions_above_255_have_no_node() {
    let mut gpt = Gpt::with_entries(512, 4096, 300, &[(255, 100, 199), (256, 200, 299)]);
    let found = reading(gpt.image.clone(), 512);
    assert_eq!(extents(&found), [(255, 100, 199)]);
    assert_eq!(found.warnings, [Warning::TooManyPartitions]);
    gpt.change(|_, entries| entries[255 * 128..].fill(0));
    assert_eq!(reading(gpt.image, 512).warnings, []);
}

#[test]
fn gpt_partitions_may_lie_where_the_gpt_is() {
    let found = reading(Gpt::new(512, 4096, &[(1, 0, 4095)]).image, 512);
    assert_eq!(extents(&found), [(1, 0, 4095)]);
    assert_eq!(found.warnings, [Warning::OutsideUsable { number: 1 }]);
}

#[test]
fn primaries_keep_their_numbers_and_names() {
    let found = reading(dos(1000, &[(0, 0, 0, 0), (0x80, 0x0c, 10, 20), (0, 0, 30, 5)]), 512);
    assert_eq!(found.warnings, []);
    assert_eq!(extents(&found), [(2, 10, 29), (3, 30, 34)]);
    let table = found.table.unwrap();
    assert_eq!((table.kind, table.uuid.as_str()), (TableKind::Dos, "1a2b3c4d"));
    let second = &table.partitions[0];
    assert_eq!((second.kind.as_str(), second.uuid.as_str()), ("0xc", "1a2b3c4d-02"));
    assert_eq!(second.label, "");
}

#[test]
fn without_a_signature_there_are_no_uuids() {
    let mut image = dos(1000, &[(0, 0x83, 10, 20)]);
    put_u32(&mut image, 440, 0);
    let table = reading(image, 512).table.unwrap();
    assert_eq!((table.uuid.as_str(), table.partitions[0].uuid.as_str()), ("", ""));
}

#[test]
fn logical_partitions_count_from_5() {
    for extended in [0x05, 0x0f, 0x85] {
        let mut image = chain(
            1000,
            &[
                (100, &[(0, 0x83, 10, 50), (0, extended, 100, 100)]),
                (200, &[(0, 0x82, 10, 60), (0, extended, 200, 100)]),
                (300, &[(0, 0x83, 10, 70)]),
            ],
        );
        image[446 + 4] = extended;
        let found = reading(image, 512);
        assert_eq!(found.warnings, []);
        assert_eq!(extents(&found), [(1, 100, 101), (5, 110, 159), (6, 210, 269), (7, 310, 379)]);
        let table = found.table.unwrap();
        assert_eq!(table.partitions[0].kind, format!("{extended:#x}"));
        assert_eq!(
            (table.partitions[2].uuid.as_str(), table.partitions[2].kind.as_str()),
            ("1a2b3c4d-06", "0x82")
        );
    }
}

#[test]
fn an_extended_partition_is_two_sectors_or_one_block_long() {
    for (block_size, sectors, size) in [(512, 1, 512), (512, 9, 1024), (1024, 9, 1024), (4096, 9, 4096)] {
        let mut image = vec![0; 16 * 4096];
        put_record(&mut image, &[(0, 5, 4, sectors)]);
        let partition = reading(image, block_size).table.unwrap().partitions.remove(0);
        assert_eq!((partition.start, partition.size), (4 * u64::from(block_size), size));
    }
}

#[test]
fn dos_sectors_are_as_large_as_blocks() {
    let mut image = vec![0; 1000 * 4096];
    put_record(&mut image, &[(0, 0x83, 3, 4), (0, 5, 100, 800)]);
    put_record(&mut image[100 * 4096..], &[(0, 0x83, 10, 50), (0, 5, 200, 100)]);
    put_record(&mut image[300 * 4096..], &[(0, 0x83, 10, 50)]);
    let found = reading(image, 4096);
    assert_eq!(extents(&found), [(1, 24, 55), (2, 800, 807), (5, 880, 1279), (6, 2480, 2879)]);
}

#[test]
fn an_extended_partition_does_not_contain_the_primaries_again() {
    let found = reading(dos(1000, &[(0, 0x83, 10, 20), (0, 5, 0, 1000)]), 512);
    assert_eq!(extents(&found), [(1, 10, 29), (2, 0, 1)]);
    assert_eq!(found.warnings, [Warning::ChainLoop]);
}

#[test]
fn the_third_entry_of_a_link_counts_where_it_fits() {
    let entries: &[DosEntry] = &[(0, 0x83, 1, 9), (0, 0, 0, 0), (0, 0x83, 20, 9), (0, 0x83, 20, 5000)];
    assert_eq!(
        extents(&reading(chain(1000, &[(100, entries)]), 512)),
        [(1, 100, 101), (5, 101, 109), (6, 120, 128)]
    );
}

#[test]
fn an_empty_extended_partition_is_no_fault() {
    let found = reading(chain(1000, &[]), 512);
    assert_eq!((extents(&found), found.warnings), (vec![(1, 100, 101)], vec![]));
}

#[test]
fn partitions_past_the_end_are_cut_off_or_left_out_and_keep_their_numbers() {
    let found = reading(
        chain(
            1000,
            &[
                (100, &[(0, 0x83, 10, 50), (0, 5, 100, 100)]),
                (200, &[(0, 0x83, 5000, 60), (0, 5, 200, 100)]),
                (300, &[(0, 0x83, 10, 7000)]),
            ],
        ),
        512,
    );
    assert_eq!(extents(&found), [(1, 100, 101), (5, 110, 159), (7, 310, 999)]);
    assert_eq!(found.warnings, [Warning::PastEnd { number: 6 }, Warning::Truncated { number: 7 }]);
}

#[test]
fn a_record_with_invalid_flags_is_no_table() {
    for flag in [1, 0x7f, 0x81, 0xff] {
        assert_eq!(reading(dos(1000, &[(0, 0x83, 10, 20), (flag, 0x83, 40, 20)]), 512).table, None);
    }
    let mut unsigned = dos(1000, &[(0, 0x83, 10, 20)]);
    unsigned[511] = 0;
    assert_eq!(reading(unsigned, 512).table, None);
}

/// Images of 4096 sectors that start with the boot sector of a volume.
fn volumes() -> [Vec<u8>; 4] {
    let named = |name: &[u8]| {
        let mut image = dos(4096, &[]);
        image[3..11].copy_from_slice(name);
        image
    };
    let mut fat = vec![0; 4096 * 512];
    fat[..512].copy_from_slice(&fat_boot_sector(4096));
    [fat, named(b"NTFS    "), named(b"EXFAT   "), named(b"-FVE-FS-")]
}

#[test]
fn boot_sectors_of_volumes_are_no_tables() {
    let volume = Reading { is_volume: true, ..Reading::default() };
    let unlikely: &[&[DosEntry]] = &[
        // As mkfs.fat --mbr writes it.
        &[(0x80, 4, 0, 4096)],
        &[(0x80, 4, 0, 40), (0, 0x83, 100, 50)],
        &[(0, 0, 63, 100)],
        &[(0, 0x83, 63, 5000)],
        &[(0, 0x83, 5000, 20)],
        &[(0, 0x83, 63, 100), (0, 0x83, 162, 10)],
        &[(1, 0x83, 63, 100)],
    ];
    for mut image in volumes() {
        assert_eq!(reading(image.clone(), 512), volume);
        for code in [0x80, 0x74, 0xff] {
            image[446..510].fill(code);
            assert_eq!(reading(image.clone(), 512), volume);
        }
        for entries in unlikely {
            image[446..510].fill(0);
            put_record(&mut image, entries);
            assert_eq!(reading(image.clone(), 512), volume, "{entries:?}");
        }
        image[510] = 0;
        assert_eq!(reading(image, 512), Reading::default());
    }
}

#[test]
fn a_plausible_table_in_the_boot_sector_of_a_volume_is_read() {
    for mut image in volumes() {
        put_record(&mut image, &[(0, 0x83, 63, 100), (0, 0x83, 163, 10), (0, 5, 1000, 3096)]);
        let found = reading(image, 512);
        assert_eq!(extents(&found), [(1, 63, 162), (2, 163, 172), (3, 1000, 1001)]);
        assert!(!found.is_volume);
    }
}

#[test]
fn a_gpt_takes_precedence_over_the_boot_sector_of_a_volume() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    gpt.image[..440].copy_from_slice(&fat_boot_sector(4096)[..440]);
    let found = reading(gpt.image, 512);
    assert_eq!((extents(&found), found.is_volume), (vec![(1, 40, 99)], false));
}

#[test]
fn a_disk_of_aix_has_no_dos_table() {
    let mut image = dos(1000, &[(0, 0x41, 10, 20)]);
    image[..4].copy_from_slice(b"\xc9\xc2\xd4\xc1");
    assert!(reading(image.clone(), 512).table.is_some());
    image[7 * 512..7 * 512 + 4].copy_from_slice(b"_LVM");
    assert_eq!(reading(image.clone(), 512), Reading::default());
    // Linux was installed later.
    image[446 + 4] = 0x83;
    assert!(reading(image, 512).table.is_some());
}

#[test]
fn an_mbr_may_be_empty() {
    let found = reading(dos(1000, &[]), 512);
    assert_eq!((found.table.unwrap().partitions, found.warnings), (vec![], vec![]));
}

#[test]
fn overlaps_are_reported_and_blkpg_refuses_them_in_order() {
    let found = reading(dos(1000, &[(0x80, 0, 0, 1000), (0, 0xef, 40, 20), (0, 0x83, 50, 20)]), 512);
    assert_eq!(extents(&found), [(1, 0, 999), (2, 40, 59), (3, 50, 69)]);
    assert_eq!(
        found.warnings,
        [Warning::Overlap { number: 2, other: 1 }, Warning::Overlap { number: 3, other: 1 }]
    );
    let refusals: Vec<_> = found.table.unwrap().partitions.iter().map(|found| found.refusal).collect();
    assert_eq!(refusals, [None, Some(Refusal::Overlaps(1)), Some(Refusal::Overlaps(1))]);

    // A refused partition does not exist, so it causes no refusal.
    let found = reading(dos(1000, &[(0, 0x83, 10, 20), (0, 0x83, 20, 20), (0, 0x83, 35, 20)]), 512);
    let refusals: Vec<_> = found.table.unwrap().partitions.iter().map(|found| found.refusal).collect();
    assert_eq!(refusals, [None, Some(Refusal::Overlaps(1)), None]);
}

#[test]
fn a_partition_cut_off_within_a_block_is_refused_by_blkpg() {
    let mut image = vec![0; 10 * 4096 + 1024];
    put_record(&mut image, &[(0, 0x83, 1, 100)]);
    let found = reading(image, 4096);
    assert_eq!(found.warnings, [Warning::Truncated { number: 1 }, Warning::Unaligned { number: 1 }]);
    let partition = found.table.unwrap().partitions.remove(0);
    assert_eq!((partition.size, partition.refusal), (9 * 4096 + 1024, Some(Refusal::Unaligned)));
}

#[test]
fn partitions_with_nested_tables_are_reported() {
    let found = reading(dos(1000, &[(0, 0xa5, 10, 20), (0, 0x82, 40, 20)]), 512);
    assert_eq!(found.warnings, [Warning::NestedTable { number: 1, system: "FreeBSD" }]);
    assert_eq!(extents(&found).len(), 2);
}

#[test]
fn an_enlarged_image_keeps_its_primary() {
    let mut gpt = Gpt::new(512, 4096, &[(1, 40, 99)]);
    gpt.image.resize(8192 * 512, 0);
    let found = reading(gpt.image.clone(), 512);
    assert_eq!((extents(&found), found.warnings), (vec![(1, 40, 99)], vec![Warning::BackupMisplaced]));

    // The backup is found at the place that the damaged primary names.
    gpt.block(1)[100] = 1;
    put_u64(gpt.block(1), 40, 77);
    let found = reading(gpt.image, 512);
    assert_eq!(extents(&found), [(1, 40, 99)]);
    assert!(found.table.unwrap().from_backup);
}

#[test]
fn block_sizes_are_checked() {
    for size in [0, 1, 256, 513, 4097, 131_072, u32::MAX] {
        assert!(read(&mut Memory::from(vec![0; 4096]), size).is_err());
    }
    assert_eq!(reading(vec![0; 600], 65536), Reading::default());
}
