//! Random images of many kinds.

use super::random::Random;
use crate::tests::images::{DosEntry, Gpt, fat_boot_sector, put_record, put_u32, put_u64};

/// An image, and the block size of its device in bytes.
pub struct Case {
    pub kind: String,
    pub block_size: usize,
    pub image: Vec<u8>,
}

/// Writes an image of a kind, for a block size.
type Writer = fn(&mut Random, usize) -> Vec<u8>;

const KINDS: [(&str, Writer); 32] = [
    ("primary partitions", primaries),
    ("an empty MBR", empty),
    ("overlapping entries", overlapping),
    ("zero-size entries", zero_size),
    ("entries past the end", past_the_end),
    ("logical partitions", logicals),
    ("a chain with all four entries", odd_links),
    ("a chain with a loop", chain_with_loop),
    ("a broken chain", broken_chain),
    ("a chain past the end", chain_past_the_end),
    ("an extended partition from sector 0", extended_from_zero),
    ("two extended partitions", two_extended),
    ("BSD types", bsd),
    ("odd boot flags", odd_flags),
    ("random entries", random_entries),
    ("a boot loader on ext4", boot_loader),
    ("a FAT superfloppy", superfloppy),
    ("a FAT superfloppy with an entry", superfloppy_with_entry),
    ("a table in a FAT boot sector", table_in_fat),
    ("the boot sector of NTFS, exFAT or BitLocker", named_boot_sector),
    ("a disk of AIX", aix),
    ("a partition from sector 0", whole_disk),
    ("GPT", gpt),
    ("GPT with a damaged primary", damaged_primary),
    ("GPT with a damaged backup", damaged_backup),
    ("GPT with both copies damaged", damaged_copies),
    ("GPT cut short", truncated_gpt),
    ("GPT made larger", enlarged_gpt),
    ("GPT with odd entries", odd_gpt_entries),
    ("GPT with high numbers", high_numbers),
    ("a hybrid MBR", hybrid),
    ("a protective entry at another place, or none", misplaced),
];

/// Images of each kind, for each block size.
const ROUNDS: usize = 3;
const BLOCK_SIZES: [usize; 3] = [512, 2048, 4096];
/// Types of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Types of partitions that may contain a BSD disk label.
const BSD: [u8; 3] = [0xa5, 0xa6, 0xa9];

/// All images.
pub fn all(random: &mut Random) -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, writer) in KINDS {
        for block_size in BLOCK_SIZES {
            for _ in 0..ROUNDS {
                cases.push(Case { kind: kind.to_owned(), block_size, image: writer(random, block_size) });
            }
        }
    }
    cases
}

/// Blocks of an image: libblkid reads no nested tables in one of a mebibyte.
fn blocks(block_size: usize) -> u32 {
    u32::try_from((2 << 20) / block_size + 90).unwrap()
}

fn number(value: u32) -> usize {
    value as usize
}

fn with_entries(block_size: usize, entries: &[DosEntry]) -> Vec<u8> {
    let mut image = vec![0; number(blocks(block_size)) * block_size];
    put_u32(&mut image, 440, 0x1a2b_3c4d);
    put_record(&mut image, entries);
    image
}

fn plain_type(random: &mut Random) -> u8 {
    random.one_of(&[0x83, 0x82, 0x07, 0x0c, 0xef, 0xfd, 0x01, 0xda])
}

/// Up to four consecutive partitions.
fn in_a_row(random: &mut Random, block_size: usize) -> Vec<DosEntry> {
    let most = blocks(block_size) / 4;
    (0..random.within(1, 4))
        .map(|index| {
            let start = 1 + index * (most - 1) + random.within(0, 20);
            (random.one_of(&[0, 0x80]), plain_type(random), start, random.within(1, most - 30))
        })
        .collect()
}

fn primaries(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut entries = in_a_row(random, block_size);
    let place = random.index(0, entries.len() - 1);
    entries.rotate_left(place);
    with_entries(block_size, &entries)
}

fn empty(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[]);
    for byte in &mut image[..440] {
        *byte = random.byte();
    }
    image
}

fn overlapping(random: &mut Random, block_size: usize) -> Vec<u8> {
    let last = blocks(block_size) / 2;
    let mut entry = || (0, plain_type(random), random.within(1, last), random.within(1, last));
    with_entries(block_size, &[entry(), entry(), entry(), entry()])
}

fn zero_size(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut entries = in_a_row(random, block_size);
    for _ in 0..2 {
        let index = random.index(0, entries.len() - 1);
        entries[index].3 = 0;
    }
    entries.resize(4, (0, random.one_of(&[0, 5, 0x83]), random.within(0, 9), 0));
    with_entries(block_size, &entries)
}

fn past_the_end(random: &mut Random, block_size: usize) -> Vec<u8> {
    let end = blocks(block_size);
    let mut entries = in_a_row(random, block_size);
    entries.truncate(3);
    entries.push((0, plain_type(random), end - random.within(1, 50), random.within(51, 9000)));
    let index = random.index(0, entries.len() - 1);
    let start = random.one_of(&[end, end + 1, end * 2, u32::MAX / 8]);
    entries[index] = (0, random.one_of(&[0x83, 5]), start, random.within(1, 9000));
    with_entries(block_size, &entries)
}

/// Writes a chain whose links are 50 blocks apart, from block 100 on; each link has the entries that the
/// function makes for its index, and the entry that leads to the next link.
fn chain(
    random: &mut Random,
    block_size: usize,
    mut entries: impl FnMut(&mut Random, u32) -> Vec<DosEntry>,
) -> (Vec<u8>, u32) {
    let extended = random.one_of(&EXTENDED);
    let (links, size) = (random.within(1, 6), blocks(block_size) - 100);
    let mut image = with_entries(block_size, &[(0, 0x83, 1, 50), (0, extended, 100, size)]);
    for link in 0..links {
        let mut found = entries(random, link);
        if link + 1 < links {
            let place = random.index(0, found.len().min(3));
            found.insert(place, (0, extended, 50 * (link + 1), 50));
        }
        put_record(&mut image[number(100 + 50 * link) * block_size..], &found);
    }
    (image, links)
}

fn logical(random: &mut Random) -> DosEntry {
    (0, plain_type(random), random.within(1, 5), random.within(1, 40))
}

fn logicals(random: &mut Random, block_size: usize) -> Vec<u8> {
    chain(random, block_size, |random, _| vec![logical(random)]).0
}

fn odd_links(random: &mut Random, block_size: usize) -> Vec<u8> {
    let image = chain(random, block_size, |random, _| {
        let third = (random.byte(), random.one_of(&[0, 0x83]), random.within(0, 60), random.within(0, 60));
        let mut entries = vec![logical(random), (0, 0, 0, 0), third];
        entries.truncate(random.index(0, 3));
        entries
    });
    image.0
}

fn chain_with_loop(random: &mut Random, block_size: usize) -> Vec<u8> {
    let (mut image, links) = chain(random, block_size, |_, _| vec![(0, 0x83, 1, 20)]);
    let target = 50 * random.within(0, links - 1);
    let last = number(100 + 50 * (links - 1)) * block_size;
    let entries = [(0, 0x83, 1, 20), (0, 5, target, 50)];
    // With and without partitions in the loop.
    let entries = if random.byte() < 128 || target == 0 { &entries[1..] } else { &entries[..] };
    put_record(&mut image[last..], &[(0, 0, 0, 0); 4]);
    put_record(&mut image[last..], entries);
    image
}

fn broken_chain(random: &mut Random, block_size: usize) -> Vec<u8> {
    let (mut image, links) = chain(random, block_size, |random, _| vec![logical(random)]);
    let link = random.within(0, links - 1);
    image[number(100 + 50 * link) * block_size + 510] = random.one_of(&[0, 0x54]);
    image
}

fn chain_past_the_end(random: &mut Random, block_size: usize) -> Vec<u8> {
    let end = blocks(block_size);
    let last =
        random.one_of(&[(0, 5, end, 50), (0, 5, u32::MAX / 9, 50), (0, 0x83, end, 9), (0, 0x83, 5, end)]);
    let image = chain(random, block_size, |random, link| {
        if link == 1 { vec![last, logical(random)] } else { vec![logical(random)] }
    });
    image.0
}

fn extended_from_zero(random: &mut Random, block_size: usize) -> Vec<u8> {
    let extended = (0, random.one_of(&EXTENDED), 0, blocks(block_size));
    let mut entries = in_a_row(random, block_size);
    entries.truncate(3);
    entries.insert(random.index(0, entries.len()), extended);
    with_entries(block_size, &entries)
}

fn two_extended(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[(0, 5, 100, 100), (0, 0x83, 1, 9), (0, 0x85, 300, 50)]);
    for block in [100, 300] {
        put_record(&mut image[block * block_size..], &[logical(random)]);
    }
    image
}

/// Partitions of BSD types, some with a disk label.
fn bsd(random: &mut Random, block_size: usize) -> Vec<u8> {
    let entries = [(0, 0x83, 1, 50), (0, random.one_of(&BSD), 60, 200)];
    let mut image = with_entries(block_size, &entries);
    if block_size == 512 && random.byte() < 200 {
        let label = bsd_label(random);
        image[61 * 512..61 * 512 + label.len()].copy_from_slice(&label);
    }
    image
}

/// A disk label of two partitions within sectors 60 to 259.
fn bsd_label(random: &mut Random) -> Vec<u8> {
    let mut label = vec![0; 404];
    put_u32(&mut label, 0, 0x8256_4557);
    put_u32(&mut label, 132, 0x8256_4557);
    label[138] = 4;
    for (index, start) in [(0, 80), (1, 150)] {
        put_u32(&mut label, 148 + 16 * index, random.within(10, 50));
        put_u32(&mut label, 148 + 16 * index + 4, start);
        label[148 + 16 * index + 12] = 7;
    }
    let words = label[..148 + 16 * 4].chunks_exact(2);
    let sum = words.fold(0, |sum, word| sum ^ u16::from_le_bytes([word[0], word[1]]));
    label[136..138].copy_from_slice(&sum.to_le_bytes());
    label
}

fn odd_flags(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut entries = in_a_row(random, block_size);
    let index = random.index(0, entries.len() - 1);
    entries[index].0 = random.byte() | 1;
    with_entries(block_size, &entries)
}

fn random_entries(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[]);
    for byte in &mut image[..510] {
        *byte = random.byte();
    }
    for (index, shift) in [0, 8, 16, 24].into_iter().enumerate() {
        image[446 + 16 * index] = random.one_of(&[0, 0x80]);
        // The protective type has its own kind of image.
        image[446 + 16 * index + 4] &= 0x7f;
        put_u32(&mut image, 446 + 16 * index + 8, random.within(0, u32::MAX) >> shift);
    }
    image
}

/// An ext4 superblock behind a boot sector that is code up to its signature, or up to where a table would be.
fn boot_loader(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[]);
    let end = random.one_of(&[440, 510]);
    for byte in &mut image[..end] {
        *byte = random.byte();
    }
    put_u32(&mut image, 1024 + 4, 512);
    put_u32(&mut image, 1024 + 24, 2);
    image[1024 + 56..1024 + 58].copy_from_slice(b"\x53\xef");
    image
}

fn fat(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[]);
    let sectors = image.len() / 512 - random.index(0, 9);
    image[..512].copy_from_slice(&fat_boot_sector(u16::try_from(sectors).unwrap()));
    image
}

fn superfloppy(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = fat(random, block_size);
    if random.byte() < 128 {
        for byte in &mut image[62..510] {
            *byte = random.byte();
        }
        // An image whose code looks like valid flags is of another kind.
        image[446] |= 1;
    }
    image
}

fn superfloppy_with_entry(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = fat(random, block_size);
    let end = blocks(block_size);
    let entries = [(0x80, 4, 0, end), (0, 0x0c, 0, 9), (0, 0x0b, end, 9), (0, 0, 20, 9), (0, 0x83, 63, end)];
    put_record(&mut image, &[random.one_of(&entries), (0, 0x83, 100, 50)]);
    image
}

fn table_in_fat(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = fat(random, block_size);
    put_record(&mut image, &in_a_row(random, block_size));
    image
}

fn named_boot_sector(random: &mut Random, block_size: usize) -> Vec<u8> {
    let entries = if random.byte() < 128 { vec![] } else { vec![(0x80, 7, 0, blocks(block_size))] };
    let mut image = with_entries(block_size, &entries);
    image[3..11].copy_from_slice(random.one_of(&[b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"]));
    image
}

fn aix(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = with_entries(block_size, &[(0, random.one_of(&[0x41, 0x83]), 10, 20)]);
    image[..4].copy_from_slice(b"\xc9\xc2\xd4\xc1");
    if random.byte() < 128 {
        image[7 * 512..7 * 512 + 4].copy_from_slice(b"_LVM");
    }
    image
}

/// As a hybrid ISO image has it.
fn whole_disk(random: &mut Random, block_size: usize) -> Vec<u8> {
    let inner = (0, 0xef, random.within(1, 100), random.within(1, 200));
    with_entries(block_size, &[(0x80, random.one_of(&[0, 0x17, 0x83]), 0, blocks(block_size)), inner])
}

fn sound_gpt(random: &mut Random, block_size: usize) -> Gpt {
    let end = u64::from(blocks(block_size)) - 40;
    let mut first = 40;
    let mut partitions = Vec::new();
    for number in 1..random.index(2, 6) {
        let last = (first + u64::from(random.within(0, 90))).min(end);
        if random.byte() < 200 && first <= last {
            partitions.push((number * random.index(1, 3), first, last));
        }
        first = last + 1 + u64::from(random.within(0, 5));
    }
    partitions.dedup_by_key(|partition| partition.0);
    Gpt::new(block_size, number(blocks(block_size)), &partitions)
}

fn gpt(random: &mut Random, block_size: usize) -> Vec<u8> {
    sound_gpt(random, block_size).image
}

/// Changes a byte of the header or of the entries of a copy.
fn damage(random: &mut Random, gpt: &mut Gpt, block: usize) {
    let header = gpt.block(block);
    let entries = u64::from_le_bytes(header[72..80].try_into().unwrap());
    let offset = if random.byte() < 128 {
        block * gpt.block_size + random.index(0, 91)
    } else {
        usize::try_from(entries).unwrap() * gpt.block_size + random.index(0, 128 * 128 - 1)
    };
    gpt.image[offset] ^= random.byte() | 1;
}

fn damaged_primary(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    damage(random, &mut gpt, 1);
    gpt.image
}

fn damaged_backup(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    let last = gpt.last();
    damage(random, &mut gpt, last);
    gpt.image
}

fn damaged_copies(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    let last = gpt.last();
    damage(random, &mut gpt, last);
    damage(random, &mut gpt, 1);
    gpt.image
}

fn truncated_gpt(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut image = gpt(random, block_size);
    image.truncate(random.index(1, image.len() / 512) * 512);
    image
}

fn enlarged_gpt(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    if random.byte() < 128 {
        gpt.block(1)[91] ^= 1;
    }
    gpt.image.resize(gpt.image.len() + 512 * random.index(1, 500), 0);
    gpt.image
}

fn odd_gpt_entries(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    let end = u64::from(blocks(block_size));
    let odd = [
        (0, 50),
        (100, 90),
        (60, end - 1),
        (70, end),
        (end, end + 5),
        (1, u64::MAX),
        (100, 99),
        (0, u64::MAX),
    ];
    let (first, last) = random.one_of(&odd);
    gpt.change(|_, entries| {
        entries[9 * 128..9 * 128 + 32].fill(7);
        put_u64(&mut entries[9 * 128..], 32, first);
        put_u64(&mut entries[9 * 128..], 40, last);
    });
    gpt.image
}

fn high_numbers(random: &mut Random, block_size: usize) -> Vec<u8> {
    let partitions = [(1, 110, 120), (255, 121, 125), (random.index(256, 300), 126, 130)];
    Gpt::with_entries(block_size, number(blocks(block_size)), 300, &partitions).image
}

fn hybrid(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    let protective = (0, 0xee, 1, random.within(30, u32::MAX));
    let mut entries = in_a_row(random, block_size);
    entries.truncate(3);
    entries.insert(random.index(0, entries.len()), protective);
    put_record(&mut gpt.image, &entries);
    gpt.image
}

fn misplaced(random: &mut Random, block_size: usize) -> Vec<u8> {
    let mut gpt = sound_gpt(random, block_size);
    let entry = random.one_of(&[(0, 0xee, 0, 90), (0, 0xee, 2, 90), (0, 0x83, 1, 90), (0, 0, 0, 0)]);
    put_record(&mut gpt.image, &[entry]);
    gpt.image
}
