//! Compares the parser with the kernel: a user-mode Linux, which runs as an ordinary process, attaches images to loop
//! devices and lists the nodes that its scan makes, and the partitions that it accepts from BLKPG.
//!
//! Needs `apt-get install user-mode-linux kmod` (or `busybox` for `insmod`). `USER_MODE_LINUX` may instead name a
//! directory with the unpacked packages.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::fuzz::{Bases, Input};
use super::images::{Gpt, Memory, chain, dos};
use crate::{Reading, Refusal, Warning, read};

/// How many random images are compared, about three a second. `BOLERO_RANDOM_ITERATIONS` sets another number.
const CHANGED_IMAGES: usize = 20;

/// An image, and the block size of its device.
struct Case {
    block_size: u32,
    image: Vec<u8>,
}

/// Number, first sector and number of sectors, of 512 bytes.
type Node = (u32, u64, u64);

/// The kernel's result for an image: the nodes of its scan, and the numbers that BLKPG accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    nodes: Vec<Node>,
    taken: Vec<u32>,
}

fn nodes(reading: &Reading) -> Vec<Node> {
    let partitions = reading.table.iter().flat_map(|table| &table.partitions);
    partitions.map(|found| (found.number, found.start / 512, found.size / 512)).collect()
}

/// Runs in the user-mode Linux; for each image one line `scan NAME NODE…`, one `blkpg NAME NUMBER…`.
const SCRIPT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t hostfs -o DIRECTORY directory /mnt
cd /mnt
PATH=PREFIX/bin:PREFIX/sbin:PREFIX/usr/bin:PREFIX/usr/sbin:$PATH
module=PREFIX/usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/loop.ko
insmod $module 2>/dev/null || busybox insmod $module
while read name size partitions; do
  device=$(losetup -f --show -r -P -b $size $name)
  loop=${device##*/}
  line="scan $name"
  for node in /sys/block/$loop/${loop}p*; do
    [ -d $node ] || continue
    read number <$node/partition && read start <$node/start && read sectors <$node/size
    line="$line $number:$start:$sectors"
  done
  echo $line
  losetup -d $device
  losetup -r -b $size $device $name
  line="blkpg $name"
  for partition in $partitions; do
    number=${partition%%:*} extent=${partition#*:}
    addpart $device $number ${extent%:*} ${extent#*:} 2>/dev/null && line="$line $number"
  done
  echo $line
  for number in ${line#blkpg $name}; do
    delpart $device $number
  done
  losetup -d $device
done <list >answers
sync
echo o >/proc/sysrq-trigger
sleep 9
"#;

/// The results of a user-mode Linux.
///
/// # Errors
/// The reason why it does not run.
fn ask(cases: &[Case]) -> Result<BTreeMap<usize, Answer>, String> {
    let prefix = PathBuf::from(std::env::var("USER_MODE_LINUX").unwrap_or("/".to_owned()));
    let linux = prefix.join("usr/bin/linux.uml");
    if !linux.exists() {
        return Err("user-mode-linux is not installed".to_owned());
    }
    let directory = tempfile::tempdir().unwrap();
    write_cases(directory.path(), cases);
    let script = directory.path().join("init");
    let text = SCRIPT.replace("DIRECTORY", directory.path().to_str().unwrap());
    fs::write(&script, text.replace("PREFIX", prefix.to_str().unwrap().trim_end_matches('/'))).unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("timeout")
        .arg((60 + cases.len()).to_string())
        .arg(linux)
        .args(["mem=128M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
        .args(["con=null", "con0=fd:0,fd:1", "quiet"])
        .arg(format!("uml_dir={}", directory.path().display()))
        .arg(format!("init={}", script.display()))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("it does not start: {error}"))?;
    let answers = fs::read_to_string(directory.path().join("answers")).unwrap_or_default();
    let answers = parse(&answers);
    if answers.len() < cases.len() {
        let (out, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        eprintln!("it stopped after {} of {} images: {out}{errors}", answers.len(), cases.len());
    }
    if answers.is_empty() { Err("user-mode-linux does not run here".to_owned()) } else { Ok(answers) }
}

fn write_cases(directory: &Path, cases: &[Case]) {
    let mut list = String::new();
    for (index, case) in cases.iter().enumerate() {
        fs::write(directory.join(index.to_string()), &case.image).unwrap();
        write!(list, "{index} {}", case.block_size).unwrap();
        for (number, start, size) in
            nodes(&read(&mut Memory::from(case.image.clone()), case.block_size).unwrap())
        {
            write!(list, " {number}:{start}:{size}").unwrap();
        }
        list.push('\n');
    }
    fs::write(directory.join("list"), list).unwrap();
}

/// Images without both answers are left out.
fn parse(answers: &str) -> BTreeMap<usize, Answer> {
    let (mut scans, mut parsed) = (BTreeMap::new(), BTreeMap::new());
    for line in answers.lines() {
        let mut columns = line.split_whitespace();
        let is_scan = columns.next() == Some("scan");
        let index = columns.next().unwrap().parse().unwrap();
        if is_scan {
            let mut nodes: Vec<Node> = columns.map(node).collect();
            nodes.sort_unstable();
            scans.insert(index, nodes);
        } else if let Some(nodes) = scans.remove(&index) {
            let taken = columns.map(|number| number.parse().unwrap()).collect();
            parsed.insert(index, Answer { nodes, taken });
        }
    }
    parsed
}

fn node(text: &str) -> Node {
    let numbers: Vec<u64> = text.split(':').map(|number| number.parse().unwrap()).collect();
    (u32::try_from(numbers[0]).unwrap(), numbers[1], numbers[2])
}

/// The nodes that the kernel is expected to make, given the differences that `lib.rs` lists. `None` if the two cannot be
/// compared.
fn expected_nodes(reading: &Reading) -> Option<Vec<Node>> {
    let incomparable =
        |warning: &Warning| matches!(warning, Warning::ChainLoop | Warning::NestedTable { .. });
    if reading.is_volume || reading.warnings.iter().any(incomparable) {
        return None;
    }
    let from_backup = reading.table.as_ref().is_some_and(|table| table.from_backup);
    Some(if from_backup { Vec::new() } else { nodes(reading) })
}

/// Whether the result is as expected. If not, prints the difference and keeps the image.
fn agrees(index: usize, case: &Case, mut answer: Answer) -> bool {
    let reading = read(&mut Memory::from(case.image.clone()), case.block_size).unwrap();
    let inverted = |number| reading.warnings.contains(&Warning::EndsBeforeStart { number });
    answer.nodes.retain(|node| !inverted(node.0));
    let partitions = reading.table.iter().flat_map(|table| &table.partitions);
    let taken = partitions.filter(|found| found.refusal.is_none()).map(|found| found.number).collect();
    let nodes = expected_nodes(&reading).unwrap_or_else(|| answer.nodes.clone());
    let expected = Answer { nodes, taken };
    if answer == expected {
        return true;
    }
    let path = std::env::temp_dir().join(format!("partition-table-{index}"));
    fs::write(&path, &case.image).unwrap();
    let (path, block_size) = (path.display(), case.block_size);
    eprintln!("{path}, blocks of {block_size}: {answer:?}, expected {expected:?}; {reading:#?}");
    false
}

fn cases() -> Vec<Case> {
    let case = |block_size, image| Case { block_size, image };
    let links: &[(usize, &[_])] = &[
        (100, &[(0, 0x83, 1, 50), (0, 5, 100, 100), (0, 0x83, 60, 5), (0, 0x83, 60, 5000)]),
        (200, &[(0, 0x83, 5000, 60), (0, 5, 200, 100)]),
        (300, &[(0, 0x83, 10, 7000)]),
    ];
    let mut cut_off = dos(81 * 8, &[(0, 0x83, 1, 100), (0, 5, 40, 60)]);
    cut_off.truncate(80 * 4096 + 1024);
    let mut larger = Gpt::new(512, 4096, &[(1, 40, 99)]).image;
    larger.resize(8192 * 512, 0);
    let unprotected = |entry| {
        let mut image = Gpt::new(512, 4096, &[(1, 40, 99)]).image;
        image[446..462].copy_from_slice(entry);
        image
    };
    let mut cases = vec![
        case(512, chain(1000, links)),
        case(4096, cut_off),
        case(512, larger),
        case(512, unprotected(b"\x00\0\0\0\x83\0\0\0\x07\0\0\0\x09\0\0\0")),
        case(512, unprotected(b"\x00\0\0\0\xee\0\0\0\x02\0\0\0\x09\0\0\0")),
        case(512, Gpt::new(4096, 300, &[(1, 50, 99)]).image),
        case(512, dos(1000, &[(0x80, 0, 0, 1000), (0, 0xef, 40, 20), (0, 0x83, 50, 20)])),
        case(512, Gpt::with_entries(512, 4096, 300, &[(255, 100, 199), (256, 200, 299)]).image),
    ];
    for block_size in [512, 1024, 2048, 4096] {
        let bytes = usize::try_from(block_size).unwrap();
        cases.push(case(block_size, Gpt::new(bytes, 300, &[(1, 50, 99), (9, 0, 70), (3, 120, 119)]).image));
    }
    let cases = Mutex::new(cases);
    add_changed_images(&cases);
    cases.into_inner().unwrap()
}

/// Adds images like those of [`super::fuzz`].
fn add_changed_images(cases: &Mutex<Vec<Case>>) {
    let bases = Bases::new();
    bolero::check!().with_iterations(CHANGED_IMAGES).with_type::<Input>().for_each(|input| {
        let (image, block_size) = bases.image_and_block_size(input);
        if image.len() >= 4096 {
            let block_size = u32::try_from(block_size).unwrap();
            cases.lock().unwrap().push(Case { block_size, image });
        }
    });
}

#[test]
#[ignore = "takes minutes and needs user-mode-linux: for a run by hand"]
fn the_kernel_makes_the_same_nodes() {
    let cases = cases();
    let answers = ask(&cases).unwrap();
    let nodes: usize = answers.values().map(|answer| answer.nodes.len()).sum();
    let refused = cases.iter().filter(|case| has_refusal(case)).count();
    eprintln!("{} images, {nodes} nodes, {refused} images with partitions that BLKPG refuses", answers.len());
    let differ =
        answers.into_iter().filter(|(index, answer)| !agrees(*index, &cases[*index], answer.clone()));
    assert_eq!(differ.count(), 0);
}

fn has_refusal(case: &Case) -> bool {
    let table = read(&mut Memory::from(case.image.clone()), case.block_size).unwrap().table;
    let is_refused = |refusal| matches!(refusal, Some(Refusal::Overlaps(_) | Refusal::Unaligned));
    table.is_some_and(|table| table.partitions.iter().any(|found| is_refused(found.refusal)))
}
