//! Mounting, with a stand-in for the service manager and without.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use loopd_dbus::names::{ACTION_MANAGE_OTHERS, ACTION_MOUNT};
use loopd_dbus::proxy::{Interaction, Volume};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, MountOptions, UnmountOptions};
use loopd_tests::fixture::{Attached, Fixture, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::table::Gpt;
use loopd_tests::units::{Conduct, Units};
use loopd_tests::{GAMES, Outcome, User, WWW_DATA};

loopd_tests::tests! {
    "mount";
    Setup::None => [
        mount_needs_a_service_manager,
        mount_and_unmount_leave_nothing,
        partitions_and_whole_disk_exclude_each_other,
        failing_service_manager_leaves_nothing,
        hanging_service_manager_leaves_nothing,
        forged_job_signals_are_ignored,
        mount_of_a_disconnected_caller_is_undone,
        mount_of_a_killed_daemon_is_undone,
        mount_survives_a_restart,
        unmount_without_a_daemon_is_noticed,
        mounts_by_root_are_noticed,
        unmounted_attachment_ends_after_the_grace_time,
        mount_in_use_is_busy,
        read_only_mount_replays_no_journal,
        external_journal_is_refused,
        mount_options_in_the_superblock_are_refused,
        mounts_of_a_user_are_limited,
        foreign_devices_are_mounted,
    ];
    Setup::StandIn(Answer::Yes) => [mount_is_authorized_by_polkit, mount_directories_are_private];
    Setup::StandIn(Answer::No) => [denied_mount_leaves_nothing];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000c1";

async fn image(fixture: &Fixture, label: &str) -> anyhow::Result<Image> {
    Image::ext4(&fixture.directory, &format!("{label}.img"), label, UUID).await
}

fn options(lifetime: Lifetime) -> AttachOptions {
    AttachOptions { lifetime, ..AttachOptions::default() }
}

async fn volume(fixture: &Fixture, path: &str) -> anyhow::Result<Volume> {
    Ok(Volume::new(&fixture.connection, path.to_owned().try_into()?, Interaction::Forbidden).await?)
}

async fn mount(fixture: &Fixture, attached: &Attached) -> anyhow::Result<PathBuf> {
    let volume = volume(fixture, attached.path.as_str()).await?;
    Ok(PathBuf::from(volume.mount(&MountOptions::default()).await?))
}

async fn unmount(fixture: &Fixture, attached: &Attached) -> zbus::Result<()> {
    let volume = volume(fixture, attached.path.as_str()).await.unwrap();
    volume.unmount(UnmountOptions::default()).await
}

/// The directory of this user below /run/media.
fn media(fixture: &Fixture, user: &str) -> PathBuf {
    fixture.directory.join("media").join(user)
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|found| found.dev());
    path.parent().is_some_and(|parent| device(path).is_ok() && device(path).ok() != device(parent).ok())
}

/// Checks that no directory, state file or device is left.
async fn nothing_left(fixture: &mut Fixture) -> Outcome {
    let directory = fixture.directory.clone();
    for (what, directory) in
        [("directories", directory.join("media")), ("files", directory.join("run/mounts"))]
    {
        eventually(&format!("no {what} are left"), async || {
            Ok(directory.read_dir().map_or(0, Iterator::count) == 0)
        })
        .await?;
    }
    fixture.assert_no_leak().await
}

async fn mount_needs_a_service_manager(fixture: &mut Fixture) -> Outcome {
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let volume = volume(fixture, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("systemd") && error.message.contains("/data.img"), "{error}");
    // Everything else works: a mount by root is noticed, and its unmount ends the attachment.
    let by_hand = Mounted::new(attached.device, &fixture.directory, "by hand").await?;
    eventually("it is seen", async || Ok(!fixture.volume(&attached.path).await?.mount_points.is_empty()))
        .await?;
    let error = refusal(volume.unmount(UnmountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported, "{error}");
    by_hand.unmount().await?;
    fixture.gone(&attached).await?;
    nothing_left(fixture).await
}

async fn mount_and_unmount_leave_nothing(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached =
        fixture.attach(&image(fixture, "My Disk").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(fixture, &attached).await?;
    assert_eq!(place, media(fixture, "root").join("My Disk"));
    assert!(is_mount_point(&place));
    let shown = fixture.volume(&attached.path).await?.mount_points;
    assert_eq!(shown, [[place.as_os_str().as_encoded_bytes(), b"\0"].concat()]);
    assert_eq!(fixture.properties(&attached.path).await?.client, "");
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
    unmount(fixture, &attached).await?;
    // The reply comes after everything is undone.
    assert!(!attached.device.bound() && !place.exists());
    nothing_left(fixture).await
}

async fn partitions_and_whole_disk_exclude_each_other(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::sparse(&fixture.directory, "image", 24 * MIB)?;
    Gpt::new(&[(2048, 18431), (18432, 34815)]).write(&image)?;
    for (start, label) in [(2048, "one"), (18432, "two")] {
        let place = loopd_tests::sysfs::Extent { start: start * 512, size: 8 * MIB };
        image.add_ext4(place, label, UUID).await?;
    }
    let attached = fixture.attach(&image.open()?, &options(Lifetime::Mount)).await?;
    let part = async |number: u32| volume(fixture, &format!("{}/p{number}", attached.path)).await;
    let whole = volume(fixture, attached.path.as_str()).await?;
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
    nothing_left(fixture).await
}

async fn failing_service_manager_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Client)).await?;
    let volume = volume(fixture, attached.path.as_str()).await?;
    for (conduct, expected) in [(Conduct::Fails, "journalctl -u"), (Conduct::Refuses, "not today")] {
        units.behave(conduct);
        let error = refusal(volume.mount(&MountOptions::default()).await)?;
        assert_eq!(error.kind, ErrorKind::Kernel);
        assert!(error.message.contains(expected) && error.message.contains("data.img"), "{error}");
    }
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

async fn hanging_service_manager_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    fixture.configure("[times]\nwait-for-mount = 0.5\n")?;
    fixture.restart_daemon(&[]).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Client)).await?;
    units.behave(Conduct::Hangs);
    let volume = volume(fixture, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(units.units().is_empty(), "{:?}", units.units());
    // It is slower than the time limit: its mount is undone.
    units.behave(Conduct::Slow(Duration::from_millis(700)));
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    // By then the slow mount has ended.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(units.units().is_empty());
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

/// A client that forges signals of the service manager.
async fn forged_job_signals_are_ignored(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    units.behave(Conduct::Slow(Duration::from_millis(600)));
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let names = zbus::fdo::DBusProxy::new(&fixture.connection).await?;
    let daemon = names.get_name_owner(loopd_dbus::names::BUS_NAME.try_into()?).await?;
    let liar = fixture.connect().await?;
    let place = media(fixture, "root").join("data");
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
    let (mounted, lied) = tokio::join!(mount(fixture, &attached), lies);
    lied?;
    assert!(is_mount_point(&mounted?));
    unmount(fixture, &attached).await?;
    nothing_left(fixture).await
}

async fn mount_of_a_disconnected_caller_is_undone(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached =
        fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Persistent)).await?;
    for conduct in [Conduct::Hangs, Conduct::Slow(Duration::from_millis(300))] {
        units.behave(conduct);
        let probe = fixture.probe_hold(loopd_tests::ROOT, ["--hold", "mount", attached.path.as_str()])?;
        let before = units.started().len();
        eventually("it mounts", async || Ok(units.started().len() > before)).await?;
        probe.kill().await?;
        let directory = fixture.directory.join("media");
        eventually("it is undone", async || Ok(directory.read_dir()?.count() == 0)).await?;
        assert!(units.units().is_empty(), "{:?}", units.units());
    }
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

async fn mount_of_a_killed_daemon_is_undone(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached =
        fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Persistent)).await?;
    for conduct in [Conduct::Hangs, Conduct::Slow(Duration::from_millis(300))] {
        units.behave(conduct);
        let probe = fixture.probe_hold(loopd_tests::ROOT, ["mount", attached.path.as_str()])?;
        let before = units.started().len();
        eventually("it mounts", async || Ok(units.started().len() > before)).await?;
        fixture.kill_daemon().await?;
        drop(probe);
        assert!(media(fixture, "root").join("data").is_dir());
        if let Conduct::Slow(_) = conduct {
            let place = media(fixture, "root").join("data");
            eventually("it is mounted", async || Ok(is_mount_point(&place))).await?;
        }
        fixture.restart_daemon(&[]).await?;
        assert!(units.units().is_empty(), "{:?}", units.units());
        assert!(fixture.volume(&attached.path).await?.mount_points.is_empty());
        assert!(!media(fixture, "root").exists());
    }
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

async fn mount_survives_a_restart(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(fixture, &attached).await?;
    let before = (fixture.properties(&attached.path).await?, fixture.volume(&attached.path).await?);
    for kill in [false, true] {
        if kill {
            fixture.kill_daemon().await?;
        }
        fixture.restart_managed(&manager).await?;
        let now = (fixture.properties(&attached.path).await?, fixture.volume(&attached.path).await?);
        assert_eq!(now, before);
        assert!(is_mount_point(&place));
    }
    unmount(fixture, &attached).await?;
    assert!(!attached.device.bound() && !place.exists());
    assert!(manager.kept().is_empty());
    nothing_left(fixture).await
}

async fn unmount_without_a_daemon_is_noticed(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(fixture, &attached).await?;
    fixture.kill_daemon().await?;
    run("umount", ["--internal-only", place.to_str().unwrap()]).await?;
    assert!(attached.device.bound() && place.is_dir(), "the service manager has its copy");
    fixture.restart_managed(&manager).await?;
    fixture.gone(&attached).await?;
    assert!(!place.exists());
    nothing_left(fixture).await
}

async fn mounts_by_root_are_noticed(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(fixture, &attached).await?;
    let by_hand = Mounted::new(attached.device, &fixture.directory, "by hand").await?;
    run("umount", ["--internal-only", place.to_str().unwrap()]).await?;
    eventually("its directory goes", async || Ok(!place.exists())).await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
    by_hand.unmount().await?;
    fixture.gone(&attached).await?;
    nothing_left(fixture).await
}

async fn unmounted_attachment_ends_after_the_grace_time(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[times]\nmount-grace = 1\n")?;
    fixture.restart_daemon(&[]).await?;
    let image = image(fixture, "data").await?;
    let probe = ["--hold", "setup", "regular", image.name(), "lifetime=s:mount"];
    let mut client = fixture.probe_hold(loopd_tests::ROOT, probe)?;
    let attached = client.reply().await?.attached()?;
    assert!(fixture.properties(&attached.path).await?.client.starts_with(':'));
    // Longer than the grace time.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(attached.device.bound(), "its client lives");
    client.kill().await?;
    eventually("its client is gone", async || {
        Ok(fixture.properties(&attached.path).await?.client.is_empty())
    })
    .await?;
    assert!(attached.device.bound());
    fixture.gone(&attached).await?;
    nothing_left(fixture).await
}

async fn mount_in_use_is_busy(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let place = mount(fixture, &attached).await?;
    let inner = Image::sparse(&place, "inner.img", MIB)?;
    let file = inner.open()?;
    let error = refusal(unmount(fixture, &attached).await)?;
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message.contains(place.to_str().unwrap()), "{error}");
    let stacked = fixture.attach(&file, &options(Lifetime::Persistent)).await?;
    drop(file);
    let error = refusal(unmount(fixture, &attached).await)?;
    assert!(error.message.contains(&stacked.device.node()), "{error}");
    assert!(is_mount_point(&place) && attached.device.bound());
    let volume = volume(fixture, attached.path.as_str()).await?;
    volume.unmount(UnmountOptions { lazy: true }).await?;
    assert!(!place.exists() && attached.device.bound());
    fixture.detach(&stacked).await?;
    fixture.gone(&attached).await?;
    nothing_left(fixture).await
}

async fn read_only_mount_replays_no_journal(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture, "data").await?;
    run("debugfs", ["-w", "-R", "feature needs_recovery", image.name()]).await?;
    let attached = fixture.attach(&image.open_read_only()?, &options(Lifetime::Mount)).await?;
    let volume = volume(fixture, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("its journal has to be replayed first"), "{error}");
    let without = MountOptions { options: "noload".to_owned(), ..MountOptions::default() };
    volume.mount(&without).await?;
    volume.unmount(UnmountOptions::default()).await?;
    nothing_left(fixture).await
}

/// Mounts an image with these bytes in its superblock; returns the error.
async fn mount_changed(
    fixture: &mut Fixture,
    offset: u64,
    bytes: &[u8],
) -> anyhow::Result<loopd_dbus::Error> {
    let image = image(fixture, "changed").await?;
    image.open()?.write_all_at(bytes, 1024 + offset)?;
    let attached = fixture.attach(&image.open()?, &options(Lifetime::Persistent)).await?;
    let volume = volume(fixture, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    fixture.detach(&attached).await?;
    nothing_left(fixture).await?;
    Ok(error)
}

async fn external_journal_is_refused(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let error = mount_changed(fixture, 0xe4, &[3, 8, 0, 0]).await?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("its journal is on another block device (8:3)"), "{error}");
    Ok(())
}

async fn mount_options_in_the_superblock_are_refused(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let error = mount_changed(fixture, 0x200, b"journal_path=/dev/sda3").await?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("mount option \"journal_path=/dev/sda3\""), "{error}");
    Ok(())
}

async fn mounts_of_a_user_are_limited(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    fixture.configure("[limits]\nmounts = 0\n[mount]\nfilesystems = [\"vfat\"]\n")?;
    fixture.restart_daemon(&[]).await?;
    let attached = fixture.attach(&image(fixture, "data").await?.open()?, &options(Lifetime::Mount)).await?;
    let volume = volume(fixture, attached.path.as_str()).await?;
    let error = refusal(volume.mount(&MountOptions::default()).await)?;
    assert_eq!(error.kind, ErrorKind::NotSupported);
    assert!(error.message.contains("ext4 is not among those that may be mounted here (vfat)"), "{error}");
    fixture.configure("[limits]\nmounts = 0\n")?;
    fixture.daemon()?.reload()?;
    // Root has no limit.
    eventually("it may be mounted", async || Ok(volume.mount(&MountOptions::default()).await.is_ok()))
        .await?;
    volume.unmount(UnmountOptions::default()).await?;
    nothing_left(fixture).await
}

async fn foreign_devices_are_mounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture, "data").await?;
    let device = losetup::attach(&[image.name()]).await?;
    let foreign = fixture.foreign(device).await?;
    eventually("udev has seen it", async || {
        Ok(fixture.volume(&foreign.path).await?.filesystem_type == "ext4")
    })
    .await?;
    let place = mount(fixture, &foreign).await?;
    assert!(is_mount_point(&place));
    fixture.kill_daemon().await?;
    fixture.restart_daemon(&[]).await?;
    let foreign = Attached { path: fixture.object_of(device).await?.unwrap(), device };
    unmount(fixture, &foreign).await?;
    assert!(!place.exists() && device.bound());
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    nothing_left(fixture).await
}

/// A persistent attachment of this user.
async fn owned_by(fixture: &Fixture, user: User, image: &Image) -> anyhow::Result<Attached> {
    fixture.probe(user, ["setup", "regular", image.name(), "lifetime=s:persistent"]).await?.attached()
}

async fn mount_is_authorized_by_polkit(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture, "data").await?;
    let attached = owned_by(fixture, GAMES, &image).await?;
    let path = attached.path.as_str();
    let mounted = fixture.probe(GAMES, ["mount", path]).await?;
    assert_eq!(mounted.ok()?.as_str(), media(fixture, "games").join("data").to_str());
    let check = fixture.stand_in()?.checks().pop().unwrap();
    assert_eq!(check.action, ACTION_MOUNT);
    let details = ["device", "file", "owner"].map(|name| check.details[name].clone());
    assert_eq!(details, [attached.device.node(), image.name().to_owned(), GAMES.uid.to_string()]);
    let asked = fixture.stand_in()?.checks().len();
    fixture.probe(GAMES, ["unmount", path]).await?.ok()?;
    assert_eq!(fixture.stand_in()?.checks().len(), asked, "a user may unmount their own mounts");

    // Mounts of others: by another user, for another user, and by root.
    fixture.probe(WWW_DATA, ["mount", path]).await?.ok()?;
    assert_eq!(fixture.stand_in()?.checks().pop().unwrap().action, ACTION_MANAGE_OTHERS);
    fixture.probe(GAMES, ["unmount", path]).await?.ok()?;
    assert_eq!(fixture.stand_in()?.checks().pop().unwrap().action, ACTION_MANAGE_OTHERS);
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

async fn denied_mount_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture, "data").await?;
    let attached = fixture.attach(&image.open()?, &options(Lifetime::Persistent)).await?;
    let path = attached.path.as_str();
    fixture.probe(GAMES, ["mount", path]).await?.refused(ErrorKind::AccessDenied)?;
    let place = mount(fixture, &attached).await?;
    fixture.probe(GAMES, ["unmount", path]).await?.refused(ErrorKind::AccessDenied)?;
    fixture.probe(GAMES, ["unmount", path, "lazy=b:true"]).await?.refused(ErrorKind::AccessDenied)?;
    assert!(is_mount_point(&place));
    fixture.probe(GAMES, ["mount", path, "lazy=b:true"]).await?.refused(ErrorKind::InvalidArgs)?;
    fixture.probe(GAMES, ["mount", path, "options=b:true"]).await?.refused(ErrorKind::InvalidArgs)?;
    unmount(fixture, &attached).await?;
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}

async fn mount_directories_are_private(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture, "data").await?;
    let attached = owned_by(fixture, GAMES, &image).await?;
    fixture.probe(GAMES, ["mount", attached.path.as_str()]).await?.ok()?;
    let directory = media(fixture, "games");
    let found = directory.metadata()?;
    assert_eq!((found.mode() & 0o7777, found.uid()), (0o750, 0));
    for (user, expected) in [(GAMES, true), (WWW_DATA, false)] {
        let mut command = Command::new("ls");
        command.arg(directory.join("data")).uid(user.uid).gid(user.gid);
        let listed = output(command).await?;
        assert_eq!(listed.status.success(), expected, "{user:?}");
    }
    fixture.probe(GAMES, ["unmount", attached.path.as_str()]).await?.ok()?;
    // A directory that another user could have prepared is not used.
    std::os::unix::fs::symlink("/etc", &directory)?;
    fixture.probe(GAMES, ["mount", attached.path.as_str()]).await?.refused(ErrorKind::Kernel)?;
    std::fs::remove_file(&directory)?;
    fixture.detach(&attached).await?;
    nothing_left(fixture).await
}
