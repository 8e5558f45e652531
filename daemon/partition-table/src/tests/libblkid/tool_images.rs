//! Images made by the tools that are installed.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use super::generate::Case;
use crate::tests::commands::path_of;

/// A name, the tools that are needed, and the script that makes the file `image` from one of 4 MiB.
const SCRIPTS: [(&str, &[&str], &str); 22] = [
    ("sfdisk: GPT", &["sfdisk"], "echo 'label: gpt\n,1M\n,1M,U' | sfdisk -q image"),
    ("sfdisk: DOS", &["sfdisk"], "echo 'label: dos\n,1M\n,1M,82' | sfdisk -q image"),
    (
        "sfdisk: logical partitions",
        &["sfdisk"],
        "echo 'label: dos\n1M,512K\n,,E\n,256K\n,256K\n,256K' | sfdisk -q image",
    ),
    ("sfdisk: no partition", &["sfdisk"], "echo 'label: dos' | sfdisk -q image"),
    ("sgdisk: GPT", &["sgdisk"], "sgdisk -n 3:2048:4095 -n 7:0:0 image"),
    ("sgdisk: hybrid MBR", &["sgdisk"], "sgdisk -n 1:2048:4095 -n 2:0:0 -h 1:2:EE image"),
    ("sgdisk: hybrid MBR, protective last", &["sgdisk"], "sgdisk -n 1:2048:4095 -h 1 image"),
    ("sgdisk: a zapped GPT", &["sgdisk"], "sgdisk -n 1:2048:4095 image; sgdisk -z image"),
    ("parted: GPT", &["parted"], "parted -s image mklabel gpt mkpart a ext4 1MiB 2MiB"),
    ("parted: DOS", &["parted"], "parted -s image mklabel msdos mkpart primary ext4 1MiB 100%"),
    (
        "parted: logical partitions",
        &["parted"],
        "parted -s image mklabel msdos mkpart extended 1MiB 100% mkpart logical ext4 2MiB 3MiB",
    ),
    ("mkfs.vfat: no table", &["mkfs.vfat"], "mkfs.vfat --mbr=n image"),
    ("mkfs.vfat: a table over the volume", &["mkfs.vfat"], "mkfs.vfat --mbr=y image"),
    ("mkfs.vfat: FAT12", &["mkfs.vfat"], "mkfs.vfat -F 12 --mbr=y image"),
    ("mkfs.vfat: FAT32", &["mkfs.vfat"], "truncate -s 40M image; mkfs.vfat -F 32 --mbr=y image"),
    ("mkfs.vfat: large sectors", &["mkfs.vfat"], "mkfs.vfat -S 4096 --mbr=y image"),
    ("sfdisk after mkfs.vfat", &["mkfs.vfat", "sfdisk"], "mkfs.vfat image; echo 1M,1M | sfdisk -q image"),
    (
        "parted after mkfs.vfat",
        &["mkfs.vfat", "parted"],
        "mkfs.vfat image; parted -s image mklabel msdos mkpart primary fat32 1MiB 2MiB",
    ),
    ("mkfs.ext4", &["mkfs.ext4"], "mkfs.ext4 -q image"),
    (
        "mkfs.ext4 after sfdisk",
        &["mkfs.ext4", "sfdisk"],
        "echo 'label: dos\n,1M' | sfdisk -q image; mkfs.ext4 -qF image",
    ),
    (
        "xorriso: hybrid ISO",
        &["xorriso"],
        "mkdir t; cp image t/a; xorriso -as mkisofs -quiet -o image -partition_offset 16 t",
    ),
    (
        "xorriso: protective label",
        &["xorriso"],
        "mkdir t; cp image t/a; xorriso -as mkisofs -quiet -o image --protective-msdos-label t",
    ),
];

/// All images whose tools are installed.
pub fn all() -> Vec<Case> {
    let is_installed = |tools: &[&str]| tools.iter().all(|tool| path_of(tool).is_some());
    let scripts = SCRIPTS.iter().filter(|(_, tools, _)| is_installed(tools));
    scripts.map(|(name, _, script)| made(name, script)).collect()
}

fn made(name: &str, script: &str) -> Case {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(4 << 20).unwrap();
    let output = Command::new("sh")
        .args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; set -e; {script}")])
        .current_dir(directory.path())
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {errors}");
    Case { kind: name.to_owned(), block_size: 512, image: fs::read(&image).unwrap() }
}
