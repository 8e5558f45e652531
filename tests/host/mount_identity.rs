//! The device number identifies the mounts of a device, not the source, which a user can choose.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime, State};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, needs, needs_file_system, run};
use loopd_tests::sysfs::{LoopDevice, is_mount_point};
use loopd_tests::units::Units;
use loopd_tests::{GAMES, Outcome};

loopd_tests::tests! {
    "mount_identity";
    Setup::None => [
        forged_source_does_not_count_as_a_mount,
        forged_mount_does_not_end_a_lifetime,
        forged_mount_point_is_not_printed,
        mount_by_root_is_not_printed,
        mount_over_the_mount_point_is_not_unmounted,
        multi_device_file_system_counts_for_each_device,
        symbolic_link_is_not_used_as_mount_point,
    ];
    Setup::StandIn(Answer::Yes) => [user_cannot_replace_the_mount_point];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e1";
/// The types with which a user can mount FUSE file systems.
const TYPES: [&str; 3] = ["fuse", "fuse.btrfs", "fuse.ext4"];

async fn attach(fixture: &Fixture, lifetime: Lifetime) -> Result<(Image, Attached)> {
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    let options = AttachOptions { lifetime, ..AttachOptions::default() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    Ok((image, attached))
}

/// A FUSE mount for each type, with this device as its source.
fn forge(fixture: &Fixture, device: LoopDevice) -> Result<Vec<Hanging>> {
    TYPES
        .iter()
        .map(|kind| {
            let directory = fixture.directory.join(kind);
            std::fs::create_dir(&directory)?;
            Hanging::pretend(&directory, &device.node(), kind)
        })
        .collect()
}

/// Waits until loopd has noticed all earlier mounts.
async fn mounts_are_seen(fixture: &Fixture, device: LoopDevice) -> Result<()> {
    let mark = Image::sparse(&fixture.directory, "mark", 4 * MIB)?;
    run("mkfs.ext4", ["-q", "-F", mark.name()]).await?;
    let attached = fixture.attach(&mark.open()?, &AttachOptions::default()).await?;
    ensure!(attached.device != device, "another device");
    let mounted = Mounted::new(attached.device, &fixture.directory, "seen").await?;
    eventually("it is seen", async || Ok(!fixture.volume(&attached.path).await?.mount_points.is_empty()))
        .await?;
    mounted.unmount().await?;
    eventually("the unmount is seen", async || {
        Ok(fixture.volume(&attached.path).await?.mount_points.is_empty())
    })
    .await?;
    fixture.detach(&attached).await
}

async fn forged_source_does_not_count_as_a_mount(fixture: &mut Fixture) -> Outcome {
    let (_image, attached) = attach(fixture, Lifetime::Persistent).await?;
    let forged = forge(fixture, attached.device)?;
    mounts_are_seen(fixture, attached.device).await?;
    assert_eq!(fixture.volume(&attached.path).await?.mount_points, Vec::<Vec<u8>>::new());
    // Neither detach nor mount treats it as a user of the device.
    fixture.detach(&attached).await?;
    drop(forged);
    fixture.assert_no_leak().await
}

async fn forged_mount_does_not_end_a_lifetime(fixture: &mut Fixture) -> Outcome {
    let (_image, attached) = attach(fixture, Lifetime::Mount).await?;
    drop(forge(fixture, attached.device)?);
    mounts_are_seen(fixture, attached.device).await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, State::Attached.as_str());
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

async fn forged_mount_point_is_not_printed(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let (image, attached) = attach(fixture, Lifetime::Persistent).await?;
    let forged = forge(fixture, attached.device)?;
    for name in [image.name(), &attached.device.node()] {
        let output = fixture.loopctl(["mount", name]).await?;
        assert_eq!(printed(&output.stdout), fixture.directory.join("media/root/data"), "{output:?}");
        assert!(fixture.loopctl(["unmount", name]).await?.status.success());
    }
    for kind in TYPES {
        let output = fixture.loopctl(["unmount", fixture.directory.join(kind).to_str().unwrap()]).await?;
        assert!(String::from_utf8_lossy(&output.stderr).contains("is not on a loop device"), "{output:?}");
    }
    drop(forged);
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

fn printed(output: &[u8]) -> PathBuf {
    String::from_utf8_lossy(output).trim_end_matches('\n').into()
}

async fn mount_by_root_is_not_printed(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let (image, attached) = attach(fixture, Lifetime::Persistent).await?;
    let by_hand = Mounted::new(attached.device, &fixture.directory, "by hand").await?;
    let output = fixture.loopctl(["mount", image.name()]).await?;
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("/by hand already"), "{message}");
    by_hand.unmount().await?;
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

async fn mount_over_the_mount_point_is_not_unmounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let (image, attached) = attach(fixture, Lifetime::Persistent).await?;
    let output = fixture.loopctl(["mount", image.name()]).await?;
    let place = printed(&output.stdout);
    let over = Hanging::pretend(&place, &attached.device.node(), "fuse")?;
    let output = fixture.loopctl(["mount", image.name()]).await?;
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    let output = fixture.loopctl(["unmount", place.to_str().unwrap()]).await?;
    assert!(!output.status.success(), "{output:?}");
    drop(over);
    assert!(is_mount_point(&place));
    assert!(fixture.loopctl(["unmount", image.name()]).await?.status.success());
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

async fn multi_device_file_system_counts_for_each_device(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.btrfs")?;
    needs_file_system("btrfs")?;
    let mut devices = Vec::new();
    for name in ["one", "two"] {
        let image = Image::sparse(&fixture.directory, name, 128 * MIB)?;
        devices.push(fixture.attach(&image.open()?, &AttachOptions::default()).await?);
    }
    let nodes: Vec<String> = devices.iter().map(|attached| attached.device.node()).collect();
    run("mkfs.btrfs", ["-q", "-f", "-d", "raid0", &nodes[0], &nodes[1]]).await?;
    run("btrfs", ["device", "scan", &nodes[0], &nodes[1]]).await?;
    let mounted = Mounted::new(devices[1].device, &fixture.directory, "both").await?;
    for attached in &devices {
        let points = async || anyhow::Ok(fixture.volume(&attached.path).await?.mount_points);
        eventually("it is mounted", async || Ok(points().await?.len() == 1)).await?;
        ensure!(points().await?[0].ends_with(b"/both\0"), "{attached:?}");
        let error = fixture.detach_fails(attached.device).await?;
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains("/both"), "{error}");
    }
    mounted.unmount().await?;
    run("btrfs", ["device", "scan", "--forget"]).await?;
    for attached in &devices {
        fixture.detach(attached).await?;
    }
    fixture.assert_no_leak().await
}

/// mount(8) receives a path; a user can neither move a component of it nor replace one by a link.
async fn user_cannot_replace_the_mount_point(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    image.chown(GAMES)?;
    let place = printed(&fixture.loopctl_as(GAMES, ["mount", image.name()]).await?.stdout);
    let users = place.parent().unwrap();
    let (moved, link) = (users.with_file_name("moved"), users.join("link"));
    let paths = [&place, &link, &moved].map(|path| path.to_str().unwrap());
    let users = users.to_str().unwrap();
    for arguments in [
        &["mv", paths[0], paths[1]][..],
        &["mv", users, paths[2]],
        &["ln", "-s", "/etc", paths[1]],
        &["rm", "-df", paths[0]],
        &["mkdir", paths[1]],
        &["chmod", "777", users],
    ] {
        let mut command = Command::new(arguments[0]);
        command.args(&arguments[1..]).uid(GAMES.uid).gid(GAMES.gid);
        let done = command.output().is_ok_and(|output| output.status.success());
        ensure!(!done, "a user may {arguments:?}");
    }
    assert!(is_mount_point(&place));
    assert!(fixture.loopctl_as(GAMES, ["unmount", image.name()]).await?.status.success());
    fixture.assert_no_leak().await
}

async fn symbolic_link_is_not_used_as_mount_point(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    let (users, victim) = (fixture.directory.join("media/root"), fixture.directory.join("victim"));
    for directory in [&users, &victim] {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::set_permissions(&users, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    std::os::unix::fs::symlink(&victim, users.join("data"))?;
    let output = fixture.loopctl(["mount", image.name()]).await?;
    assert_eq!(printed(&output.stdout), users.join("data1"), "{output:?}");
    assert!(!is_mount_point(&victim));
    assert!(fixture.loopctl(["unmount", image.name()]).await?.status.success());
    std::fs::remove_file(users.join("data"))?;
    std::fs::remove_dir(&users)?;
    fixture.assert_no_leak().await
}
