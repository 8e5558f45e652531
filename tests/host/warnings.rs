//! Warnings: what is unusual about an image, in the property for programs and on standard error for people.

use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::{AttachOptions, Lifetime, Warning};
use loopd_tests::Outcome;
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::table::{Gpt, Mbr};

loopd_tests::tests! {
    "warnings";
    Setup::None => [
        sound_image_has_none,
        unreachable_tail_is_named_by_every_command,
        unpadded_squashfs_has_a_tail_and_is_whole,
        truncated_file_system_is_named,
        truncated_gpt_is_named,
        truncated_dos_table_is_named,
        compressed_images_are_named,
        images_of_virtual_machines_are_named,
        images_of_other_systems_are_named,
        other_sector_size_is_named_and_corrected_by_set,
        damaged_table_is_named,
        overlapping_partition_is_named,
        warnings_survive_a_restart,
        warnings_follow_the_size,
        warnings_follow_the_file,
        mount_and_run_print_warnings,
        part_of_a_file_is_judged_alone,
    ];
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

async fn warnings(fixture: &Fixture, attached: &Attached) -> Result<Vec<Warning>> {
    Ok(fixture.properties(&attached.path).await?.warnings.0)
}

/// The warnings of an image's attachment, which ends.
async fn found(fixture: &Fixture, image: &Image, options: &AttachOptions) -> Result<Vec<Warning>> {
    let attached = fixture.attach(&image.open()?, options).await?;
    let found = warnings(fixture, &attached).await?;
    fixture.detach(&attached).await?;
    Ok(found)
}

/// The only warning, which has this code.
fn only<'a>(warnings: &'a [Warning], code: &str) -> Result<&'a Warning> {
    let [warning] = warnings else { anyhow::bail!("not one: {warnings:?}") };
    ensure!(warning.code == code, "{warning:?}");
    ensure!(!warning.message.is_empty() && !warning.message.contains("loopctl"), "{warning:?}");
    Ok(warning)
}

/// An image with these bytes at the start, long enough for any reader.
fn starting_with(fixture: &Fixture, name: &str, offset: u64, bytes: &[u8]) -> Result<Image> {
    let image = Image::sparse(&fixture.directory, name, MIB)?;
    image.open()?.write_all_at(bytes, offset)?;
    Ok(image)
}

/// The device that a command has printed, and its messages.
fn attached(output: &Output) -> Result<(LoopDevice, String)> {
    ensure!(output.status.success(), "{output:?}");
    let node = std::str::from_utf8(&output.stdout)?;
    Ok((LoopDevice::from_node(node.trim_end())?, String::from_utf8(output.stderr.clone())?))
}

async fn sound_image_has_none(fixture: &mut Fixture) -> Outcome {
    let file_system = Image::ext4(&fixture.directory, "ext4", "data", UUID).await?;
    let table = Image::sparse(&fixture.directory, "gpt", 4 * MIB)?;
    Gpt::new(&[(2048, 4095)]).write(&table)?;
    let zeros = Image::sparse(&fixture.directory, "zeros", MIB)?;
    for image in [&file_system, &table, &zeros] {
        assert_eq!(found(fixture, image, &persistent()).await?, []);
        let (device, messages) = attached(&fixture.loopctl(["attach", image.name()]).await?)?;
        assert_eq!(messages, "", "{}", image.name());
        assert!(!info(fixture, device).await?.contains("Warning"));
        detach(fixture, device).await?;
    }
    Ok(())
}

const UUID: &str = "11111111-2222-3333-4444-0000000000a0";

async fn info(fixture: &Fixture, device: LoopDevice) -> Result<String> {
    let output = fixture.loopctl(["info", &device.node()]).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

async fn detach(fixture: &Fixture, device: LoopDevice) -> Outcome {
    let output = fixture.loopctl(["detach", &device.node()]).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

async fn unreachable_tail_is_named_by_every_command(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 1_000_001)?;
    let sentence = "the last 65 bytes cannot be reached";
    let (device, messages) = attached(&fixture.loopctl(["attach", image.name()]).await?)?;
    assert_eq!(messages.matches(sentence).count(), 1, "{messages}");
    assert!(messages.starts_with("loopctl: warning: "), "{messages}");
    assert_eq!(device.number::<u64>("size")?, 1953);
    assert_eq!(info(fixture, device).await?.matches(sentence).count(), 1);
    let json = fixture.loopctl(["info", &device.node(), "--json"]).await?;
    let json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
    let warning = &json["warnings"][0];
    assert_eq!((warning["code"].as_str(), warning["bytes"].as_u64()), (Some("unreachable-tail"), Some(65)));
    assert!(warning["message"].as_str().context("no message")?.contains(sentence));
    detach(fixture, device).await?;
    let output = fixture.loopctl(["attach", "--json", image.name()]).await?;
    assert!(String::from_utf8(output.stderr.clone())?.contains(sentence), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(json["warnings"][0]["bytes"], 65);
    detach(fixture, LoopDevice::from_node(json["device"].as_str().context("no device")?)?).await?;
    // losetup prints its own message, once.
    let (device, messages) = attached(&fixture.loopctl(["losetup", "-f", "--show", image.name()]).await?)?;
    assert_eq!(messages.lines().count(), 1, "{messages}");
    assert_eq!(messages.matches(sentence).count(), 1, "{messages}");
    detach(fixture, device).await
}

/// mksquashfs with `-nopad` ends anywhere. A superblock is enough: loopd reads nothing else.
async fn unpadded_squashfs_has_a_tail_and_is_whole(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 188_393)?;
    let mut superblock = [0; 96];
    superblock[..4].copy_from_slice(b"hsqs");
    superblock[28..30].copy_from_slice(&4_u16.to_le_bytes());
    superblock[40..48].copy_from_slice(&188_393_u64.to_le_bytes());
    image.open()?.write_all_at(&superblock, 0)?;
    let all = found(fixture, &image, &persistent()).await?;
    assert_eq!(only(&all, "unreachable-tail")?.bytes, Some(188_393 % 512));
    image.open()?.set_len(100_000)?;
    let all = found(fixture, &image, &persistent()).await?;
    let codes: Vec<&str> = all.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(codes, ["truncated", "unreachable-tail"]);
    assert_eq!(all[0].bytes, Some(88_393));
    Ok(())
}

async fn truncated_file_system_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    image.open()?.set_len(10 * MIB)?;
    let all = found(fixture, &image, &persistent()).await?;
    let warning = only(&all, "truncated")?;
    assert_eq!(warning.bytes, Some(6 * MIB));
    assert!(warning.message.contains("6291456 bytes are missing"), "{warning:?}");
    let (device, messages) = attached(&fixture.loopctl(["attach", image.name()]).await?)?;
    assert!(messages.contains("6291456 bytes are missing"), "{messages}");
    detach(fixture, device).await?;
    let (device, messages) = attached(&fixture.loopctl(["losetup", "-f", "--show", image.name()]).await?)?;
    assert!(messages.contains("Warning: 6291456 bytes are missing"), "{messages}");
    detach(fixture, device).await
}

async fn truncated_gpt_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 8 * MIB)?;
    Gpt::new(&[(2048, 4095), (8192, 12_287)]).write(&image)?;
    image.open()?.set_len(3 * MIB)?;
    let all = found(fixture, &image, &persistent()).await?;
    let truncated = all.iter().find(|warning| warning.code == "truncated").context("not named")?;
    assert_eq!(truncated.bytes, Some(5 * MIB), "{all:?}");
    assert!(!all.iter().any(|warning| warning.code == "table-damaged"), "the same twice: {all:?}");
    // So short that no partition is left.
    image.open()?.set_len(512 * 40)?;
    let all = found(fixture, &image, &persistent()).await?;
    let truncated = all.iter().find(|warning| warning.code == "truncated").context("not named")?;
    assert_eq!(truncated.bytes, Some(8 * MIB - 512 * 40), "{all:?}");
    Ok(())
}

async fn truncated_dos_table_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 8 * MIB)?;
    Mbr::new(&[(0x83, 2048, 2048), (0x83, 8192, 8192)]).write(&image, 0)?;
    image.open()?.set_len(5 * MIB)?;
    let all = found(fixture, &image, &persistent()).await?;
    assert_eq!(only(&all, "truncated")?.bytes, Some(3 * MIB), "{all:?}");
    Ok(())
}

async fn compressed_images_are_named(fixture: &mut Fixture) -> Outcome {
    let raw = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    for (tool, suffix, format) in
        [("gzip", "gz", "gzip"), ("xz", "xz", "xz"), ("bzip2", "bz2", "bzip2"), ("zstd", "zst", "zstd")]
    {
        if run(tool, ["--version"]).await.is_err() {
            println!("SKIPPED: {format}: there is no {tool}");
            continue;
        }
        run(tool, ["-k", "-q", raw.name()]).await?;
        let image = Image { path: format!("{}.{suffix}", raw.name()).into() };
        let all = found(fixture, &image, &persistent()).await?;
        let warning = &all[0];
        assert_eq!((warning.code.as_str(), warning.format.as_deref()), ("not-raw", Some(format)), "{all:?}");
        assert!(warning.message.contains("decompress"), "{warning:?}");
        let (device, messages) = attached(&fixture.loopctl(["attach", image.name()]).await?)?;
        assert!(messages.contains(&format!("{format}-compressed file")), "{messages}");
        detach(fixture, device).await?;
    }
    Ok(())
}

async fn not_raw(fixture: &Fixture, samples: &[(&str, u64, &[u8])]) -> Outcome {
    for (format, offset, bytes) in samples {
        let image = starting_with(fixture, format, *offset, bytes)?;
        let all = found(fixture, &image, &persistent()).await?;
        assert_eq!(only(&all, "not-raw")?.format.as_deref(), Some(*format));
    }
    Ok(())
}

async fn images_of_virtual_machines_are_named(fixture: &mut Fixture) -> Outcome {
    not_raw(
        fixture,
        &[
            ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
            ("vmdk", 0, b"KDMV\x01\0\0\0"),
            ("vmdk-descriptor", 0, b"# Disk DescriptorFile\n"),
            ("vhd", 0, b"conectix"),
            ("vhdx", 0, b"vhdxfile"),
            ("vdi", 64, b"\x7f\x10\xda\xbe"),
        ],
    )
    .await
}

async fn images_of_other_systems_are_named(fixture: &mut Fixture) -> Outcome {
    not_raw(
        fixture,
        &[
            ("android-sparse", 0, b"\x3a\xff\x26\xed\x01\0\0\0"),
            ("cd-sectors", 0, b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\x02\0\x01"),
            ("dmg", MIB - 512, b"koly\0\0\0\x04\0\0\x02\0"),
            ("zip", 0, b"PK\x03\x04"),
        ],
    )
    .await
}

/// A table in sectors of 4096 bytes on a device with 512: `loopctl set` corrects that while it is attached.
async fn other_sector_size_is_named_and_corrected_by_set(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    Gpt::new(&[(1024, 2047)]).with_sector_size(4096).write(&image)?;
    let options = AttachOptions { block_size: 512, ..persistent() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    let all = warnings(fixture, &attached).await?;
    assert_eq!(only(&all, "sector-size")?.number, Some(4096));
    let output = fixture.loopctl(["set", &attached.device.node(), "-b", "4096"]).await?;
    ensure!(output.status.success(), "{output:?}");
    assert_eq!(warnings(fixture, &attached).await?, []);
    fixture.detach(&attached).await
}

async fn damaged_table_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 8 * MIB)?;
    Gpt::new(&[(2048, 4095)]).write(&image)?;
    // A byte of the primary's entries.
    image.open()?.write_all_at(b"x", Gpt::ENTRIES + 60)?;
    let all = found(fixture, &image, &persistent()).await?;
    let warning = all.first().context("not named")?;
    assert_eq!(warning.code, "table-damaged", "{all:?}");
    assert!(warning.message.contains("primary"), "{warning:?}");
    Ok(())
}

async fn overlapping_partition_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 8 * MIB)?;
    Mbr::new(&[(0x83, 2048, 4096), (0x83, 4096, 4096)]).write(&image, 0)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let nodes = attached.device.partition_nodes();
    let all = warnings(fixture, &attached).await?;
    if nodes.len() == 2 {
        assert_eq!(all, [], "this kernel makes overlapping partitions");
    } else {
        assert_eq!(only(&all, "partition-not-made")?.number, Some(2));
    }
    // Without partition scan none is missing.
    fixture.detach(&attached).await?;
    let options = AttachOptions { partition_scan: false, ..persistent() };
    assert_eq!(found(fixture, &image, &options).await?, []);
    Ok(())
}

async fn warnings_survive_a_restart(fixture: &mut Fixture) -> Outcome {
    let tail = Image::sparse(&fixture.directory, "tail", 1_000_001)?;
    let cut = Image::ext4(&fixture.directory, "cut", "data", UUID).await?;
    cut.open()?.set_len(10 * MIB)?;
    let xz = starting_with(fixture, "xz", 0, b"\xfd7zXZ\0\0\x04")?;
    let mut before = Vec::new();
    for image in [&tail, &cut, &xz] {
        let attached = fixture.attach(&image.open()?, &persistent()).await?;
        let found = warnings(fixture, &attached).await?;
        assert_eq!(found.len(), 1, "{found:?}");
        before.push((attached, found));
    }
    fixture.restart_daemon(&[]).await?;
    for (attached, found) in &before {
        assert_eq!(warnings(fixture, attached).await?, *found);
    }
    for (attached, _) in &before {
        fixture.detach(attached).await?;
    }
    Ok(())
}

async fn warnings_follow_the_size(fixture: &mut Fixture) -> Outcome {
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    image.open()?.set_len(10 * MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_eq!(only(&warnings(fixture, &attached).await?, "truncated")?.bytes, Some(6 * MIB));
    let object = fixture.object(&attached.path).await?;
    for (size, missing) in [(12 * MIB, Some(4 * MIB)), (16 * MIB, None), (10 * MIB, Some(6 * MIB))] {
        image.open()?.set_len(size)?;
        object.set_capacity().await?;
        let all = warnings(fixture, &attached).await?;
        assert_eq!(all.first().and_then(|warning| warning.bytes), missing, "{all:?}");
    }
    fixture.detach(&attached).await
}

async fn warnings_follow_the_file(fixture: &mut Fixture) -> Outcome {
    let zeros = Image::sparse(&fixture.directory, "zeros", MIB)?;
    let xz = starting_with(fixture, "xz", 0, b"\xfd7zXZ\0\0\x04")?;
    let options = AttachOptions { read_only: true, ..persistent() };
    let attached = fixture.attach(&zeros.open()?, &options).await?;
    assert_eq!(warnings(fixture, &attached).await?, []);
    let object = fixture.object(&attached.path).await?;
    object.replace_backing_file(xz.open()?.as_fd()).await?;
    let all = warnings(fixture, &attached).await?;
    assert_eq!(only(&all, "not-raw")?.format.as_deref(), Some("xz"));
    object.replace_backing_file(zeros.open()?.as_fd()).await?;
    assert_eq!(warnings(fixture, &attached).await?, []);
    fixture.detach(&attached).await
}

async fn mount_and_run_print_warnings(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 1_000_001)?;
    let output = fixture.loopctl(["run", image.name(), "--", "true"]).await?;
    ensure!(output.status.success(), "{output:?}");
    assert!(String::from_utf8(output.stderr)?.contains("the last 65 bytes cannot be reached"));
    // The warning gives the reason before the error of a mount that fails.
    let xz = starting_with(fixture, "xz", 0, b"\xfd7zXZ\0\0\x04")?;
    let output = fixture.loopctl(["mount", xz.name()]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let messages = String::from_utf8(output.stderr)?;
    assert!(messages.contains("an xz-compressed file"), "{messages}");
    fixture.assert_no_leak().await
}

/// Bytes before the offset and after the limit do not belong to the device.
async fn part_of_a_file_is_judged_alone(fixture: &mut Fixture) -> Outcome {
    let image = starting_with(fixture, "image", 0, b"\xfd7zXZ\0\0\x04")?;
    let after_offset = AttachOptions { offset: 1000, ..persistent() };
    let all = found(fixture, &image, &after_offset).await?;
    assert_eq!(only(&all, "unreachable-tail")?.bytes, Some((MIB - 1000) % 512));
    let limited = AttachOptions { size_limit: 1000, ..persistent() };
    let all = found(fixture, &image, &limited).await?;
    let codes: Vec<&str> = all.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(codes, ["not-raw", "unreachable-tail"]);
    Ok(())
}
