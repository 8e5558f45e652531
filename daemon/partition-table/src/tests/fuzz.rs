//! Fuzz tests of the parser.
//!
//! An ordinary test run takes a few seconds. The long run, ten million inputs of each kind:
//!
//! ```sh
//! BOLERO_RANDOM_ITERATIONS=10000000 BOLERO_RANDOM_TEST_TIME_MS=86400000 \
//! CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
//! cargo test --release -p loopd-partition-table tests::fuzz -- --nocapture
//! ```

use std::time::Duration;

use bolero::TypeGenerator;

use super::images::{Gpt, Memory, chain, dos, put_record, seal};
use crate::{MAX_PARTITIONS, Partition, Reading, read, sector_size};

/// The most reads of an image, for each of the two functions.
const MOST_READS: usize = 1000;
/// The most memory that reading may take at any time, in bytes.
const MOST_MEMORY: u64 = 1 << 20;

/// A change of a few bytes of an image, mostly of fields that the parser reads.
#[derive(Clone, Debug, TypeGenerator)]
enum Change {
    /// Anywhere.
    Byte { offset: u16, value: u8 },
    /// In the first sectors: boot record, primary header, first entries.
    Start { offset: u8, page: u8, value: u64, size: u8 },
    /// A field of a copy's header.
    Header { backup: bool, field: u8, value: Number },
    /// A field of an entry of the primary copy.
    GptEntry { index: u8, last: bool, value: Number },
    /// An entry of a boot record, which lies at a multiple of ten sectors.
    DosEntry { record: u8, index: u8, kind: u8, first: Number, sectors: Number },
    /// Turns a sector into a boot record.
    Sign { record: u8 },
    /// Writes the checksums of a copy again.
    Seal { backup: bool },
    /// Cuts the end off, with a probability of one sixteenth.
    Truncate { bytes: u16, chance: u8 },
}

/// A number near a limit, or any.
#[derive(Clone, Debug, TypeGenerator)]
enum Number {
    Small(u8),
    Tens(u8),
    FromTop(u8),
    FromTop32(u8),
    Any(u64),
}

impl Number {
    fn value(&self) -> u64 {
        match self {
            Self::Small(value) => u64::from(*value),
            Self::Tens(value) => u64::from(*value % 14) * 10,
            Self::FromTop(value) => u64::MAX - u64::from(*value),
            Self::FromTop32(value) => u64::from(u32::MAX - u32::from(*value)),
            Self::Any(value) => *value,
        }
    }
}

/// A base image, changes of it, and the block size to read it with.
#[derive(Clone, Debug, TypeGenerator)]
pub struct Input {
    base: u8,
    changes: Vec<Change>,
    seal: bool,
    block_size: u8,
}

pub struct Bases(Vec<(usize, Vec<u8>)>);

impl Bases {
    /// Small images, with few entries, so that checksums cost little.
    pub fn new() -> Self {
        let mut hybrid = Gpt::with_entries(512, 90, 4, &[(1, 10, 19), (2, 20, 60)]);
        put_record(&mut hybrid.image, &[(0, 0xee, 1, 89), (0x80, 0x83, 10, 10)]);
        let links: &[(usize, &[_])] = &[
            (100, &[(0, 0x83, 2, 5), (0, 5, 10, 10)]),
            (110, &[(0, 0x83, 2, 5), (0, 5, 20, 10)]),
            (120, &[(0, 0x83, 2, 5)]),
        ];
        Self(vec![
            (512, Gpt::with_entries(512, 64, 4, &[(1, 10, 19), (3, 20, 50)]).image),
            (512, hybrid.image),
            (4096, Gpt::with_entries(4096, 12, 4, &[(1, 4, 5), (2, 6, 7)]).image),
            (512, dos(120, &[(0, 0x83, 1, 50), (0, 0x82, 51, 9), (0x80, 0x0c, 60, 20)])),
            (512, chain(140, links)),
            (512, dos(130, &[(0, 0, 0, 130), (0, 0xef, 60, 20)])),
        ])
    }

    fn image(&self, input: &Input) -> Vec<u8> {
        self.image_and_block_size(input).0
    }

    /// The block size is the one that the image was made for.
    pub fn image_and_block_size(&self, input: &Input) -> (Vec<u8>, usize) {
        let (block_size, image) = &self.0[usize::from(input.base) % self.0.len()];
        let mut image = image.clone();
        for change in input.changes.iter().take(32) {
            change.apply(&mut image, *block_size);
        }
        if input.seal {
            [false, true]
                .iter()
                .for_each(|backup| Change::Seal { backup: *backup }.apply(&mut image, *block_size));
        }
        (image, *block_size)
    }
}

impl Change {
    fn apply(&self, image: &mut Vec<u8>, block_size: usize) {
        match self {
            Self::Byte { offset, value } => put(image, usize::from(*offset), &[*value]),
            Self::Start { offset, page, value, size } => {
                let offset = usize::from(*page % 8) * 256 + usize::from(*offset);
                put(image, offset, &value.to_le_bytes()[..usize::from(*size % 9)]);
            }
            Self::Header { backup, field, value } => {
                let fields = [
                    (12, 4),
                    (16, 4),
                    (24, 8),
                    (32, 8),
                    (40, 8),
                    (48, 8),
                    (72, 8),
                    (80, 4),
                    (84, 4),
                    (88, 4),
                ];
                let (offset, size) = fields[usize::from(*field) % fields.len()];
                let start = header(image, block_size, *backup) * block_size;
                put(image, start + offset, &value.value().to_le_bytes()[..size]);
            }
            Self::GptEntry { index, last, value } => {
                let offset = 2 * block_size + usize::from(*index % 4) * 128;
                put(image, offset + if *last { 40 } else { 32 }, &value.value().to_le_bytes());
            }
            Self::DosEntry { record, index, kind, first, sectors } => {
                let offset = usize::from(*record % 14) * 5120 + 446 + usize::from(*index % 4) * 16;
                let kinds = [0x05, 0x0f, 0x85, 0x83, 0xee, *kind];
                put(image, offset + 4, &[kinds[usize::from(*kind) % kinds.len()]]);
                put(image, offset + 8, &first.value().to_le_bytes()[..4]);
                put(image, offset + 12, &sectors.value().to_le_bytes()[..4]);
            }
            Self::Sign { record } => put(image, usize::from(*record % 14) * 5120 + 510, &[0x55, 0xaa]),
            Self::Seal { backup } => {
                let number = header(image, block_size, *backup);
                seal(image, block_size, number);
            }
            Self::Truncate { bytes, chance: 0..16 } => {
                image.truncate(image.len().saturating_sub(usize::from(*bytes)));
            }
            Self::Truncate { .. } => {}
        }
    }
}

fn header(image: &[u8], block_size: usize, backup: bool) -> usize {
    if backup { (image.len() / block_size).saturating_sub(1) } else { 1 }
}

fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(offset..offset + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Reads an image, and checks all that must hold for any.
fn check(image: Vec<u8>, block_size: u8) {
    let block_size = [512, 512, 512, 4096, 1024, 65536][usize::from(block_size) % 6];
    let mut image = Memory::from(image);
    let mut found = Reading::default();
    let memory = allocation_counter::measure(|| found = read(&mut image, block_size).unwrap());
    assert!(memory.bytes_max <= MOST_MEMORY, "{memory:?}");
    assert!(image.reads <= MOST_READS, "{} reads", image.reads);
    let partitions = found.table.as_ref().map_or(&[][..], |table| &table.partitions);
    partitions.iter().for_each(|partition| check_partition(partition, image.bytes.len() as u64));
    assert!(partitions.is_sorted_by(|one, other| one.number < other.number));
    check_refusals(partitions);
    assert!(found.warnings.len() < 4 * 256);
    found.warnings.iter().for_each(|warning| assert!(!warning.to_string().is_empty()));

    image.reads = 0;
    let memory = allocation_counter::measure(|| {
        sector_size(&mut image).unwrap();
    });
    assert!(memory.bytes_max <= MOST_MEMORY && image.reads <= MOST_READS);
}

fn check_partition(partition: &Partition, size: u64) {
    assert!((1..=MAX_PARTITIONS).contains(&partition.number));
    assert!(partition.size > 0 && (partition.start | partition.size).is_multiple_of(512));
    assert!(partition.start.checked_add(partition.size).is_some_and(|end| end <= size));
    assert!(partition.label.chars().count() <= 36 && !partition.label.contains('\0'));
    assert!(partition.kind.starts_with("0x") || partition.kind.len() == 36);
}

/// Partitions that BLKPG accepts share no byte.
fn check_refusals(partitions: &[Partition]) {
    let mut taken: Vec<_> = partitions.iter().filter(|partition| partition.refusal.is_none()).collect();
    taken.sort_by_key(|partition| partition.start);
    assert!(taken.is_sorted_by(|one, other| one.end() <= other.start));
}

/// How long each test takes in an ordinary run.
const TEST_TIME: Duration = Duration::from_secs(2);

#[test]
fn changed_images() {
    let bases = Bases::new();
    bolero::check!()
        .with_test_time(TEST_TIME)
        .with_type::<Input>()
        .for_each(|input| check(bases.image(input), input.block_size));
}

#[test]
fn random_bytes() {
    bolero::check!().with_test_time(TEST_TIME).with_type::<(u8, Vec<u8>, bool)>().for_each(
        |(block_size, bytes, sign)| {
            let mut image = vec![0; 2048];
            image[446..446 + bytes.len().min(1602)].copy_from_slice(&bytes[..bytes.len().min(1602)]);
            if *sign {
                put(&mut image, 510, &[0x55, 0xaa]);
            }
            check(image, *block_size);
        },
    );
}

#[test]
fn the_images_to_start_from_are_sound() {
    for (block_size, image) in Bases::new().0 {
        let block_size = u32::try_from(block_size).unwrap();
        let table = read(&mut Memory::from(image), block_size).unwrap().table.unwrap();
        assert!(table.partitions.len() >= 2);
    }
}
