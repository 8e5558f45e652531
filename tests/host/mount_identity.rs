//! Which mounts are those of a device: the device number says so, and not the source, which is the user's
//! word.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime, State};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::units::Units;
use loopd_tests::world::{Attached, World};
use loopd_tests::{GAMES, Outcome, skip};

loopd_tests::tests! {
    "mount_identity";
    Setup::None => [
        a_forged_source_is_no_mount_of_the_device,
        a_forged_mount_ends_no_lifetime,
        a_forged_mount_point_is_never_printed,
        a_mount_by_root_elsewhere_is_no_answer,
        what_lies_on_top_is_not_taken_for_the_volume,
        a_file_system_over_two_devices_is_a_mount_of_both,
        a_link_is_not_mounted_on,
    ];
    Setup::StandIn(Answer::Yes) => [a_user_cannot_replace_the_mount_point];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e1";
/// Types under which a user can mount with FUSE.
const TYPES: [&str; 3] = ["fuse", "fuse.btrfs", "fuse.ext4"];

async fn attach(world: &World, lifetime: Lifetime) -> Result<(Image, Attached)> {
    let image = Image::ext4(&world.folder, "image", "data", UUID).await?;
    let options = AttachOptions { lifetime, ..AttachOptions::default() };
    let attached = world.attach(&image.open()?, &options).await?;
    Ok((image, attached))
}

/// A FUSE mount for each type, with this device as its source.
fn forge(world: &World, device: LoopDevice) -> Result<Vec<Hanging>> {
    TYPES
        .iter()
        .map(|kind| {
            let folder = world.folder.join(kind);
            std::fs::create_dir(&folder)?;
            Hanging::pretend(&folder, &device.node(), kind)
        })
        .collect()
}

/// Returns when loopd has seen every mount that there was before.
async fn mounts_are_seen(world: &World, device: LoopDevice) -> Result<()> {
    let mark = Image::sparse(&world.folder, "mark", 4 * MIB)?;
    run("mkfs.ext4", ["-q", "-F", mark.name()]).await?;
    let attached = world.attach(&mark.open()?, &AttachOptions::default()).await?;
    ensure!(attached.device != device, "another device");
    let mounted = Mounted::new(attached.device, &world.folder, "seen").await?;
    eventually("it is seen", async || Ok(!world.volume(&attached.path).await?.mount_points.is_empty()))
        .await?;
    mounted.unmount().await?;
    eventually("that too", async || Ok(world.volume(&attached.path).await?.mount_points.is_empty())).await?;
    world.detach(&attached).await
}

async fn a_forged_source_is_no_mount_of_the_device(world: &mut World) -> Outcome {
    let (_image, attached) = attach(world, Lifetime::Persistent).await?;
    let forged = forge(world, attached.device)?;
    mounts_are_seen(world, attached.device).await?;
    assert_eq!(world.volume(&attached.path).await?.mount_points, Vec::<Vec<u8>>::new());
    // Neither detach nor mount takes it for a user of the device.
    world.detach(&attached).await?;
    drop(forged);
    world.assert_no_leak().await
}

async fn a_forged_mount_ends_no_lifetime(world: &mut World) -> Outcome {
    let (_image, attached) = attach(world, Lifetime::Mount).await?;
    drop(forge(world, attached.device)?);
    mounts_are_seen(world, attached.device).await?;
    assert_eq!(world.properties(&attached.path).await?.state, State::Attached.as_str());
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

async fn a_forged_mount_point_is_never_printed(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let (image, attached) = attach(world, Lifetime::Persistent).await?;
    let forged = forge(world, attached.device)?;
    for name in [image.name(), &attached.device.node()] {
        let said = world.loopctl(["mount", name]).await?;
        assert_eq!(printed(&said.stdout), world.folder.join("media/root/data"), "{said:?}");
        assert!(world.loopctl(["unmount", name]).await?.status.success());
    }
    for kind in TYPES {
        let said = world.loopctl(["unmount", world.folder.join(kind).to_str().unwrap()]).await?;
        assert!(String::from_utf8_lossy(&said.stderr).contains("is not on a loop device"), "{said:?}");
    }
    drop(forged);
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

fn printed(output: &[u8]) -> PathBuf {
    String::from_utf8_lossy(output).trim_end_matches('\n').into()
}

async fn a_mount_by_root_elsewhere_is_no_answer(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let (image, attached) = attach(world, Lifetime::Persistent).await?;
    let by_hand = Mounted::new(attached.device, &world.folder, "by hand").await?;
    let said = world.loopctl(["mount", image.name()]).await?;
    assert!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    let message = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(message.contains("/by hand already"), "{message}");
    by_hand.unmount().await?;
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

async fn what_lies_on_top_is_not_taken_for_the_volume(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let (image, attached) = attach(world, Lifetime::Persistent).await?;
    let said = world.loopctl(["mount", image.name()]).await?;
    let place = printed(&said.stdout);
    let over = Hanging::pretend(&place, &attached.device.node(), "fuse")?;
    let said = world.loopctl(["mount", image.name()]).await?;
    assert!(!said.status.success() && said.stdout.is_empty(), "{said:?}");
    let said = world.loopctl(["unmount", place.to_str().unwrap()]).await?;
    assert!(!said.status.success(), "{said:?}");
    drop(over);
    assert!(is_mounted(&place));
    assert!(world.loopctl(["unmount", image.name()]).await?.status.success());
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

fn is_mounted(place: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| line.split(' ').nth(4) == place.to_str())
}

async fn a_file_system_over_two_devices_is_a_mount_of_both(world: &mut World) -> Outcome {
    if run("mkfs.btrfs", ["--version"]).await.is_err() {
        return skip("btrfs-progs is not installed");
    }
    let mut devices = Vec::new();
    for name in ["one", "two"] {
        let image = Image::sparse(&world.folder, name, 128 * MIB)?;
        devices.push(world.attach(&image.open()?, &AttachOptions::default()).await?);
    }
    let nodes: Vec<String> = devices.iter().map(|attached| attached.device.node()).collect();
    run("mkfs.btrfs", ["-q", "-f", "-d", "raid0", &nodes[0], &nodes[1]]).await?;
    run("btrfs", ["device", "scan", &nodes[0], &nodes[1]]).await?;
    let mounted = Mounted::new(devices[1].device, &world.folder, "both").await?;
    for attached in &devices {
        let points = async || anyhow::Ok(world.volume(&attached.path).await?.mount_points);
        eventually("it is mounted", async || Ok(points().await?.len() == 1)).await?;
        ensure!(points().await?[0].ends_with(b"/both\0"), "{attached:?}");
        let error = world.detach_fails(attached.device).await?;
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains("/both"), "{error}");
    }
    mounted.unmount().await?;
    run("btrfs", ["device", "scan", "--forget"]).await?;
    for attached in &devices {
        world.detach(attached).await?;
    }
    world.assert_no_leak().await
}

/// mount(8) is given a path; no component of it is a user's to move or to make a link.
async fn a_user_cannot_replace_the_mount_point(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = Image::ext4(&world.folder, "image", "data", UUID).await?;
    image.chown(GAMES)?;
    let place = printed(&world.loopctl_as(GAMES, ["mount", image.name()]).await?.stdout);
    let users = place.parent().unwrap();
    let (moved, link) = (users.with_file_name("moved"), users.join("link"));
    let paths = [&place, &link, &moved].map(|path| path.to_str().unwrap());
    let users = users.to_str().unwrap();
    for words in [
        &["mv", paths[0], paths[1]][..],
        &["mv", users, paths[2]],
        &["ln", "-s", "/etc", paths[1]],
        &["rm", "-df", paths[0]],
        &["mkdir", paths[1]],
        &["chmod", "777", users],
    ] {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).uid(GAMES.uid).gid(GAMES.gid);
        let done = command.output().is_ok_and(|output| output.status.success());
        ensure!(!done, "a user may {words:?}");
    }
    assert!(is_mounted(&place));
    assert!(world.loopctl_as(GAMES, ["unmount", image.name()]).await?.status.success());
    world.assert_no_leak().await
}

async fn a_link_is_not_mounted_on(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = Image::ext4(&world.folder, "image", "data", UUID).await?;
    let (users, victim) = (world.folder.join("media/root"), world.folder.join("victim"));
    for folder in [&users, &victim] {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::set_permissions(&users, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    std::os::unix::fs::symlink(&victim, users.join("data"))?;
    let said = world.loopctl(["mount", image.name()]).await?;
    assert_eq!(printed(&said.stdout), users.join("data1"), "{said:?}");
    assert!(!is_mounted(&victim));
    assert!(world.loopctl(["unmount", image.name()]).await?.status.success());
    std::fs::remove_file(users.join("data"))?;
    std::fs::remove_dir(&users)?;
    world.assert_no_leak().await
}
