//! A mount finds what the file contains at that time: file systems made in the file while it is attached, and images
//! with several signatures.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::{AttachOptions, Lifetime};
use loopd_tests::fixture::Fixture;
use loopd_tests::host;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::run;
use loopd_tests::sysfs::Extent;
use loopd_tests::table::Gpt;
use loopd_tests::units::Units;
use loopd_tests::{GAMES, Outcome, ROOT, User};

loopd_tests::tests! {
    "mount_contents";
    Setup::None => [
        file_system_made_behind_the_device_is_mounted,
        file_system_made_behind_a_partition_is_mounted,
        file_system_that_was_replaced_behind_the_device_is_mounted,
        several_signatures_are_named_and_one_can_be_chosen,
        file_system_is_mounted_without_udev,
        half_of_a_mirror_can_be_read,
        copy_of_a_mounted_xfs_is_explained,
        btrfs_over_two_images_of_root_is_mounted,
        btrfs_with_a_log_on_a_read_only_device_is_explained,
    ];
    Setup::StandIn(Answer::Yes) => [btrfs_over_two_images_of_a_user_is_mounted];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000d1";

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

/// Mounts with loopctl; its standard output, or its message.
async fn mount(fixture: &Fixture, arguments: &[&str]) -> Result<std::result::Result<PathBuf, String>> {
    let output = fixture.loopctl([&["mount"], arguments].concat()).await?;
    if output.status.success() {
        return Ok(Ok(String::from_utf8(output.stdout)?.trim_end_matches('\n').into()));
    }
    ensure!(output.stdout.is_empty(), "{output:?}");
    Ok(Err(String::from_utf8(output.stderr)?))
}

async fn unmount(fixture: &Fixture, target: &str) -> Outcome {
    let output = fixture.loopctl(["unmount", target]).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

async fn file_system_made_behind_the_device_is_mounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    for read_only in [false, true] {
        let image = Image::sparse(&fixture.directory, format!("image-{read_only}"), 16 * MIB)?;
        let attached = fixture.attach(&image.open()?, &AttachOptions { read_only, ..persistent() }).await?;
        // The device has its first pages in its cache.
        run("dd", [&format!("if={}", attached.device.node()), "of=/dev/null", "bs=1M", "status=none"])
            .await?;
        let message = mount(fixture, &[&attached.device.node()]).await?.unwrap_err();
        assert!(message.contains("there is no file system in it"), "{message}");
        run("mkfs.ext4", ["-q", "-F", "-L", "new", image.name()]).await?;
        let point = mount(fixture, &[&attached.device.node()]).await?.map_err(anyhow::Error::msg)?;
        assert!(point.join("lost+found").exists(), "{point:?}");
        assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, "ext4");
        unmount(fixture, &attached.device.node()).await?;
        fixture.detach(&attached).await?;
    }
    fixture.assert_no_leak().await
}

async fn file_system_made_behind_a_partition_is_mounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::sparse(&fixture.directory, "image", 24 * MIB)?;
    Gpt::new(&[(2048, 40_959)]).write(&image)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let message = mount(fixture, &["-p", "1", image.name()]).await?.unwrap_err();
    assert!(message.contains("there is no file system in it"), "{message}");
    image.add_ext4(Extent { start: MIB, size: 18 * MIB }, "new", UUID).await?;
    let point = mount(fixture, &["-p", "1", image.name()]).await?.map_err(anyhow::Error::msg)?;
    assert!(point.join("lost+found").exists());
    let (_, volume) = fixture.partitions(&attached).await?.remove(&1).context("no partition")?;
    assert_eq!(volume.filesystem_type, "ext4");
    unmount(fixture, &attached.device.node()).await?;
    fixture.detach(&attached).await
}

async fn file_system_that_was_replaced_behind_the_device_is_mounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "image", "old", UUID).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, "ext4");
    run("mkfs.ext2", ["-q", "-F", "-L", "new", image.name()]).await?;
    mount(fixture, &[image.name()]).await?.map_err(anyhow::Error::msg)?;
    assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, "ext2");
    unmount(fixture, &attached.device.node()).await?;
    fixture.detach(&attached).await
}

async fn several_signatures_are_named_and_one_can_be_chosen(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    // What is left of a CD image; libblkid calls this ambivalent and names neither.
    image.open()?.write_all_at(b"EXFAT   ", 3)?;
    image.open()?.write_all_at(b"JFS1", 0x8000)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, "");
    let message = mount(fixture, &[image.name()]).await?.unwrap_err();
    assert!(message.contains("several file systems (exfat, jfs, ext4)"), "{message}");
    mount(fixture, &["-t", "ext4", image.name()]).await?.map_err(anyhow::Error::msg)?;
    unmount(fixture, &attached.device.node()).await?;
    fixture.detach(&attached).await
}

async fn file_system_is_mounted_without_udev(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    host::get()?.udev.kill()?;
    let mounted = mount(fixture, &[image.name()]).await;
    host::get()?.udev.start()?;
    let point = mounted?.map_err(anyhow::Error::msg)?;
    assert!(point.join("lost+found").exists());
    unmount(fixture, image.name()).await?;
    fixture.assert_no_leak().await
}

/// The metadata of a mirror of version 1.0 lies at the end, so each half has its file system at the start.
async fn half_of_a_mirror_can_be_read(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4_sized(&fixture.directory, "image", "data", UUID, 16 * MIB).await?;
    image.open()?.set_len(17 * MIB)?;
    image.add_mirror_superblock()?;
    let attached = fixture.attach(&image.open()?, &AttachOptions { read_only: true, ..persistent() }).await?;
    assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, "linux_raid_member");
    let message = mount(fixture, &["-r", image.name()]).await?.unwrap_err();
    assert!(message.contains("one half of a mirror") && message.contains("read-only"), "{message}");
    let point = mount(fixture, &["-r", "-t", "ext4", image.name()]).await?.map_err(anyhow::Error::msg)?;
    assert!(point.join("lost+found").exists());
    unmount(fixture, &attached.device.node()).await?;
    fixture.detach(&attached).await?;
    // A writable mount would make this half differ from the other.
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let message = mount(fixture, &["-t", "ext4", image.name()]).await?.unwrap_err();
    assert!(message.contains("member of a RAID"), "{message}");
    fixture.detach(&attached).await
}

async fn copy_of_a_mounted_xfs_is_explained(fixture: &mut Fixture) -> Outcome {
    loopd_tests::process::needs("mkfs.xfs")?;
    loopd_tests::process::needs_file_system("xfs")?;
    let _units = Units::start(fixture.bus()).await?;
    let first = Image::sparse(&fixture.directory, "first", 320 * MIB)?;
    run("mkfs.xfs", ["-q", first.name()]).await?;
    let copy = fixture.directory.join("copy");
    run("cp", ["--sparse=always".as_ref(), first.path.as_os_str(), copy.as_os_str()]).await?;
    let copy = copy.to_str().context("no text")?;
    mount(fixture, &[first.name()]).await?.map_err(anyhow::Error::msg)?;
    let message = mount(fixture, &[copy]).await?.unwrap_err();
    assert!(message.contains("nouuid"), "{message}");
    mount(fixture, &["--options", "nouuid", copy]).await?.map_err(anyhow::Error::msg)?;
    unmount(fixture, copy).await?;
    // A throwaway view is a copy, too.
    let view = mount(fixture, &["--throwaway", "--yes", first.name()]).await?.map_err(anyhow::Error::msg)?;
    unmount(fixture, view.to_str().context("no text")?).await?;
    unmount(fixture, first.name()).await?;
    fixture.assert_no_leak().await
}

async fn btrfs_over_two_images_of_root_is_mounted(fixture: &mut Fixture) -> Outcome {
    btrfs_over_two_images(fixture, ROOT).await
}

async fn btrfs_over_two_images_of_a_user_is_mounted(fixture: &mut Fixture) -> Outcome {
    btrfs_over_two_images(fixture, GAMES).await
}

async fn btrfs_over_two_images(fixture: &Fixture, user: User) -> Outcome {
    loopd_tests::process::needs("mkfs.btrfs")?;
    loopd_tests::process::needs_file_system("btrfs")?;
    let _units = Units::start(fixture.bus()).await?;
    let images = [
        Image::sparse(&fixture.directory, "first", 128 * MIB)?,
        Image::sparse(&fixture.directory, "second", 128 * MIB)?,
    ];
    run("mkfs.btrfs", ["-q", "-d", "raid1", "-m", "raid1", images[0].name(), images[1].name()]).await?;
    let mut devices = Vec::new();
    for image in &images {
        let output = fixture.loopctl_as(user, ["attach", image.name()]).await?;
        ensure!(output.status.success(), "{output:?}");
        devices.push(String::from_utf8(output.stdout)?.trim_end().to_owned());
    }
    let output = fixture.loopctl_as(user, ["mount", &devices[0]]).await?;
    ensure!(output.status.success(), "{output:?}");
    let point = String::from_utf8(output.stdout)?.trim_end().to_owned();
    for device in &devices {
        let output = fixture.loopctl_as(user, ["info", "--json", device]).await?;
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(shown["mount_points"], serde_json::json!([point]), "{device}");
        let output = fixture.loopctl_as(user, ["detach", device]).await?;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && message.contains(&point), "{device}: {message}");
    }
    let output = fixture.loopctl_as(user, ["unmount", &devices[1]]).await?;
    ensure!(output.status.success(), "{output:?}");
    for device in &devices {
        fixture.loopctl_as(user, ["detach", device]).await?;
    }
    ensure!(fixture.list(true).await?.is_empty(), "something is left");
    Ok(())
}

/// The copy of a mounted btrfs after an fsync, as after a power cut.
async fn btrfs_with_a_log_on_a_read_only_device_is_explained(fixture: &mut Fixture) -> Outcome {
    loopd_tests::process::needs("mkfs.btrfs")?;
    loopd_tests::process::needs_file_system("btrfs")?;
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::sparse(&fixture.directory, "image", 128 * MIB)?;
    run("mkfs.btrfs", ["-q", image.name()]).await?;
    let point = mount(fixture, &[image.name()]).await?.map_err(anyhow::Error::msg)?;
    let file = std::fs::File::create(point.join("file"))?;
    file.write_all_at(b"the last change", 0)?;
    file.sync_all()?;
    drop(file);
    let copy = fixture.directory.join("copy");
    run("cp", ["--sparse=always".as_ref(), image.path.as_os_str(), copy.as_os_str()]).await?;
    unmount(fixture, image.name()).await?;
    let copy = copy.to_str().context("no text")?;
    let message = mount(fixture, &["-r", copy]).await?.unwrap_err();
    assert!(message.contains("journal has to be replayed") && message.contains("norecovery"), "{message}");
    let point =
        mount(fixture, &["-r", "--options", "norecovery", copy]).await?.map_err(anyhow::Error::msg)?;
    ensure!(point.is_dir(), "nothing is mounted");
    unmount(fixture, copy).await?;
    // A writable mount replays it.
    let point = mount(fixture, &[copy]).await?.map_err(anyhow::Error::msg)?;
    assert_eq!(std::fs::read(point.join("file"))?, b"the last change");
    unmount(fixture, copy).await?;
    fixture.assert_no_leak().await
}
