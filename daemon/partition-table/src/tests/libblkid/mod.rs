//! This crate against libblkid: what `blkid` and `partx` say of several hundred images.
//!
//! `LOOPD_TEST_SEED` makes other images. `PROBE_IMAGES` may name a directory of further images, such as those of util-linux' own tests
//! (`tests/ts/blkid/images-*`, unpacked).

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
/// Fewer images would be a fault of the test.
const LEAST: usize = 200;

/// First sector and sectors of 512 bytes; no sectors of an extended partition, whose size is another one for each
/// reader.
type Row = (u64, u64);

/// What one side says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    /// Kind of the table; empty for none.
    table: String,
    rows: BTreeMap<u32, Row>,
    /// The numbers that are of a table within a partition.
    nested: BTreeSet<u32>,
}

/// What both sides say of an image.
struct Comparison<'a> {
    case: &'a Case,
    /// Size of the image in sectors of 512 bytes.
    sectors: u64,
    reading: Reading,
    ours: Said,
    theirs: Said,
}

fn said_by_us(reading: &Reading) -> Said {
    let Some(table) = &reading.table else { return Said::default() };
    let is_extended = |kind: &str| table.kind == TableKind::Dos && ["0x5", "0xf", "0x85"].contains(&kind);
    let rows = table.partitions.iter().map(|found| {
        let size = if is_extended(&found.kind) { 0 } else { found.size / 512 };
        (found.number, (found.start / 512, size))
    });
    Said { table: table.kind.to_string(), rows: rows.collect(), nested: BTreeSet::new() }
}

/// The output of a tool, which ends with an error if there is no table. It gets so much memory: some versions of
/// libblkid follow a chain with a loop until there is no more.
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

/// What `partx` and, for sectors of 512 bytes, `blkid` say of the file `image`. `blkid` has no option for others.
fn said_by_them(directory: &TempDir, block_size: usize, ours: &Said) -> Said {
    let mut said = Said::default();
    let size = block_size.to_string();
    let columns = "NR,START,SECTORS,TYPE,SCHEME";
    let mut schemes = BTreeSet::new();
    for line in output(directory, "partx", &["-g", "-r", "-S", &size, "-o", columns, "image"]).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        let partition = u32::try_from(number(0)).unwrap();
        let (kind, scheme) = (words[3], words[4]);
        let is_extended = scheme == "dos" && ["0x5", "0xf", "0x85"].contains(&kind);
        said.rows.insert(partition, (number(1), if is_extended { 0 } else { number(2) }));
        if ["dos", "gpt"].contains(&scheme) {
            schemes.insert(scheme.to_owned());
        } else {
            said.nested.insert(partition);
        }
    }
    said.table = if block_size == 512 {
        let exported = output(directory, "blkid", &["-p", "-o", "export", "image"]);
        exported.lines().find_map(|line| line.strip_prefix("PTTYPE=")).unwrap_or_default().to_owned()
    } else if said.rows.is_empty() && ours.rows.is_empty() {
        ours.table.clone()
    } else {
        schemes.first().cloned().unwrap_or_default()
    };
    said
}

/// The names of the differences of an image; an error if there is one without a reason.
fn differences(case: &Case) -> Result<Vec<&'static str>, String> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("image"), &case.image).unwrap();
    let block_size = u32::try_from(case.block_size).unwrap();
    let reading = read(&mut Memory::from(case.image.clone()), block_size).unwrap();
    let ours = said_by_us(&reading);
    let theirs = said_by_them(&directory, case.block_size, &ours);
    let sectors = case.image.len() as u64 / 512;
    let mut seen = Comparison { case, sectors, reading, ours, theirs };
    let before = seen.theirs.clone();
    let mut found = Vec::new();
    for difference in &DIFFERENCES {
        if seen.ours != seen.theirs && (difference.take_out)(&mut seen) {
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

/// The results of all images, by several threads.
fn compared(cases: &[Case]) -> Vec<Result<Vec<&'static str>, String>> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let parts = cases.chunks(cases.len().div_ceil(threads));
        let parts: Vec<_> =
            parts.map(|part| scope.spawn(move || part.iter().map(differences).collect::<Vec<_>>())).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

/// The images of the directory that `PROBE_IMAGES` names.
fn further_images() -> Vec<Case> {
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
    cases.extend(further_images());
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
