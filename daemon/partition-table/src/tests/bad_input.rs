//! Damaged, truncated and malicious tables.

use super::images::{DosEntry, Gpt, Memory, chain, dos, put_record, put_u32, put_u64};
use crate::{Fault, Image, Partition, Reading, TableKind, Warning, read};

fn reading(image: Vec<u8>) -> Reading {
    read(&mut Memory::from(image), 512).unwrap()
}

fn partitions(reading: &Reading) -> &[Partition] {
    reading.table.as_ref().map_or(&[], |table| &table.partitions)
}

fn sound() -> Gpt {
    Gpt::new(512, 4096, &[(1, 40, 99), (2, 100, 4000)])
}

/// The fault of a primary header with this change and new checksums. The backup must be read instead.
fn fault_of_primary(offset: usize, value: u64, size: usize) -> Fault {
    let mut gpt = sound();
    gpt.block(1)[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    gpt.seal(1);
    let found = reading(gpt.image);
    assert_eq!(partitions(&found), partitions(&reading(sound().image)), "{offset} {value}");
    assert!(found.table.unwrap().from_backup);
    match found.warnings[..] {
        [Warning::PrimaryDamaged(fault), Warning::BackupUsed] => fault,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_damaged_primary_is_replaced_by_the_backup() {
    for (byte, fault) in [
        (512, Fault::NoSignature),
        (512 + 16, Fault::HeaderChecksum),
        (512 + 60, Fault::HeaderChecksum),
        (512 + 90, Fault::HeaderChecksum),
        (1024, Fault::EntriesChecksum),
        (1024 + 128 * 128 - 1, Fault::EntriesChecksum),
    ] {
        let mut gpt = sound();
        gpt.image[byte] ^= 1;
        let found = reading(gpt.image);
        assert_eq!(found.warnings, [Warning::PrimaryDamaged(fault), Warning::BackupUsed]);
        assert_eq!(partitions(&found), partitions(&reading(sound().image)));
    }
}

#[test]
fn headers_with_correct_checksums_are_validated_too() {
    assert_eq!(fault_of_primary(24, 2, 8), Fault::Elsewhere);
    assert_eq!(fault_of_primary(48, 4096, 8), Fault::UsableRange);
    assert_eq!(fault_of_primary(48, u64::MAX, 8), Fault::UsableRange);
    assert_eq!(fault_of_primary(40, 4095, 8), Fault::UsableRange);
    assert_eq!(fault_of_primary(40, u64::MAX, 8), Fault::UsableRange);
    for lba in [4096, 4090, 1 << 55, u64::MAX] {
        assert_eq!(fault_of_primary(72, lba, 8), Fault::EntriesPastEnd);
    }
    for size in [0, 91, 513, u32::MAX] {
        assert_eq!(fault_of_primary(12, u64::from(size), 4), Fault::HeaderSize(size));
    }
    for size in [0, 1, 127, 129, 256, 4096, u32::MAX] {
        assert_eq!(fault_of_primary(84, u64::from(size), 4), Fault::EntrySize(size));
    }
    for count in [0, 8193, u32::MAX] {
        assert_eq!(fault_of_primary(80, u64::from(count), 4), Fault::EntryCount(count));
    }
    assert_eq!(fault_of_primary(80, 8192 * 4, 2), Fault::EntryCount(8192 * 4));
}

#[test]
fn a_header_whose_entries_reach_past_the_image_is_not_read() {
    let mut gpt = sound();
    gpt.change(|header, _| put_u64(header, 72, 4095 - 30));
    let found = reading(gpt.image);
    let fault = Fault::EntriesPastEnd;
    assert_eq!(found.warnings, [Warning::PrimaryDamaged(fault), Warning::BackupDamaged(fault)]);
}

#[test]
fn without_a_sound_copy_there_is_no_table() {
    let mut gpt = sound();
    gpt.image[1024] ^= 1;
    let last = gpt.last();
    gpt.block(last)[16] ^= 1;
    let found = reading(gpt.image);
    assert_eq!(found.table, None);
    assert_eq!(
        found.warnings,
        [Warning::PrimaryDamaged(Fault::EntriesChecksum), Warning::BackupDamaged(Fault::HeaderChecksum)]
    );
}

#[test]
fn a_damaged_or_different_backup_is_reported() {
    let mut gpt = sound();
    let last = gpt.last();
    gpt.block(last).fill(0);
    let found = reading(gpt.image);
    assert_eq!(found.warnings, [Warning::BackupDamaged(Fault::NoSignature)]);
    assert_eq!(partitions(&found).len(), 2);

    let mut gpt = sound();
    gpt.block(last)[56] ^= 1;
    gpt.seal(last);
    assert_eq!(reading(gpt.image).warnings, [Warning::BackupDiffers]);
}

#[test]
fn truncated_images_are_not_read_past_their_end() {
    let image = sound().image;
    for size in (0..40 * 512).step_by(100).chain([4062 * 512, 4063 * 512 - 1]) {
        let found = reading(image[..size].to_vec());
        assert_eq!(found.table, None);
        assert_eq!(found.warnings.is_empty(), size < 512, "{size}");
    }
    // These still contain all partitions.
    for size in [4063 * 512, 4096 * 512 - 1] {
        let found = reading(image[..size].to_vec());
        assert_eq!(partitions(&found), partitions(&reading(image.clone())));
        assert_eq!(found.warnings, [Warning::BackupDamaged(Fault::PastEnd)]);
    }
}

#[test]
fn invalid_gpt_entries_are_left_out() {
    let mut gpt = Gpt::new(
        512,
        4096,
        &[
            (1, 40, 99),
            (2, 50, 49),
            (3, 60, 40),
            (4, 200, 4096),
            (5, u64::MAX, u64::MAX),
            (6, 1, u64::MAX),
            (7, u64::MAX, 0),
        ],
    );
    gpt.seal(1);
    let found = reading(gpt.image);
    assert_eq!(partitions(&found).len(), 1);
    assert_eq!(
        found.warnings,
        [
            Warning::EndsBeforeStart { number: 2 },
            Warning::EndsBeforeStart { number: 3 },
            Warning::PastEnd { number: 4 },
            Warning::PastEnd { number: 5 },
            Warning::PastEnd { number: 6 },
            Warning::PastEnd { number: 7 },
        ]
    );
}

#[test]
fn dos_entries_past_the_end_are_left_out() {
    let found = reading(dos(1000, &[(0, 0x83, u32::MAX, u32::MAX), (0, 0x83, 1000, 1), (0, 5, u32::MAX, 9)]));
    assert_eq!(found.table.unwrap().partitions, []);
    assert_eq!(found.warnings, [1, 2, 3].map(|number| Warning::PastEnd { number }));
}

#[test]
fn a_chain_with_a_loop_ends() {
    let links: &[(usize, &[DosEntry])] = &[
        (100, &[(0, 0x83, 2, 5), (0, 5, 100, 100)]),
        (200, &[(0, 0x83, 2, 5), (0, 5, 200, 100)]),
        (300, &[(0, 0x83, 2, 5), (0, 5, 100, 100)]),
    ];
    let found = reading(chain(1000, links));
    let numbers: Vec<_> = partitions(&found).iter().map(|partition| partition.number).collect();
    assert_eq!((numbers, found.warnings), (vec![1, 5, 6, 7], vec![Warning::ChainLoop]));

    let itself: &[(usize, &[DosEntry])] = &[(100, &[(0, 5, 0, 900)])];
    assert_eq!(reading(chain(1000, itself)).warnings, [Warning::ChainLoop]);
}

#[test]
fn a_chain_of_two_extended_partitions_is_read_once() {
    let mut image = dos(1000, &[(0, 5, 100, 900), (0, 0x0f, 100, 900)]);
    put_record(&mut image[100 * 512..], &[(0, 0x83, 10, 50)]);
    let found = reading(image);
    let numbers: Vec<_> = partitions(&found).iter().map(|partition| partition.number).collect();
    assert_eq!(numbers, [1, 2, 5]);
    assert_eq!(found.warnings, [Warning::ChainLoop, Warning::Overlap { number: 2, other: 1 }]);
}

#[test]
fn a_broken_chain_keeps_the_partitions_before_the_break() {
    for next in [150, 950, u32::MAX] {
        let found = reading(chain(1000, &[(100, &[(0, 0x83, 2, 5), (0, 5, next, 100)])]));
        assert_eq!(partitions(&found).len(), 2);
        assert_eq!(found.warnings, [Warning::ChainBroken]);
    }
}

/// A chain of adjacent links from sector 100 on. Every nth contains a partition.
fn long_chain(links: usize, nth: usize) -> Vec<u8> {
    let mut image = chain(200 + 2 * links, &[]);
    for link in 0..links {
        let kind = if link % nth == nth - 1 { 0x83 } else { 5 };
        let next = u32::try_from(2 * (link + 1)).unwrap();
        let sector = &mut image[(100 + 2 * link) * 512..];
        let data = if kind == 5 { (0, 0, 0, 0) } else { (0, kind, 1, 1) };
        put_record(sector, &[data, (0, 5, next, 1)]);
    }
    image
}

#[test]
fn long_chains_end() {
    let mut full = Memory::from(long_chain(2000, 1));
    let found = read(&mut full, 512).unwrap();
    assert_eq!(partitions(&found).len(), 1 + 251);
    assert_eq!(partitions(&found).last().unwrap().number, 255);
    assert_eq!(found.warnings, [Warning::TooManyPartitions, Warning::Overlap { number: 5, other: 1 }]);

    let mut empty = Memory::from(long_chain(2000, 5000));
    assert_eq!(read(&mut empty, 512).unwrap().warnings, [Warning::ChainTooLong]);
    assert!(empty.reads < 110);

    let mut sparse = Memory::from(long_chain(20_000, 90));
    let found = read(&mut sparse, 512).unwrap();
    assert_eq!((partitions(&found).len(), &found.warnings[..]), (1 + 5, &[Warning::ChainTooLong][..]));
    assert!(sparse.reads < 520);
}

/// An image of the largest size that repeats one sector.
struct Endless([u8; 512]);

impl Image for Endless {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        assert!(offset + buffer.len() as u64 <= i64::MAX as u64);
        buffer.chunks_mut(512).for_each(|sector| sector.copy_from_slice(&self.0[..sector.len()]));
        Ok(())
    }
}

#[test]
fn numbers_at_their_limits_do_not_overflow() {
    let sector = |entries: &[DosEntry]| {
        let mut sector = [0; 512];
        put_record(&mut sector, entries);
        Endless(sector)
    };
    let most = u32::MAX;
    let mut everything =
        sector(&[(0, 5, most, most), (0, 0x83, most, most), (0x80, 0x83, 0, most), (0, 0x0f, most, most)]);
    for block_size in [512, 4096, 65536] {
        let found = read(&mut everything, block_size).unwrap();
        let found = found.table.unwrap().partitions;
        assert_eq!(found[1].start, u64::from(most) * u64::from(block_size));
        assert_eq!(found[1].end(), 2 * u64::from(most) * u64::from(block_size));
    }
    let mut gpt = sector(&[(0, 0xee, 1, most)]);
    gpt.0[..8].copy_from_slice(b"EFI PART");
    put_u32(&mut gpt.0, 12, 92);
    put_u64(&mut gpt.0, 32, u64::MAX);
    assert_eq!(read(&mut gpt, 512).unwrap().table, None);
}

#[test]
fn a_huge_table_takes_little_memory() {
    let all: Vec<_> = (1..=8192).map(|number| (number, 40, 4000)).collect();
    let mut image = Memory::from(Gpt::with_entries(512, 8192, 8192, &all).image);
    let mut found = Reading::default();
    let memory = allocation_counter::measure(|| found = read(&mut image, 512).unwrap());
    assert_eq!(partitions(&found).len(), 255);
    assert!(memory.bytes_max < 256 * 1024, "{memory:?}");
    assert!(image.bytes_read < (2 << 20) + 4096);
}

#[test]
fn errors_of_the_image_are_passed_on() {
    struct Broken;
    impl Image for Broken {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn read_at(&mut self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::TimedOut.into())
        }
    }
    assert_eq!(read(&mut Broken, 512).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn warnings_read_as_sentences() {
    let both = [Warning::PrimaryDamaged(Fault::HeaderChecksum), Warning::BackupDamaged(Fault::NoSignature)];
    assert_eq!(
        both.map(|warning| warning.to_string()),
        [
            "the primary GPT cannot be used: its header's checksum is wrong",
            "the backup GPT cannot be used: there is none"
        ]
    );
    assert_eq!(
        Warning::OtherSectorSize { table: TableKind::Gpt, written: 4096, read: 512 }.to_string(),
        "the GPT counts sectors of 4096 bytes and the device has 512: the right block size is 4096"
    );
}
