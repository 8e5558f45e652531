//! What survives the daemon, and what the next daemon does with it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use loopd_dbus::{AttachOptions, AttachmentProperties, DetachOptions, Lifetime};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::probe::Probe;
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, Outcome, User, rounds};

loopd_tests::tests! {
    "restart";
    Setup::StandIn(Answer::Yes) => [everything_survives_a_restart, everything_survives_a_kill];
    Setup::None => [
        client_that_left_during_the_restart_is_noticed,
        detach_during_the_restart_is_noticed,
        number_reused_during_the_restart_is_not_adopted,
        stop_ends_the_attachments_of_clients,
        device_in_use_survives_without_a_service_manager,
        detaching_stays_detaching,
        damaged_state_files_affect_no_other_attachment,
        unknown_descriptors_are_closed,
        restart_of_the_bus_ends_attachments_of_clients,
        daemon_killed_at_any_moment_keeps_its_replies,
        daemon_killed_during_a_replacement_keeps_the_owner,
    ];
}

/// A probe that keeps its connection, and its attachment.
async fn hold(fixture: &Fixture, user: User, image: &Image) -> anyhow::Result<(Probe, Attached)> {
    let path = image.name();
    let mut probe = fixture.probe_hold(user, ["--hold", "setup", "regular", path])?;
    let attached = probe.reply().await?.attached()?;
    Ok((probe, attached))
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn files(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fixture.directory.join("run/attachments").read_dir()? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn file(fixture: &Fixture, attached: &Attached) -> PathBuf {
    let id = attached.path.as_str().rsplit('/').next().unwrap_or_default();
    fixture.directory.join("run/attachments").join(format!("{id}.toml"))
}

async fn everything_survives_a_restart(fixture: &mut Fixture) -> Outcome {
    survives(fixture, async |fixture| fixture.end_daemon().await).await
}

async fn everything_survives_a_kill(fixture: &mut Fixture) -> Outcome {
    survives(fixture, async |fixture| fixture.kill_daemon().await).await
}

async fn survives(fixture: &mut Fixture, death: impl AsyncFn(&mut Fixture) -> Outcome) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let image = Image::sparse(&fixture.directory, "image", 8 * MIB)?;
    Gpt::new(&[(2048, 4095), (4096, 8191)]).write(&image)?;
    let mountable =
        Image::ext4(&fixture.directory, "mounted", "mounted", "11111111-2222-3333-4444-0000000000aa").await?;
    let (client, bound) = hold(fixture, GAMES, &image).await?;
    let (user, mounted) = hold(fixture, GAMES, &mountable).await?;
    let kept = fixture.attach(&image.open_read_only()?, &persistent()).await?;
    let mount = Mounted::new(mounted.device, &fixture.directory, "mount point").await?;
    let all = [&bound, &mounted, &kept];
    let mut before = Vec::new();
    for attached in all {
        before.push((
            fixture.properties(&attached.path).await?,
            fixture.volume(&attached.path).await?,
            fixture.partitions(attached).await?,
        ));
    }
    assert_eq!(before[0].2.len(), 2);
    assert_eq!(manager.kept().len(), 2, "{:?}", manager.kept());

    for _ in 0..2 {
        death(fixture).await?;
        assert!(all.iter().all(|attached| attached.device.bound()));
        fixture.restart_managed(&manager).await?;
        for (attached, before) in all.iter().zip(&before) {
            let now = (
                fixture.properties(&attached.path).await?,
                fixture.volume(&attached.path).await?,
                fixture.partitions(attached).await?,
            );
            assert_eq!(&now, before);
        }
        assert_eq!(manager.kept().len(), 2, "{:?}", manager.kept());
    }
    // They end as before.
    std::fs::write(mount.directory.join("file"), "data")?;
    client.kill().await?;
    user.kill().await?;
    fixture.gone(&bound).await?;
    eventually("the mounted one is detaching", async || {
        Ok(fixture.properties(&mounted.path).await?.state == "detaching")
    })
    .await?;
    assert_eq!(std::fs::read(mount.directory.join("file"))?, b"data");
    mount.unmount().await?;
    fixture.gone(&mounted).await?;
    fixture.detach(&kept).await?;
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    assert!(files(fixture)?.is_empty(), "{:?}", files(fixture)?);
    Ok(())
}

async fn client_that_left_during_the_restart_is_noticed(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (goes, ended) = hold(fixture, loopd_tests::ROOT, &image).await?;
    let (stays, bound) = hold(fixture, loopd_tests::ROOT, &image).await?;
    fixture.kill_daemon().await?;
    goes.kill().await?;
    assert!(ended.device.bound());
    fixture.restart_managed(&manager).await?;
    fixture.gone(&ended).await?;
    assert_eq!(fixture.properties(&bound.path).await?.state, "attached");
    assert_eq!(manager.kept().len(), 1);
    stays.kill().await?;
    fixture.gone(&bound).await
}

async fn detach_during_the_restart_is_noticed(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    fixture.kill_daemon().await?;
    run("losetup", ["-d", &attached.device.node()]).await?;
    eventually("it is free", async || Ok(!attached.device.bound())).await?;
    fixture.restart_daemon(&[]).await?;
    assert!(fixture.list(true).await?.iter().all(|(path, _)| *path != attached.path));
    assert!(files(fixture)?.is_empty());
    assert!(fixture.log().contains("it ended while loopd did not run"));
    Ok(())
}

async fn number_reused_during_the_restart_is_not_adopted(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    fixture.kill_daemon().await?;
    run("losetup", ["-d", &node]).await?;
    eventually("it is free", async || Ok(!attached.device.bound())).await?;
    // The same file on the same number, and yet another attach.
    run("losetup", [&node, image.name()]).await?;
    fixture.restart_daemon(&[]).await?;
    let object = fixture.object_of(attached.device).await?.unwrap();
    assert_ne!(object, attached.path);
    assert!(!fixture.properties(&object).await?.managed);
    assert!(files(fixture)?.is_empty());
    run("losetup", ["-d", &node]).await.map(drop)
}

/// The service manager closes the stored descriptors when the service is stopped.
async fn stop_ends_the_attachments_of_clients(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (_client, bound) = hold(fixture, loopd_tests::ROOT, &image).await?;
    let kept = fixture.attach(&image.open()?, &persistent()).await?;
    let owner = fixture.properties(&kept.path).await?;
    fixture.end_daemon().await?;
    manager.forget();
    eventually("the kernel takes the client's", async || Ok(!bound.device.bound())).await?;
    fixture.restart_managed(&manager).await?;
    assert_eq!(fixture.properties(&kept.path).await?, owner);
    assert_eq!(fixture.list(false).await?.len(), 1);
    fixture.detach(&kept).await
}

async fn device_in_use_survives_without_a_service_manager(fixture: &mut Fixture) -> Outcome {
    let uuid = "11111111-2222-3333-4444-0000000000ab";
    let image = Image::ext4(&fixture.directory, "image", "in-use", uuid).await?;
    let (stays, living) = hold(fixture, loopd_tests::ROOT, &image).await?;
    let other = Image::ext4(&fixture.directory, "other", "other", uuid).await?;
    let (goes, ended) = hold(fixture, loopd_tests::ROOT, &other).await?;
    let unused = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let before = fixture.properties(&living.path).await?;
    let mounts = [
        Mounted::new(living.device, &fixture.directory, "one").await?,
        Mounted::new(ended.device, &fixture.directory, "two").await?,
    ];
    fixture.kill_daemon().await?;
    goes.kill().await?;
    eventually("the kernel detaches the unused device", async || Ok(!unused.device.bound())).await?;
    fixture.restart_daemon(&[]).await?;
    assert_eq!(fixture.properties(&living.path).await?, before);
    assert_eq!(fixture.properties(&ended.path).await?.state, "detaching");
    for mount in mounts {
        mount.unmount().await?;
    }
    fixture.gone(&ended).await?;
    // The next daemon holds it for its client, like the first one.
    assert!(living.device.bound());
    stays.kill().await?;
    fixture.gone(&living).await
}

async fn detaching_stays_detaching(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let opener = std::fs::File::open(attached.device.node())?;
    fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
    let before = fixture.properties(&attached.path).await?;
    fixture.kill_daemon().await?;
    fixture.restart_daemon(&[]).await?;
    assert_eq!(fixture.properties(&attached.path).await?, before);
    assert_eq!(before.state, "detaching");
    drop(opener);
    fixture.gone(&attached).await?;
    assert!(files(fixture)?.is_empty());
    Ok(())
}

async fn damaged_state_files_affect_no_other_attachment(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(fixture.attach(&image.open()?, &persistent()).await?);
    }
    fixture.kill_daemon().await?;
    let text = std::fs::read_to_string(file(fixture, &all[0]))?;
    std::fs::write(file(fixture, &all[1]), text.replace("version = 1", "version"))?;
    std::fs::remove_file(file(fixture, &all[2]))?;
    symlink(file(fixture, &all[0]), file(fixture, &all[2]))?;
    std::fs::write(file(fixture, &all[3]), text.replace("version = 1", "version = 9"))?;
    fixture.restart_daemon(&[]).await?;
    assert!(fixture.properties(&all[0].path).await?.managed);
    for (attached, why) in
        all[1..].iter().zip(["key with no value", "it cannot be opened", "it has version 9"])
    {
        // The device is still shown, as a foreign one.
        assert!(!fixture.properties(&attached.path).await?.managed);
        let name = file(fixture, attached).display().to_string();
        let log = fixture.log();
        let warns = |line: &str| ["WARN", &name, why].iter().all(|text| line.contains(text));
        assert!(log.lines().any(warns), "no warning about {name} ({why}): {log}");
    }
    assert_eq!(files(fixture)?.iter().filter(|name| name.ends_with(".damaged")).count(), 3);
    for attached in &all {
        fixture.detach(attached).await?;
    }
    Ok(())
}

async fn unknown_descriptors_are_closed(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    let planted = Image::sparse(&fixture.directory, "planted", MIB)?;
    manager.plant("disk-sequence-1", OwnedFd::from(planted.open()?));
    manager.plant("stored", OwnedFd::from(planted.open()?));
    fixture.restart_managed(&manager).await?;
    eventually("they are given up", async || Ok(manager.kept().is_empty())).await?;
    let open = fixture.daemon()?.descriptors()?;
    assert!(!open.iter().any(|open| open.ends_with("/planted")), "{open:?}");
    Ok(())
}

/// All names of the old bus are invalid, even if a client on the new bus has the same name.
async fn restart_of_the_bus_ends_attachments_of_clients(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (client, bound) = hold(fixture, loopd_tests::ROOT, &image).await?;
    let kept = fixture.attach(&image.open()?, &persistent()).await?;
    let before = fixture.properties(&kept.path).await?;
    let mut daemon = fixture.take_daemon().unwrap();
    fixture.restart_bus().await?;
    let status = daemon.end().await?;
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(bound.device.bound() && kept.device.bound());
    // Another client has the same name by now.
    let mut others = Vec::new();
    for _ in 0..20 {
        others.push(fixture.connect().await?);
    }
    fixture.restart_managed(&manager).await?;
    fixture.gone(&bound).await?;
    assert_eq!(fixture.properties(&kept.path).await?, before);
    client.kill().await?;
    fixture.detach(&kept).await
}

/// After the kill exactly the attachments exist whose calls were answered.
async fn daemon_killed_at_any_moment_keeps_its_replies(fixture: &mut Fixture) -> Outcome {
    let (mut random, rounds) = rounds::of("restart::daemon_killed_at_any_moment_keeps_its_replies", 25);
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for _ in 0..rounds {
        let connection = fixture.connect().await?;
        let client =
            loopd_dbus::proxy::Manager::new(&connection, loopd_dbus::proxy::Interaction::Forbidden).await?;
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let (client, file) = (client.clone(), image.open()?);
            let lifetime = if random.bool() { Lifetime::Client } else { Lifetime::Persistent };
            let options = AttachOptions { lifetime, wait: random.bool(), ..AttachOptions::default() };
            calls.spawn(async move { client.setup_loop(file.as_fd(), &options).await });
        }
        tokio::time::sleep(Duration::from_micros(random.u64(..12_000))).await;
        fixture.kill_daemon().await?;
        let mut answered = Vec::new();
        while let Some(reply) = calls.join_next().await {
            if let Ok(attached) = reply? {
                answered.push(Attached::new(attached)?);
            }
        }
        fixture.restart_managed(&manager).await?;
        let list = fixture.list(false).await?;
        for attached in &answered {
            assert!(attached.device.bound());
            assert!(list.iter().any(|(path, _)| *path == attached.path), "{attached:?} is not in {list:?}");
        }
        // An attachment whose reply was about to be sent may exist as well.
        for (_, properties) in fixture.list(false).await? {
            let properties = AttachmentProperties::from_dict(&properties)?;
            if properties.state == "attached" {
                fixture.manager.detach(&properties.device, DetachOptions::default()).await?;
            }
        }
        drop(client);
        connection.close().await?;
        // All others are gone, or end when udev closes them.
        fixture.assert_no_leak().await?;
        assert!(manager.kept().is_empty(), "{:?}", manager.kept());
        assert!(files(fixture)?.is_empty(), "{:?}", files(fixture)?);
    }
    Ok(())
}

/// A device gets a new disk sequence with its file, and keeps its owner.
async fn daemon_killed_during_a_replacement_keeps_the_owner(fixture: &mut Fixture) -> Outcome {
    let (mut random, rounds) = rounds::of("restart::daemon_killed_during_a_replacement_keeps_the_owner", 25);
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let images =
        [Image::sparse(&fixture.directory, "one", MIB)?, Image::sparse(&fixture.directory, "other", MIB)?];
    let read_only = |lifetime| AttachOptions { lifetime, read_only: true, ..AttachOptions::default() };
    let lasting = fixture.attach(&images[0].open()?, &read_only(Lifetime::Persistent)).await?;
    let bound = fixture.attach(&images[0].open()?, &read_only(Lifetime::Client)).await?;
    let all = [&lasting, &bound];
    for _ in 0..rounds {
        let mut calls = tokio::task::JoinSet::new();
        let mut before = Vec::new();
        for attached in all {
            let properties = fixture.properties(&attached.path).await?;
            let next = images.iter().find(|image| !shows(&properties, image)).unwrap();
            let (object, file) = (fixture.object(&attached.path).await?, next.open()?);
            calls.spawn(async move { object.replace_backing_file(file.as_fd()).await });
            before.push(properties);
        }
        tokio::time::sleep(Duration::from_micros(random.u64(..4000))).await;
        fixture.kill_daemon().await?;
        let answered = calls.join_all().await.iter().filter(|reply| reply.is_ok()).count();
        fixture.restart_managed(&manager).await?;
        let mut replaced = 0;
        for (attached, before) in all.iter().zip(before) {
            let after = fixture.properties(&attached.path).await?;
            assert_eq!(after.disk_sequence, attached.device.number::<u64>("diskseq")?);
            replaced += usize::from(after.disk_sequence > before.disk_sequence);
            assert_eq!(after.disk_sequence > before.disk_sequence, after.backing_file != before.backing_file);
            let expected = AttachmentProperties {
                disk_sequence: after.disk_sequence,
                backing_file: after.backing_file.clone(),
                backing_inode: after.backing_inode,
                ..before
            };
            assert_eq!(after, expected);
        }
        assert!(replaced >= answered, "{answered} replacements were confirmed, and {replaced} were made");
        assert_eq!(manager.kept().len(), 1, "{:?}", manager.kept());
    }
    for attached in all {
        fixture.detach(attached).await?;
    }
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    assert!(files(fixture)?.is_empty(), "{:?}", files(fixture)?);
    Ok(())
}

fn shows(attachment: &AttachmentProperties, image: &Image) -> bool {
    attachment.backing_file.strip_suffix(b"\0") == Some(image.path.as_os_str().as_encoded_bytes())
}
