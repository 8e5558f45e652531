//! Partition tables.

use std::os::unix::fs::FileExt as _;

use anyhow::{Result, ensure};
use loopd_tests::Outcome;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup::Losetup;
use loopd_tests::process::needs;
use loopd_tests::sysfs::Extent;
use loopd_tests::table::{Gpt, Mbr};

use crate::row::{attached, file, loopctl, other, rows, warns};

rows! {
    "sector sizes":
        "a GPT of 4096-byte sectors" => large_sectors,
        "the same, with 512-byte blocks" => large_sectors_on_small_blocks,
        "an MBR that counts 4096-byte sectors" => dos_with_large_sectors,
        "a GPT of 4096-byte sectors behind a block device" => large_sectors_behind_a_device,
        "direct I/O on a disk of 4096-byte sectors" => direct_io_on_large_sectors;
    "truncated downloads":
        "a GPT image cut short" => cut_gpt,
        "a DOS image cut short" => cut_dos,
        "an ext4 image cut short" => cut_ext4,
        "a squashfs cut short" => cut_squashfs,
        "a table whose partitions are all cut off" => nothing_left;
    "damaged tables":
        "a byte of the primary GPT changed" => damaged_gpt,
        "partitions that overlap" => overlapping;
    "one thing shown twice":
        "a FAT superfloppy whose boot sector reads as a table" => superfloppy,
        "mkfs.fat --mbr" => superfloppy_of_mkfs,
        "an NTFS boot sector with an entry over the disk" => ntfs_with_an_entry,
        "a FAT image that was partitioned afterwards" => partitioned_fat;
}

/// A disk of 16 MiB with a GPT in sectors of 4096 bytes.
fn disk_with_large_sectors(fixture: &Fixture) -> Result<Image> {
    let image = file(fixture, "image", 16 * MIB, &[])?;
    Gpt::new(&[(1024, 2047)]).with_sector_size(4096).write(&image)?;
    Ok(image)
}

async fn large_sectors(fixture: &mut Fixture) -> Outcome {
    let image = disk_with_large_sectors(fixture)?;
    attached(fixture, &[image.name()], async |device, printed| {
        printed.is_silent()?;
        ensure!(device.number::<u32>("queue/logical_block_size")? == 4096, "another block size");
        ensure!(device.partition_nodes() == [1].into(), "{:?}", device.partition_nodes());
        Ok(())
    })
    .await
}

async fn large_sectors_on_small_blocks(fixture: &mut Fixture) -> Outcome {
    let image = disk_with_large_sectors(fixture)?;
    warns(fixture, &["-b", "512", image.name()], "sectors of 4096 bytes and the device has 512").await
}

async fn dos_with_large_sectors(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 24 * MIB, &[])?;
    // In sectors of 4096 bytes it starts at 1 MiB, and has an ext4.
    Mbr::new(&[(0x83, 256, 4096)]).write(&image, 0)?;
    image.add_ext4(Extent { start: MIB, size: 16 * MIB }, "data", UUID).await?;
    let printed = loopctl(fixture, &["attach", image.name()]).await?;
    let device = printed.device()?;
    let size = device.number::<u32>("queue/logical_block_size")?;
    loopctl(fixture, &["detach", &device.node()]).await?;
    if size == 4096 { printed.is_silent() } else { printed.warns_of("sectors of 4096 bytes") }
}

const UUID: &str = "11111111-2222-3333-4444-0000000000f1";

async fn direct_io_on_large_sectors(fixture: &mut Fixture) -> Outcome {
    let lower = file(fixture, "lower", 32 * MIB, &[])?;
    let device = loopctl(fixture, &["attach", "-b", "4096", lower.name()]).await?.device()?;
    other("mkfs.ext4", &["-q", &device.node()]).await?;
    let mounted = Mounted::new(device, &fixture.directory, "mounted").await?;
    let image = Image::sparse(&mounted.directory, "image", MIB)?;
    attached(fixture, &["--direct-io", image.name()], async |device, printed| {
        printed.is_silent()?;
        ensure!(device.flag("loop/dio")?, "no direct I/O");
        ensure!(device.number::<u32>("queue/logical_block_size")? == 4096, "another block size");
        Ok(())
    })
    .await?;
    loopctl(fixture, &["attach", "--direct-io", "-b", "512", image.name()])
        .await?
        .fails_with("block size of 4096")?;
    drop(image);
    mounted.unmount().await?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn cut_gpt(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Gpt::new(&[(2048, 4095), (8192, 12_287)]).write(&image)?;
    image.open()?.set_len(3 * MIB)?;
    warns(fixture, &[image.name()], "5242880 bytes are missing at the end").await
}

async fn cut_dos(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Mbr::new(&[(0x83, 2048, 2048), (0x83, 8192, 8192)]).write(&image, 0)?;
    image.open()?.set_len(5 * MIB)?;
    warns(fixture, &[image.name()], "3145728 bytes are missing at the end").await
}

async fn cut_ext4(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    image.open()?.set_len(10 * MIB)?;
    warns(fixture, &[image.name()], "6291456 bytes are missing at the end").await
}

async fn nothing_left(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Gpt::new(&[(2048, 4095)]).write(&image)?;
    image.open()?.set_len(512 * 40)?;
    attached(fixture, &[image.name()], async |device, printed| {
        ensure!(device.partition_nodes().is_empty(), "{:?}", device.partition_nodes());
        printed.warns_of("8368128 bytes are missing at the end")
    })
    .await
}

async fn damaged_gpt(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Gpt::new(&[(2048, 4095)]).write(&image)?;
    image.open()?.write_all_at(b"x", Gpt::ENTRIES + 60)?;
    warns(fixture, &[image.name()], "the partition table is damaged").await
}

async fn overlapping(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Mbr::new(&[(0x83, 2048, 4096), (0x83, 4096, 4096)]).write(&image, 0)?;
    attached(fixture, &[image.name()], async |device, printed| {
        if device.partition_nodes().len() == 2 {
            printed.is_silent()
        } else {
            printed.warns_of("overlaps partition 1")
        }
    })
    .await
}

async fn superfloppy(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.vfat")?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.vfat", &[image.name()]).await?;
    // An entry over the whole disk, in the boot code.
    let entry = [0x80, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0];
    image.open()?.write_all_at(&entry, 446)?;
    is_one_volume(fixture, &image, "vfat").await
}

async fn large_sectors_behind_a_device(fixture: &mut Fixture) -> Outcome {
    let image = disk_with_large_sectors(fixture)?;
    let lower = Losetup::new(&["-b", "512"], &image).await?;
    let node = lower.device.node();
    let printed = loopctl(fixture, &["attach", &node]).await?;
    let device = printed.device()?;
    let size = device.number::<u32>("queue/logical_block_size")?;
    loopctl(fixture, &["detach", &device.node()]).await?;
    if size == 4096 { printed.is_silent() } else { printed.warns_of("sectors of 4096 bytes") }
}

async fn cut_squashfs(fixture: &mut Fixture) -> Outcome {
    let size = (2 * MIB).to_le_bytes();
    let contents: &[(u64, &[u8])] = &[(0, b"hsqs"), (28, b"\x04\0"), (40, &size)];
    let image = file(fixture, "image", MIB, contents)?;
    warns(fixture, &["-r", image.name()], "1048576 bytes are missing at the end").await
}

async fn is_one_volume(fixture: &Fixture, image: &Image, kind: &str) -> Outcome {
    attached(fixture, &[image.name()], async |device, _| {
        ensure!(device.partition_nodes().is_empty(), "a partition beside the volume");
        let listed = loopctl(fixture, &["list", "-o", "device,type"]).await?;
        ensure!(listed.output.matches(kind).count() == 1, "{}", listed.output);
        Ok(())
    })
    .await
}

async fn superfloppy_of_mkfs(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.vfat")?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.vfat", &["--mbr=y", image.name()]).await?;
    is_one_volume(fixture, &image, "vfat").await
}

async fn ntfs_with_an_entry(fixture: &mut Fixture) -> Outcome {
    let entry = [0x80, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0];
    let contents: &[(u64, &[u8])] =
        &[(0, b"\xeb\x52\x90NTFS    \0\x02\x08\0\0\0\0\0\0\0\xf8\0\0"), (446, &entry), (510, b"\x55\xaa")];
    let image = file(fixture, "image", 16 * MIB, contents)?;
    attached(fixture, &[image.name()], async |device, _| {
        ensure!(device.partition_nodes().is_empty(), "a partition beside the volume");
        Ok(())
    })
    .await
}

/// sfdisk keeps the other bytes of the boot sector.
async fn partitioned_fat(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.vfat")?;
    needs("sfdisk")?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.vfat", &[image.name()]).await?;
    let script = format!("echo '2048,8192,83' | sfdisk -q --wipe never --label dos '{}'", image.name());
    other("sh", &["-c", &script]).await?;
    attached(fixture, &[image.name()], async |device, _| {
        ensure!(device.partition_nodes() == [1].into(), "{:?}", device.partition_nodes());
        Ok(())
    })
    .await
}
