//! Mounting, with a stand-in for the service manager and with none.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use loopd_dbus::names::{ACTION_MANAGE_OTHERS, ACTION_MOUNT};
use loopd_dbus::proxy::{Interaction, Volume};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, MountOptions, UnmountOptions};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::table::Gpt;
use loopd_tests::units::{Conduct, Units};
use loopd_tests::world::{Attached, World, refusal};
use loopd_tests::{GAMES, Outcome, User, WWW_DATA};

loopd_tests::tests! {
    "mount";
    Setup::None => [
        without_a_service_manager,
        opens_and_closes,
        partitions_and_the_disk,
        a_service_manager_that_fails,
        a_service_manager_that_hangs,
        a_word_of_others_is_not_taken,
        caller_vanishes,
        killed_meanwhile,
        restarted_while_mounted,
        unmounted_while_no_daemon_ran,
        mounted_and_unmounted_by_hand,
        nobody_mounts_it,
        in_use,
        read_only_with_a_journal,
        a_journal_on_another_device,
        mount_options_in_the_superblock,
        one_user_cannot_mount_everything,
        mounted_foreign_devices,
    ];
    Setup::StandIn(Answer::Yes) => [polkit_is_asked, folders_are_the_users_alone];
    Setup::StandIn(Answer::No) => [polkit_says_no];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000c1";

async fn image(world: &World, label: &str) -> anyhow::Result<Image> {
    Image::ext4(&world.folder, &format!("{label}.img"), label, UUID).await
}

fn options(lifetime: Lifetime) -> AttachOptions {
    AttachOptions { lifetime, ..AttachOptions::default() }
}

async fn volume(world: &World, path: &str) -> anyhow::Result<Volume> {
    Ok(Volume::new(&world.connection, path.to_owned().try_into()?, Interaction::Forbidden).await?)
}

async fn mount(world: &World, attached: &Attached) -> anyhow::Result<PathBuf> {
    let volume = volume(world, attached.path.as_str()).await?;
    Ok(PathBuf::from(volume.mount(&MountOptions::default()).await?))
}

async fn unmount(world: &World, attached: &Attached) -> zbus::Result<()> {
    let volume = volume(world, attached.path.as_str()).await.unwrap();
    volume.unmount(UnmountOptions::default()).await
}

/// The folder for this user.
fn media(world: &World, user: &str) -> PathBuf {
    world.folder.join("media").join(user)
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|found| found.dev());
    path.parent().is_some_and(|parent| device(path).is_ok() && device(path).ok() != device(parent).ok())
}

/// No folder, no state, no device.
async fn nothing_left(world: &mut World) -> Outcome {
    let folder = world.folder.clone();
    for (what, folder) in [("folders", folder.join("media")), ("files", folder.join("run/mounts"))] {
        eventually(&format!("no {what} are left"), async || {
            Ok(folder.read_dir().map_or(0, Iterator::count) == 0)
        })
        .await?;
    }
    world.assert_no_leak().await
}

async fn without_a_service_manager(world: &mut World) -> Outcome {
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let volume = volume(world, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("systemd") && error.message.contains("/data.img"), "{error}");
    // Everything else works: what root mounts is seen, and ends it.
    let by_hand = Mounted::new(attached.device, &world.folder, "by hand").await?;
    eventually("it is seen", async || Ok(!world.volume(&attached.path).await?.mount_points.is_empty()))
        .await?;
    let error = refusal(volume.unmount(UnmountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported, "{error}");
    by_hand.unmount().await?;
    world.gone(&attached).await?;
    nothing_left(world).await
}

async fn opens_and_closes(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "My Disk").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(world, &attached).await?;
    assert_eq!(place, media(world, "root").join("My Disk"));
    assert!(is_mount_point(&place));
    let shown = world.volume(&attached.path).await?.mount_points;
    assert_eq!(shown, [[place.as_os_str().as_encoded_bytes(), b"\0"].concat()]);
    assert_eq!(world.properties(&attached.path).await?.client, "");
    let started = units.started().remove(0);
    assert!(started.unit.ends_with("media-root-My\\x20Disk.mount"), "{started:?}");
    for (name, expected) in [
        ("What", attached.device.node().as_str()),
        ("Type", "ext4"),
        ("Options", "nosuid,nodev,uhelper=loopd,errors=remount-ro"),
        ("CollectMode", "inactive-or-failed"),
    ] {
        assert_eq!(started.settings.get(name).map(String::as_str), Some(expected));
    }
    unmount(world, &attached).await?;
    // The reply comes when everything is back.
    assert!(!attached.device.bound() && !place.exists());
    nothing_left(world).await
}

async fn partitions_and_the_disk(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = Image::sparse(&world.folder, "image", 24 * MIB)?;
    Gpt::new(&[(2048, 18431), (18432, 34815)]).write(&image)?;
    for (start, label) in [(2048, "one"), (18432, "two")] {
        let place = loopd_tests::sysfs::Extent { start: start * 512, size: 8 * MIB };
        image.add_ext4(place, label, UUID).await?;
    }
    let attached = world.attach(&image.open()?, &options(Lifetime::Mount)).await?;
    let part = async |number: u32| volume(world, &format!("{}/p{number}", attached.path)).await;
    let whole = volume(world, attached.path.as_str()).await?;
    let error = refusal(whole.mount(&MountOptions::default()).await)?;
    assert!(error.message.contains("has a partition table"), "{error}");
    let first = part(1).await?.mount(&MountOptions::default()).await?;
    assert!(first.ends_with("/one"), "{first}");
    let again = refusal(part(1).await?.mount(&MountOptions::default()).await)?;
    let disk = MountOptions { filesystem: "ext4".to_owned(), ..MountOptions::default() };
    for error in [again, refusal(whole.mount(&disk).await)?] {
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains(&first), "{error}");
    }
    part(2).await?.mount(&MountOptions::default()).await?;
    part(1).await?.unmount(UnmountOptions::default()).await?;
    assert!(attached.device.bound());
    part(2).await?.unmount(UnmountOptions::default()).await?;
    assert!(!attached.device.bound());
    nothing_left(world).await
}

async fn a_service_manager_that_fails(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Client)).await?;
    let volume = volume(world, attached.path.as_str()).await?;
    for (conduct, expected) in [(Conduct::Fails, "journalctl -u"), (Conduct::Refuses, "not today")] {
        units.behave(conduct);
        let error = refusal(volume.mount(&MountOptions::default()).await)?;
        assert_eq!(error.kind, ErrorKind::Kernel);
        assert!(error.message.contains(expected) && error.message.contains("data.img"), "{error}");
    }
    world.detach(&attached).await?;
    nothing_left(world).await
}

async fn a_service_manager_that_hangs(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    world.configure("[times]\nwait-for-mount = 0.5\n")?;
    world.restart_daemon(&[]).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Client)).await?;
    units.behave(Conduct::Hangs);
    let volume = volume(world, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(units.units().is_empty(), "{:?}", units.units());
    // Slower than it may be: what it has mounted by then is unmounted again.
    units.behave(Conduct::Slow(Duration::from_millis(700)));
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(units.units().is_empty());
    world.detach(&attached).await?;
    nothing_left(world).await
}

/// A client that pretends to be the service manager.
async fn a_word_of_others_is_not_taken(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    units.behave(Conduct::Slow(Duration::from_millis(600)));
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let names = zbus::fdo::DBusProxy::new(&world.connection).await?;
    let daemon = names.get_name_owner(loopd_dbus::names::BUS_NAME.try_into()?).await?;
    let liar = world.connect().await?;
    let place = media(world, "root").join("data");
    let escaped = run("systemd-escape", ["--path", "--suffix=mount", place.to_str().unwrap()]).await?;
    let unit = escaped.trim();
    let lies = async {
        for _ in 0..40 {
            for job in 1..4_u32 {
                let path = zbus::wire::ObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{job}"))?;
                liar.emit_signal(
                    Some(daemon.as_ref()),
                    "/org/freedesktop/systemd1",
                    "org.freedesktop.systemd1.Manager",
                    "JobRemoved",
                    &(job, path, unit, "failed"),
                )
                .await?;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    let (mounted, lied) = tokio::join!(mount(world, &attached), lies);
    lied?;
    assert!(is_mount_point(&mounted?));
    unmount(world, &attached).await?;
    nothing_left(world).await
}

async fn caller_vanishes(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Persistent)).await?;
    for conduct in [Conduct::Hangs, Conduct::Slow(Duration::from_millis(300))] {
        units.behave(conduct);
        let probe = world.probe_hold(loopd_tests::ROOT, ["--hold", "mount", attached.path.as_str()])?;
        let before = units.started().len();
        eventually("it mounts", async || Ok(units.started().len() > before)).await?;
        probe.kill().await?;
        let folder = world.folder.join("media");
        eventually("it is undone", async || Ok(folder.read_dir()?.count() == 0)).await?;
        assert!(units.units().is_empty(), "{:?}", units.units());
    }
    world.detach(&attached).await?;
    nothing_left(world).await
}

async fn killed_meanwhile(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Persistent)).await?;
    for conduct in [Conduct::Hangs, Conduct::Slow(Duration::from_millis(300))] {
        units.behave(conduct);
        let probe = world.probe_hold(loopd_tests::ROOT, ["mount", attached.path.as_str()])?;
        let before = units.started().len();
        eventually("it mounts", async || Ok(units.started().len() > before)).await?;
        world.kill_daemon().await?;
        drop(probe);
        assert!(media(world, "root").join("data").is_dir());
        if let Conduct::Slow(time) = conduct {
            tokio::time::sleep(2 * time).await;
            assert!(is_mount_point(&media(world, "root").join("data")));
        }
        world.restart_daemon(&[]).await?;
        assert!(units.units().is_empty(), "{:?}", units.units());
        assert!(world.volume(&attached.path).await?.mount_points.is_empty());
        assert!(!media(world, "root").exists());
    }
    world.detach(&attached).await?;
    nothing_left(world).await
}

async fn restarted_while_mounted(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(world, &attached).await?;
    let before = (world.properties(&attached.path).await?, world.volume(&attached.path).await?);
    for kill in [false, true] {
        if kill {
            world.kill_daemon().await?;
        }
        world.restart_managed(&manager).await?;
        let now = (world.properties(&attached.path).await?, world.volume(&attached.path).await?);
        assert_eq!(now, before);
        assert!(is_mount_point(&place));
    }
    unmount(world, &attached).await?;
    assert!(!attached.device.bound() && !place.exists());
    assert!(manager.kept().is_empty());
    nothing_left(world).await
}

async fn unmounted_while_no_daemon_ran(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(world, &attached).await?;
    world.kill_daemon().await?;
    run("umount", ["--internal-only", place.to_str().unwrap()]).await?;
    assert!(attached.device.bound() && place.is_dir(), "the service manager has its copy");
    world.restart_managed(&manager).await?;
    world.gone(&attached).await?;
    assert!(!place.exists());
    nothing_left(world).await
}

async fn mounted_and_unmounted_by_hand(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(world, &attached).await?;
    let by_hand = Mounted::new(attached.device, &world.folder, "by hand").await?;
    run("umount", ["--internal-only", place.to_str().unwrap()]).await?;
    eventually("its folder goes", async || Ok(!place.exists())).await?;
    assert_eq!(world.properties(&attached.path).await?.state, "attached");
    by_hand.unmount().await?;
    world.gone(&attached).await?;
    nothing_left(world).await
}

async fn nobody_mounts_it(world: &mut World) -> Outcome {
    world.configure("[times]\nmount-grace = 1\n")?;
    world.restart_daemon(&[]).await?;
    let image = image(world, "data").await?;
    let probe = ["--hold", "setup", "regular", image.name(), "lifetime=s:mount"];
    let mut client = world.probe_hold(loopd_tests::ROOT, probe)?;
    let attached = client.reply().await?.attached()?;
    assert!(world.properties(&attached.path).await?.client.starts_with(':'));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(attached.device.bound(), "its client lives");
    client.kill().await?;
    eventually("its client is gone", async || Ok(world.properties(&attached.path).await?.client.is_empty()))
        .await?;
    assert!(attached.device.bound());
    world.gone(&attached).await?;
    nothing_left(world).await
}

async fn in_use(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(world, &attached).await?;
    let inner = Image::sparse(&place, "inner.img", MIB)?;
    let file = inner.open()?;
    let error = refusal(unmount(world, &attached).await)?;
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message.contains(place.to_str().unwrap()), "{error}");
    let stacked = world.attach(&file, &options(Lifetime::Persistent)).await?;
    drop(file);
    let error = refusal(unmount(world, &attached).await)?;
    assert!(error.message.contains(&stacked.device.node()), "{error}");
    assert!(is_mount_point(&place) && attached.device.bound());
    let volume = volume(world, attached.path.as_str()).await?;
    volume.unmount(UnmountOptions { lazy: true }).await?;
    assert!(!place.exists() && attached.device.bound());
    world.detach(&stacked).await?;
    world.gone(&attached).await?;
    nothing_left(world).await
}

async fn read_only_with_a_journal(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world, "data").await?;
    run("debugfs", ["-w", "-R", "feature needs_recovery", image.name()]).await?;
    let attached = world.attach(&image.open_read_only()?, &options(Lifetime::Mount)).await?;
    let volume = volume(world, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("its journal has to be replayed first"), "{error}");
    let without = MountOptions { options: "noload".to_owned(), ..MountOptions::default() };
    volume.mount(&without).await?;
    volume.unmount(UnmountOptions::default()).await?;
    nothing_left(world).await
}

/// Mounts an image with these bytes in its superblock; gives the error.
async fn mount_changed(world: &mut World, offset: u64, bytes: &[u8]) -> anyhow::Result<loopd_dbus::Error> {
    let image = image(world, "changed").await?;
    image.open()?.write_all_at(bytes, 1024 + offset)?;
    let attached = world.attach(&image.open()?, &options(Lifetime::Persistent)).await?;
    let volume = volume(world, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    world.detach(&attached).await?;
    nothing_left(world).await?;
    Ok(error)
}

async fn a_journal_on_another_device(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let error = mount_changed(world, 0xe4, &[3, 8, 0, 0]).await?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("its journal is on another block device (8:3)"), "{error}");
    Ok(())
}

async fn mount_options_in_the_superblock(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let error = mount_changed(world, 0x200, b"journal_path=/dev/sda3").await?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("mount option \"journal_path=/dev/sda3\""), "{error}");
    Ok(())
}

async fn one_user_cannot_mount_everything(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    world.configure("[limits]\nmounts = 0\n[mount]\nfilesystems = [\"vfat\"]\n")?;
    world.restart_daemon(&[]).await?;
    let attached = world.attach(&image(world, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let volume = volume(world, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("ext4 is not among those that may be mounted here (vfat)"), "{error}");
    world.configure("[limits]\nmounts = 0\n")?;
    world.daemon()?.reload()?;
    // Root is not bound.
    eventually("it may be mounted", async || Ok(volume.mount(&MountOptions::default()).await.is_ok()))
        .await?;
    volume.unmount(UnmountOptions::default()).await?;
    nothing_left(world).await
}

async fn mounted_foreign_devices(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world, "data").await?;
    let node = run("losetup", ["-f", "--show", image.name()]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    let mut path = None;
    eventually("it is seen", async || {
        path = world.object_of(device).await?;
        Ok(path.is_some())
    })
    .await?;
    let foreign = Attached { path: path.unwrap(), device };
    eventually("udev has seen it", async || Ok(world.volume(&foreign.path).await?.filesystem_type == "ext4"))
        .await?;
    let place = mount(world, &foreign).await?;
    assert!(is_mount_point(&place));
    world.kill_daemon().await?;
    world.restart_daemon(&[]).await?;
    let foreign = Attached { path: world.object_of(device).await?.unwrap(), device };
    unmount(world, &foreign).await?;
    assert!(!place.exists() && device.bound());
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    nothing_left(world).await
}

/// An attachment of this user's that stays.
async fn owned_by(world: &World, user: User, image: &Image) -> anyhow::Result<Attached> {
    world.probe(user, ["setup", "regular", image.name(), "lifetime=s:persistent"]).await?.attached()
}

async fn polkit_is_asked(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world, "data").await?;
    let attached = owned_by(world, GAMES, &image).await?;
    let path = attached.path.as_str();
    let mounted = world.probe(GAMES, ["mount", path]).await?;
    assert_eq!(mounted.ok()?.as_str(), media(world, "games").join("data").to_str());
    let check = world.stand_in()?.checks().pop().unwrap();
    assert_eq!(check.action, ACTION_MOUNT);
    let details = ["device", "file", "owner"].map(|name| check.details[name].clone());
    assert_eq!(details, [attached.device.node(), image.name().to_owned(), GAMES.uid.to_string()]);
    let asked = world.stand_in()?.checks().len();
    world.probe(GAMES, ["unmount", path]).await?.ok()?;
    assert_eq!(world.stand_in()?.checks().len(), asked, "what was mounted for her is hers to unmount");

    // Somebody else's: by and for others, and by root's hand.
    world.probe(WWW_DATA, ["mount", path]).await?.ok()?;
    assert_eq!(world.stand_in()?.checks().pop().unwrap().action, ACTION_MANAGE_OTHERS);
    world.probe(GAMES, ["unmount", path]).await?.ok()?;
    assert_eq!(world.stand_in()?.checks().pop().unwrap().action, ACTION_MANAGE_OTHERS);
    world.detach(&attached).await?;
    nothing_left(world).await
}

async fn polkit_says_no(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world, "data").await?;
    let attached = world.attach(&image.open()?, &options(Lifetime::Persistent)).await?;
    let path = attached.path.as_str();
    world.probe(GAMES, ["mount", path]).await?.refused(ErrorKind::AccessDenied)?;
    let place = mount(world, &attached).await?;
    world.probe(GAMES, ["unmount", path]).await?.refused(ErrorKind::AccessDenied)?;
    world.probe(GAMES, ["unmount", path, "lazy=b:true"]).await?.refused(ErrorKind::AccessDenied)?;
    assert!(is_mount_point(&place));
    world.probe(GAMES, ["mount", path, "lazy=b:true"]).await?.refused(ErrorKind::InvalidArgs)?;
    world.probe(GAMES, ["mount", path, "options=b:true"]).await?.refused(ErrorKind::InvalidArgs)?;
    unmount(world, &attached).await?;
    world.detach(&attached).await?;
    nothing_left(world).await
}

async fn folders_are_the_users_alone(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world, "data").await?;
    let attached = owned_by(world, GAMES, &image).await?;
    world.probe(GAMES, ["mount", attached.path.as_str()]).await?.ok()?;
    let folder = media(world, "games");
    let found = folder.metadata()?;
    assert_eq!((found.mode() & 0o7777, found.uid()), (0o750, 0));
    for (user, expected) in [(GAMES, true), (WWW_DATA, false)] {
        let mut command = std::process::Command::new("ls");
        std::os::unix::process::CommandExt::uid(&mut command, user.uid);
        std::os::unix::process::CommandExt::gid(&mut command, user.gid);
        let listed = loopd_tests::process::output({
            command.arg(folder.join("data"));
            command
        })
        .await?;
        assert_eq!(listed.status.success(), expected, "{user:?}");
    }
    world.probe(GAMES, ["unmount", attached.path.as_str()]).await?.ok()?;
    // What anybody could have prepared is not taken.
    std::os::unix::fs::symlink("/etc", &folder)?;
    world.probe(GAMES, ["mount", attached.path.as_str()]).await?.refused(ErrorKind::Kernel)?;
    std::fs::remove_file(&folder)?;
    world.detach(&attached).await?;
    nothing_left(world).await
}
