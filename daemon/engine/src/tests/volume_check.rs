//! The file system of a volume is checked again before it is mounted.

use loopd_common::Lifetime;

use super::harness::{Client, Harness};
use super::mount::whole;
use crate::kernel::FileSystem;
use crate::simulated::SimulatedFile;
use crate::{AttachRequest, Error, MountRequest};

/// The superblock of an ext2.
const EXT: (usize, &[u8]) = (1024 + 0x38, b"\x53\xef");

/// Mounts a device with these bytes, in which udev has found `known`. Returns the file system that is shown then.
async fn mounted(known: &str, contents: &[(usize, &[u8])]) -> Result<String, Error> {
    let harness = Harness::with_udev();
    let usage = if known.is_empty() { "" } else { "filesystem" };
    harness.machine.set_file_system(FileSystem {
        usage: usage.to_owned(),
        kind: known.to_owned(),
        ..FileSystem::default()
    });
    let mut image = vec![0; 0x1_1000];
    for (offset, bytes) in contents {
        image[*offset..*offset + bytes.len()].copy_from_slice(bytes);
    }
    harness.machine.set_contents(image);
    let client = Client::new(":1.1", 7);
    let file = SimulatedFile { size: 4 << 20, ..1.into() };
    let request = AttachRequest { lifetime: Lifetime::Persistent, ..AttachRequest::default() };
    let attachment = harness.engine.attach(file, request, &client).await.unwrap();
    let mounted = harness.engine.mount(whole(&attachment), &MountRequest::default(), &client).await;
    let shown = harness.engine.find(attachment.id).unwrap();
    harness.agree_after_flush().await;
    if mounted.is_ok() {
        harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    }
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
    mounted.map(|_| shown.file_system.kind)
}

#[tokio::test(start_paused = true)]
async fn a_fat32_with_an_old_ext_superblock_stays_vfat() {
    // A boot sector without the name of its type, which FAT does not need.
    let fat32 = [(0, &b"\xeb\x58\x90"[..]), (510, b"\x55\xaa"), EXT];
    assert_eq!(mounted("vfat", &fat32).await.unwrap(), "vfat");
    let named = [(0, &b"\xeb\x58\x90"[..]), (0x52, b"FAT32   "), (510, b"\x55\xaa"), EXT];
    assert_eq!(mounted("vfat", &named).await.unwrap(), "vfat");
}

#[tokio::test(start_paused = true)]
async fn a_udf_with_an_old_ext_superblock_stays_udf() {
    assert_eq!(mounted("udf", &[EXT]).await.unwrap(), "udf");
}

#[tokio::test(start_paused = true)]
async fn a_file_system_made_after_udev_looked_is_mounted() {
    assert_eq!(mounted("", &[EXT]).await.unwrap(), "ext2");
    assert_eq!(mounted("vfat", &[EXT]).await.unwrap(), "ext2", "its boot sector is gone");
    assert_eq!(mounted("xfs", &[EXT]).await.unwrap(), "ext2");
}

#[tokio::test(start_paused = true)]
async fn several_signatures_are_an_error_if_the_known_one_is_gone() {
    let several = [(0, &b"XFSB"[..]), EXT];
    for known in ["", "squashfs"] {
        let error = mounted(known, &several).await.unwrap_err();
        assert!(error.to_string().contains("several file systems (xfs, ext2)"), "{error}");
    }
    assert_eq!(mounted("xfs", &several).await.unwrap(), "xfs");
}
