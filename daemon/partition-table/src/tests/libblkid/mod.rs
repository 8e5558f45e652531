//! Compares this crate with libblkid: with the output of `blkid` and `partx` for several hundred images.
//!
//! `LOOPD_TEST_SEED` selects other images. `PROBE_IMAGES` may name a directory of more images, such as those of the tests
//! of util-linux (`tests/ts/blkid/images-*`, unpacked).

mod differences;
mod generate;
mod random;
mod tool_images;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use tempfile::TempDir;

use self::differences::DIFFERENCES;
use self::generate::Case;
use self::random::Random;
use super::commands::{need, path_of};
use super::images::Memory;
use crate::{Reading, TableKind, read};

const SEED: u64 = 0x6c6f_6f70_6421;
/// The least number of images: with fewer the test is broken.
const LEAST: usize = 200;

/// First sector and number of sectors, of 512 bytes. The number is 0 for an extended partition, on whose size readers
/// differ.
type Row = (u64, u64);

/// The result of one reader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Listing {
    /// Kind of the table; empty for none.
    table: String,
    rows: BTreeMap<u32, Row>,
    /// The numbers of partitions from a nested table.
    nested: BTreeSet<u32>,
}

/// The results of both readers for an image.
struct Comparison<'a> {
    case: &'a Case,
    /// Size of the image in sectors of 512 bytes.
    sectors: u64,
    reading: Reading,
    ours: Listing,
    theirs: Listing,
}

fn our_listing(reading: &Reading) -> Listing {
    let Some(table) = &reading.table else { return Listing::default() };
    let is_extended = |kind: &str| table.kind == TableKind::Dos && ["0x5", "0xf", "0x85"].contains(&kind);
    let rows = table.partitions.iter().map(|found| {
        let size = if is_extended(&found.kind) { 0 } else { found.size / 512 };
        (found.number, (found.start / 512, size))
    });
    Listing { table: table.kind.to_string(), rows: rows.collect(), nested: BTreeSet::new() }
}

/// The output of a tool, which fails if there is no table. Its memory is limited: some versions of libblkid follow a
/// chain with a loop until there is no memory left.
fn output(directory: &TempDir, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(path_of("prlimit").unwrap())
        .args(["--as=1000000000", "timeout", "20", tool])
        .args(arguments)
        .current_dir(directory.path())
        .env("LC_ALL", "C.UTF-8")
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The result of `partx` and, for sectors of 512 bytes, of `blkid` for the file `image`. `blkid` has no option for others.
fn their_listing(directory: &TempDir, block_size: usize, ours: &Listing) -> Listing {
    let mut listing = Listing::default();
    let size = block_size.to_string();
    let columns = "NR,START,SECTORS,TYPE,SCHEME";
    let mut schemes = BTreeSet::new();
    for line in output(directory, "partx", &["-g", "-r", "-S", &size, "-o", columns, "image"]).lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| columns[index].parse::<u64>().unwrap();
        let partition = u32::try_from(number(0)).unwrap();
        let (kind, scheme) = (columns[3], columns[4]);
        let is_extended = scheme == "dos" && ["0x5", "0xf", "0x85"].contains(&kind);
        listing.rows.insert(partition, (number(1), if is_extended { 0 } else { number(2) }));
        if ["dos", "gpt"].contains(&scheme) {
            schemes.insert(scheme.to_owned());
        } else {
            listing.nested.insert(partition);
        }
    }
    listing.table = if block_size == 512 {
        let exported = output(directory, "blkid", &["-p", "-o", "export", "image"]);
        exported.lines().find_map(|line| line.strip_prefix("PTTYPE=")).unwrap_or_default().to_owned()
    } else if listing.rows.is_empty() && ours.rows.is_empty() {
        ours.table.clone()
    } else {
        schemes.first().cloned().unwrap_or_default()
    };
    listing
}

/// The names of the differences for an image.
///
/// # Errors
/// There is a difference without a known reason.
fn differences(case: &Case) -> Result<Vec<&'static str>, String> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("image"), &case.image).unwrap();
    let block_size = u32::try_from(case.block_size).unwrap();
    let reading = read(&mut Memory::from(case.image.clone()), block_size).unwrap();
    let ours = our_listing(&reading);
    let theirs = their_listing(&directory, case.block_size, &ours);
    let sectors = case.image.len() as u64 / 512;
    let mut seen = Comparison { case, sectors, reading, ours, theirs };
    let before = seen.theirs.clone();
    let mut found = Vec::new();
    for difference in &DIFFERENCES {
        if seen.ours != seen.theirs && (difference.remove)(&mut seen) {
            found.push(difference.name);
        }
    }
    if seen.ours == seen.theirs {
        return Ok(found);
    }
    Err(format!(
        "{}, blocks of {block_size}: {:?}, libblkid: {before:?}; {:?}",
        case.kind, seen.ours, seen.reading.warnings
    ))
}

/// Compares all images in several threads.
fn compared(cases: &[Case]) -> Vec<Result<Vec<&'static str>, String>> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let parts = cases.chunks(cases.len().div_ceil(threads));
        let parts: Vec<_> =
            parts.map(|part| scope.spawn(move || part.iter().map(differences).collect::<Vec<_>>())).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

/// The images in the directory that `PROBE_IMAGES` names.
fn more_images() -> Vec<Case> {
    let Some(directory) = std::env::var_os("PROBE_IMAGES") else { return Vec::new() };
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let case = |path: &Path| Case {
        kind: path.display().to_string(),
        block_size: 512,
        image: fs::read(path).unwrap(),
    };
    entries.filter(|path| path.is_file()).map(|path| case(&path)).collect()
}

#[test]
fn libblkid_agrees() {
    need!("libblkid_agrees", "blkid", "partx", "prlimit", "timeout");
    let seed = std::env::var("LOOPD_TEST_SEED").map_or(SEED, |seed| seed.parse().unwrap());
    let mut cases = generate::all(&mut Random::new(seed));
    cases.extend(tool_images::all());
    cases.extend(more_images());
    assert!(cases.len() >= LEAST);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut faults = Vec::new();
    for result in compared(&cases) {
        match result {
            Ok(found) => found.into_iter().for_each(|name| *counts.entry(name).or_default() += 1),
            Err(fault) => faults.push(fault),
        }
    }
    println!("{} images compared with libblkid", cases.len());
    for difference in &DIFFERENCES {
        if let Some(count) = counts.get(difference.name) {
            println!("{count:4} {}: {}", difference.name, difference.reason);
        }
    }
    assert!(faults.is_empty(), "{} without a reason:\n{}", faults.len(), faults.join("\n"));
}
