//! Compares images of common tools with the results of other readers: `sfdisk --json` (libfdisk) and `partx`
//! (libblkid, which udev uses).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::TempDir;

use super::commands::{OnDisk, need, run};
use crate::{Image, Partition, Reading, Refusal, Table, TableKind, Warning, read, sector_size};
use loopd_test_support::skipped;

fn empty_image(megabytes: u64) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("image")).unwrap().set_len(megabytes << 20).unwrap();
    directory
}

fn open(directory: &TempDir) -> OnDisk {
    OnDisk(File::options().read(true).write(true).open(directory.path().join("image")).unwrap())
}

fn reading(directory: &TempDir, block_size: u32) -> Reading {
    read(&mut open(directory), block_size).unwrap()
}

/// A partition in the results of both: number, start, size, type, UUID, name.
type Row = (u32, u64, u64, String, String, String);

/// Our rows. Other readers return the full size of an extended partition, so it is 0 here.
fn ours(table: &Table) -> Vec<Row> {
    table.partitions.iter().map(|found| row(table.kind, found)).collect()
}

fn row(table: TableKind, found: &Partition) -> Row {
    let size = if table == TableKind::Dos && is_extended(&found.kind) { 0 } else { found.size };
    (found.number, found.start, size, found.kind.clone(), found.uuid.clone(), found.label.clone())
}

fn is_extended(kind: &str) -> bool {
    ["0x5", "0xf", "0x85"].contains(&kind)
}

/// The rows of `sfdisk --json`, which has no UUIDs of DOS partitions.
fn rows_of_sfdisk(directory: &TempDir) -> Vec<Row> {
    let json: serde_json::Value =
        serde_json::from_str(&run(directory, "sfdisk", &["--json", "image"], "")).unwrap();
    let table = &json["partitiontable"];
    let sector = table["sectorsize"].as_u64().unwrap();
    let id = table["id"].as_str().unwrap().trim_start_matches("0x").to_lowercase();
    let is_dos = table["label"] == "dos";
    let partitions = table["partitions"].as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let row = |partition: &serde_json::Value| {
        let number: u32 = text(&partition["node"]).trim_start_matches("image").parse().unwrap();
        let mut kind = text(&partition["type"]).to_lowercase();
        let mut uuid = text(&partition["uuid"]).to_lowercase();
        if is_dos {
            kind = format!("0x{kind}");
            uuid = if id == "00000000" { String::new() } else { format!("{id}-{number:02x}") };
        }
        let size = if is_dos && is_extended(&kind) { 0 } else { partition["size"].as_u64().unwrap() };
        let start = partition["start"].as_u64().unwrap();
        (number, start * sector, size * sector, kind, uuid, text(&partition["name"]))
    };
    partitions.iter().map(row).collect()
}

/// The rows of `partx`, whose sectors always have 512 bytes.
fn rows_of_partx(directory: &TempDir, block_size: u32) -> Vec<Row> {
    let size = block_size.to_string();
    let columns = "NR,START,SECTORS,TYPE,UUID,NAME,SCHEME";
    let text = run(directory, "partx", &["--pairs", "-S", &size, "-o", columns, "image"], "");
    let row = |line: &str| {
        let value = |key: &str| {
            let (_, rest) = line.split_once(&format!("{key}=\"")).unwrap();
            unescape(rest.split_once('"').unwrap().0)
        };
        let number = |key| value(key).parse::<u64>().unwrap();
        let kind = value("TYPE");
        let size = if value("SCHEME") == "dos" && is_extended(&kind) { 0 } else { number("SECTORS") };
        let start = number("START");
        let name = value("NAME");
        (u32::try_from(number("NR")).unwrap(), start * 512, size * 512, kind, value("UUID"), name)
    };
    text.lines().map(row).collect()
}

/// Decodes `\xHH`.
fn unescape(text: &str) -> String {
    let mut parts = text.split("\\x");
    let mut bytes = parts.next().unwrap().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).unwrap()
}

/// Reads the image in sectors of 512 bytes. Both tools must agree.
fn agreed(directory: &TempDir) -> Reading {
    let found = reading(directory, 512);
    let ours = ours(found.table.as_ref().unwrap());
    assert_eq!(ours, rows_of_sfdisk(directory));
    assert_eq!(ours, rows_of_partx(directory, 512));
    found
}

#[test]
fn gpt_of_sfdisk() {
    need!("gpt_of_sfdisk", "sfdisk", "partx");
    let directory = empty_image(64);
    let script = "label: gpt\nsize=4M,type=L,name=\"Füße 木\"\nsize=8M,type=U,name=esp\n\
                  size=1M,type=S,name=\"exactly thirty-six characters, no NUL\"\n";
    let script = script.replace(", no NUL", " no NUL");
    run(&directory, "sfdisk", &["image"], &script);
    let found = agreed(&directory);
    assert_eq!(found.warnings, []);
    assert_eq!(found.table.as_ref().unwrap().partitions.len(), 3);
    assert_eq!(sector_size(&mut open(&directory)).unwrap(), Some(512));
}

#[test]
fn gpt_of_sgdisk_with_holes_and_a_large_table() {
    need!("gpt_of_sgdisk_with_holes_and_a_large_table", "sgdisk", "sfdisk", "partx");
    let directory = empty_image(64);
    run(
        &directory,
        "sgdisk",
        &["-S", "256", "-n", "3:0:+4M", "-c", "3:three", "-n", "200:0:+4M", "-n", "7:0:0", "image"],
        "",
    );
    let found = agreed(&directory);
    assert_eq!(found.warnings, []);
    let numbers: Vec<_> = found.table.unwrap().partitions.iter().map(|found| found.number).collect();
    assert_eq!(numbers, [3, 7, 200]);
}

#[test]
fn hybrid_mbr_of_sgdisk() {
    need!("hybrid_mbr_of_sgdisk", "sgdisk", "sfdisk", "partx");
    let directory = empty_image(64);
    run(&directory, "sgdisk", &["-n", "1:0:+4M", "-n", "2:0:+8M", "-h", "1:2:EE", "image"], "");
    assert_eq!(agreed(&directory).table.unwrap().kind, TableKind::Gpt);
}

#[test]
fn gpt_and_dos_of_parted() {
    need!("gpt_and_dos_of_parted", "parted", "sfdisk", "partx");
    let directory = empty_image(64);
    let script = ["-s", "image", "mklabel", "gpt", "mkpart", "root", "ext4", "1MiB", "20MiB"];
    run(
        &directory,
        "parted",
        &[&script[..], &["mkpart", "swap", "linux-swap", "20MiB", "100%"]].concat(),
        "",
    );
    assert_eq!(agreed(&directory).warnings, []);

    let script = "mklabel msdos mkpart primary fat32 1MiB 9MiB mkpart extended 9MiB 100% \
                  mkpart logical ext4 10MiB 20MiB mkpart logical ext4 21MiB 30MiB";
    let arguments: Vec<_> = ["-s", "image"].into_iter().chain(script.split_whitespace()).collect();
    run(&directory, "parted", &arguments, "");
    assert_eq!(agreed(&directory).warnings, []);
}

#[test]
fn eight_partitions_of_which_five_are_logical() {
    need!("eight_partitions_of_which_five_are_logical", "sfdisk", "partx");
    let directory = empty_image(64);
    let script = "label: dos\nlabel-id: 0x1a2b3c4d\n,4M\n,4M,82\n,8M,c,*\n,,E\n,4M\n,4M\n,4M\n,4M,fd\n,4M\n";
    run(&directory, "sfdisk", &["image"], script);
    let found = agreed(&directory);
    assert_eq!(found.warnings, []);
    let table = found.table.unwrap();
    assert_eq!(table.partitions.len(), 3 + 1 + 5);
    assert_eq!((table.partitions[3].number, table.partitions[3].size), (4, 1024));
    assert_eq!(table.uuid, "1a2b3c4d");
}

#[test]
fn dos_of_sfdisk_without_a_signature() {
    need!("dos_of_sfdisk_without_a_signature", "sfdisk", "partx");
    let directory = empty_image(64);
    run(&directory, "sfdisk", &["image"], "label: dos\nlabel-id: 0x00000000\n,4M\n");
    open(&directory).0.write_all_at(&[0; 4], 440).unwrap();
    assert_eq!(agreed(&directory).table.unwrap().partitions[0].uuid, "");
}

#[test]
fn sectors_of_4096_bytes() {
    need!("sectors_of_4096_bytes", "fdisk", "partx");
    let directory = empty_image(64);
    let script = "g\nn\n1\n\n+4M\nn\n\n\n\nx\nn\n1\nFüße\nr\nw\n";
    run(&directory, "fdisk", &["-b", "4096", "image"], script);
    assert_eq!(sector_size(&mut open(&directory)).unwrap(), Some(4096));
    let found = reading(&directory, 4096);
    assert_eq!(found.warnings, []);
    assert_eq!(ours(&found.table.unwrap()), rows_of_partx(&directory, 4096));
    let other = reading(&directory, 512);
    assert_eq!(other.table, None);
    assert_eq!(
        other.warnings.last(),
        Some(&Warning::OtherSectorSize { table: TableKind::Gpt, written: 4096, read: 512 })
    );

    // The backup alone.
    open(&directory).0.write_all_at(&[0; 4096], 4096).unwrap();
    assert_eq!(sector_size(&mut open(&directory)).unwrap(), Some(4096));
    let found = reading(&directory, 4096);
    assert_eq!(ours(&found.table.unwrap()), rows_of_partx(&directory, 4096));

    let directory = empty_image(64);
    run(&directory, "fdisk", &["-b", "4096", "image"], "o\nn\ne\n3\n\n\nn\n\n+4M\nn\n\n\nw\n");
    assert_eq!(sector_size(&mut open(&directory)).unwrap(), None);
    let table = reading(&directory, 4096).table.unwrap();
    assert_eq!(ours(&table), rows_of_partx(&directory, 4096));
    assert_eq!(table.partitions[0].size, 4096);
}

#[test]
fn a_damaged_primary_is_read_as_by_libblkid() {
    need!("a_damaged_primary_is_read_as_by_libblkid", "sfdisk", "partx");
    let directory = empty_image(64);
    run(&directory, "sfdisk", &["image"], "label: gpt\nsize=4M,name=one\nsize=8M\n");
    open(&directory).0.write_all_at(b"damage", 512 + 60).unwrap();
    let found = reading(&directory, 512);
    let table = found.table.unwrap();
    assert!(table.from_backup);
    assert_eq!(ours(&table), rows_of_partx(&directory, 512));

    open(&directory).0.write_all_at(&[0; 512], (64 << 20) - 512).unwrap();
    let found = reading(&directory, 512);
    assert_eq!((found.table, found.warnings.len()), (None, 2));
}

/// A directory with an ISO image, made with these arguments of xorriso.
fn iso(arguments: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("tree")).unwrap();
    std::fs::write(directory.path().join("tree/file"), vec![7; 100_000]).unwrap();
    std::fs::write(directory.path().join("tree/isolinux.bin"), vec![0; 4096]).unwrap();
    std::fs::write(directory.path().join("efi"), vec![0; 2 << 20]).unwrap();
    let common = ["-as", "mkisofs", "-quiet", "-o", "image", "-V", "TEST"];
    run(&directory, "xorriso", &[&common[..], arguments, &["tree"]].concat(), "");
    directory
}

#[test]
fn hybrid_isos_of_xorriso() {
    need!("hybrid_isos_of_xorriso", "xorriso", "sfdisk", "partx");
    let dos = agreed(&iso(&["-partition_offset", "16", "-append_partition", "2", "0xef", "efi"]));
    assert_eq!((dos.table.unwrap().partitions.len(), dos.warnings), (2, vec![]));

    let whole = agreed(&iso(&["--protective-msdos-label", "-append_partition", "2", "0xef", "efi"]));
    assert_eq!((whole.table.unwrap().kind, whole.warnings), (TableKind::Dos, vec![]));

    let gpt = agreed(&iso(&["-append_partition", "2", "0xef", "efi", "-appended_part_as_gpt"]));
    assert_eq!((gpt.table.unwrap().kind, gpt.warnings), (TableKind::Gpt, vec![]));
}

/// Like Debian's installer: the first partition is the whole image, the EFI partition is inside it, and there is a GPT
/// without an entry in the MBR.
#[test]
fn hybrid_iso_of_isolinux() {
    need!("hybrid_iso_of_isolinux", "xorriso", "sfdisk");
    let Some(template) = isohybrid_template() else {
        skipped("hybrid_iso_of_isolinux", "isolinux is not installed (isohdpfx.bin)");
        return;
    };
    let boot = ["-b", "isolinux.bin", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"];
    let efi = ["-eltorito-alt-boot", "-e", "file", "-no-emul-boot", "-isohybrid-gpt-basdat"];
    let directory = iso(&[&["-isohybrid-mbr", &template][..], &boot, &efi].concat());
    let found = reading(&directory, 512);
    let table = found.table.unwrap();
    assert_eq!(table.kind, TableKind::Dos);
    assert_eq!((table.partitions[0].start, table.partitions[0].size), (0, open(&directory).size()));
    assert_eq!(table.partitions[1].refusal, Some(Refusal::Overlaps(1)));
    assert_eq!(found.warnings, [Warning::UnprotectedGpt, Warning::Overlap { number: 2, other: 1 }]);
    assert_eq!(ours(&table), rows_of_partx(&directory, 512));
}

fn isohybrid_template() -> Option<String> {
    let path = std::env::var("ISOHDPFX").unwrap_or("/usr/lib/ISOLINUX/isohdpfx.bin".to_owned());
    Path::new(&path).exists().then_some(path)
}
