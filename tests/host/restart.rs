//! What outlives the daemon, and what the next one makes of it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use loopd_dbus::{AttachOptions, AttachmentProperties, DetachOptions, Lifetime};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::probe::Probe;
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::table::Gpt;
use loopd_tests::world::{Attached, World};
use loopd_tests::{GAMES, Outcome, User, rounds};

loopd_tests::tests! {
    "restart";
    Setup::StandIn(Answer::Yes) => [everything_survives_a_restart, everything_survives_a_kill];
    Setup::None => [
        client_gone_meanwhile,
        detached_meanwhile,
        number_taken_meanwhile,
        stopped_by_the_service_manager,
        in_use_without_a_service_manager,
        detaching_stays_detaching,
        damaged_files_cost_nothing_else,
        unknown_descriptors_are_closed,
        another_bus,
        killed_at_any_moment,
        killed_as_files_are_replaced,
    ];
}

/// A held probe and what it attached.
async fn hold(world: &World, user: User, image: &Image) -> anyhow::Result<(Probe, Attached)> {
    let path = image.path.to_str().unwrap();
    let mut probe = world.probe_hold(user, ["--hold", "setup", "regular", path])?;
    let attached = probe.reply().await?.attached()?;
    Ok((probe, attached))
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn files(world: &World) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in world.folder.join("run/attachments").read_dir()? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn file(world: &World, attached: &Attached) -> PathBuf {
    let id = attached.path.as_str().rsplit('/').next().unwrap_or_default();
    world.folder.join("run/attachments").join(format!("{id}.toml"))
}

async fn everything_survives_a_restart(world: &mut World) -> Outcome {
    survives(world, async |world| world.end_daemon().await).await
}

async fn everything_survives_a_kill(world: &mut World) -> Outcome {
    survives(world, async |world| world.kill_daemon().await).await
}

async fn survives(world: &mut World, death: impl AsyncFn(&mut World) -> Outcome) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let image = Image::sparse(&world.folder, "image", 8 * MIB)?;
    Gpt::new(&[(2048, 4095), (4096, 8191)]).write(&image)?;
    let mountable =
        Image::ext4(&world.folder, "mounted", "mounted", "11111111-2222-3333-4444-0000000000aa").await?;
    let (client, bound) = hold(world, GAMES, &image).await?;
    let (user, mounted) = hold(world, GAMES, &mountable).await?;
    let kept = world.attach(&image.open_read_only()?, &persistent()).await?;
    let mount = Mounted::new(mounted.device, &world.folder, "mount point").await?;
    let all = [&bound, &mounted, &kept];
    let mut before = Vec::new();
    for attached in all {
        before.push((
            world.properties(&attached.path).await?,
            world.volume(&attached.path).await?,
            world.partitions(attached).await?,
        ));
    }
    assert_eq!(before[0].2.len(), 2);
    assert_eq!(manager.kept().len(), 2, "{:?}", manager.kept());

    for _ in 0..2 {
        death(world).await?;
        assert!(all.iter().all(|attached| attached.device.bound()));
        world.restart_managed(&manager).await?;
        for (attached, before) in all.iter().zip(&before) {
            let now = (
                world.properties(&attached.path).await?,
                world.volume(&attached.path).await?,
                world.partitions(attached).await?,
            );
            assert_eq!(&now, before);
        }
        assert_eq!(manager.kept().len(), 2, "{:?}", manager.kept());
    }
    // They live and end as before.
    std::fs::write(mount.folder.join("file"), "data")?;
    client.kill().await?;
    user.kill().await?;
    world.gone(&bound).await?;
    eventually("the mounted one is detaching", async || {
        Ok(world.properties(&mounted.path).await?.state == "detaching")
    })
    .await?;
    assert_eq!(std::fs::read(mount.folder.join("file"))?, b"data");
    mount.unmount().await?;
    world.gone(&mounted).await?;
    world.detach(&kept).await?;
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    assert!(files(world)?.is_empty(), "{:?}", files(world)?);
    Ok(())
}

async fn client_gone_meanwhile(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (goes, ended) = hold(world, loopd_tests::ROOT, &image).await?;
    let (stays, bound) = hold(world, loopd_tests::ROOT, &image).await?;
    world.kill_daemon().await?;
    goes.kill().await?;
    assert!(ended.device.bound());
    world.restart_managed(&manager).await?;
    world.gone(&ended).await?;
    assert_eq!(world.properties(&bound.path).await?.state, "attached");
    assert_eq!(manager.kept().len(), 1);
    stays.kill().await?;
    world.gone(&bound).await
}

async fn detached_meanwhile(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    world.kill_daemon().await?;
    run("losetup", ["-d", &attached.device.node()]).await?;
    eventually("it is free", async || Ok(!attached.device.bound())).await?;
    world.restart_daemon(&[]).await?;
    assert!(world.list(true).await?.iter().all(|(path, _)| *path != attached.path));
    assert!(files(world)?.is_empty());
    assert!(world.log().contains("it ended while loopd did not run"));
    Ok(())
}

async fn number_taken_meanwhile(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    world.kill_daemon().await?;
    run("losetup", ["-d", &node]).await?;
    eventually("it is free", async || Ok(!attached.device.bound())).await?;
    // The same file on the same number, and yet another attach.
    run("losetup", [&node, image.path.to_str().unwrap()]).await?;
    world.restart_daemon(&[]).await?;
    let object = world.object_of(attached.device).await?.unwrap();
    assert_ne!(object, attached.path);
    assert!(!world.properties(&object).await?.managed);
    assert!(files(world)?.is_empty());
    run("losetup", ["-d", &node]).await.map(drop)
}

/// The service manager closes what it has kept when the service is stopped.
async fn stopped_by_the_service_manager(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (_client, bound) = hold(world, loopd_tests::ROOT, &image).await?;
    let kept = world.attach(&image.open()?, &persistent()).await?;
    let owner = world.properties(&kept.path).await?;
    world.end_daemon().await?;
    manager.forget();
    eventually("the kernel takes the client's", async || Ok(!bound.device.bound())).await?;
    world.restart_managed(&manager).await?;
    assert_eq!(world.properties(&kept.path).await?, owner);
    assert_eq!(world.list(false).await?.len(), 1);
    world.detach(&kept).await
}

async fn in_use_without_a_service_manager(world: &mut World) -> Outcome {
    let uuid = "11111111-2222-3333-4444-0000000000ab";
    let image = Image::ext4(&world.folder, "image", "in-use", uuid).await?;
    let (stays, living) = hold(world, loopd_tests::ROOT, &image).await?;
    let other = Image::ext4(&world.folder, "other", "other", uuid).await?;
    let (goes, ended) = hold(world, loopd_tests::ROOT, &other).await?;
    let unused = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let before = world.properties(&living.path).await?;
    let mounts = [
        Mounted::new(living.device, &world.folder, "one").await?,
        Mounted::new(ended.device, &world.folder, "two").await?,
    ];
    world.kill_daemon().await?;
    goes.kill().await?;
    eventually("the kernel takes what nobody uses", async || Ok(!unused.device.bound())).await?;
    world.restart_daemon(&[]).await?;
    assert_eq!(world.properties(&living.path).await?, before);
    assert_eq!(world.properties(&ended.path).await?.state, "detaching");
    for mount in mounts {
        mount.unmount().await?;
    }
    world.gone(&ended).await?;
    // The next daemon keeps it for its client as the first one did.
    assert!(living.device.bound());
    stays.kill().await?;
    world.gone(&living).await
}

async fn detaching_stays_detaching(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    let opener = std::fs::File::open(attached.device.node())?;
    world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
    let before = world.properties(&attached.path).await?;
    world.kill_daemon().await?;
    world.restart_daemon(&[]).await?;
    assert_eq!(world.properties(&attached.path).await?, before);
    assert_eq!(before.state, "detaching");
    drop(opener);
    world.gone(&attached).await?;
    assert!(files(world)?.is_empty());
    Ok(())
}

async fn damaged_files_cost_nothing_else(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(world.attach(&image.open()?, &persistent()).await?);
    }
    world.kill_daemon().await?;
    let text = std::fs::read_to_string(file(world, &all[0]))?;
    std::fs::write(file(world, &all[1]), &text[..text.len() / 2])?;
    std::fs::remove_file(file(world, &all[2]))?;
    symlink(file(world, &all[0]), file(world, &all[2]))?;
    std::fs::write(file(world, &all[3]), text.replace("version = 1", "version = 9"))?;
    world.restart_daemon(&[]).await?;
    assert!(world.properties(&all[0].path).await?.managed);
    for (attached, why) in all[1..].iter().zip(["TOML", "it cannot be opened", "it has version 9"]) {
        // The device is still shown, as one that nobody is known to own.
        assert!(!world.properties(&attached.path).await?.managed);
        let name = file(world, attached).display().to_string();
        let warned = world.log().lines().any(|line| line.contains(&name) && line.contains("WARN"));
        assert!(warned, "no warning about {name} ({why}): {}", world.log());
    }
    assert_eq!(files(world)?.iter().filter(|name| name.ends_with(".damaged")).count(), 3);
    for attached in &all {
        world.detach(attached).await?;
    }
    Ok(())
}

async fn unknown_descriptors_are_closed(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    let planted = Image::sparse(&world.folder, "planted", MIB)?;
    manager.plant("disk-sequence-1", OwnedFd::from(planted.open()?));
    manager.plant("stored", OwnedFd::from(planted.open()?));
    world.restart_managed(&manager).await?;
    eventually("they are given up", async || Ok(manager.kept().is_empty())).await?;
    let open = world.daemon()?.descriptors()?;
    assert!(!open.iter().any(|open| open.ends_with("/planted")), "{open:?}");
    Ok(())
}

/// All names on the old bus are gone, whoever has them on the new one.
async fn another_bus(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (client, bound) = hold(world, loopd_tests::ROOT, &image).await?;
    let kept = world.attach(&image.open()?, &persistent()).await?;
    let before = world.properties(&kept.path).await?;
    let mut daemon = world.take_daemon().unwrap();
    world.restart_bus().await?;
    let status = daemon.end().await?;
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(bound.device.bound() && kept.device.bound());
    // Someone has the name of the client by now.
    let mut others = Vec::new();
    for _ in 0..20 {
        others.push(world.connect().await?);
    }
    world.restart_managed(&manager).await?;
    world.gone(&bound).await?;
    assert_eq!(world.properties(&kept.path).await?, before);
    client.kill().await?;
    world.detach(&kept).await
}

/// Whatever was answered is there after the kill, and nothing else.
async fn killed_at_any_moment(world: &mut World) -> Outcome {
    let (mut random, rounds) = rounds::of("restart::killed_at_any_moment", 25);
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for _ in 0..rounds {
        let connection = world.connect().await?;
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
        world.kill_daemon().await?;
        let mut answered = Vec::new();
        while let Some(reply) = calls.join_next().await {
            if let Ok(attached) = reply? {
                answered.push(Attached::new(attached)?);
            }
        }
        world.restart_managed(&manager).await?;
        let list = world.list(false).await?;
        for attached in &answered {
            assert!(attached.device.bound());
            assert!(list.iter().any(|(path, _)| *path == attached.path), "{attached:?} is not in {list:?}");
        }
        // One that was about to be answered may be there as well.
        for (_, properties) in world.list(false).await? {
            let properties = AttachmentProperties::from_dict(&properties)?;
            if properties.state == "attached" {
                world.manager.detach(&properties.device, DetachOptions::default()).await?;
            }
        }
        drop(client);
        connection.close().await?;
        // Whatever else there was is gone, or goes with udev's look at it.
        world.assert_no_leak().await?;
        assert!(manager.kept().is_empty(), "{:?}", manager.kept());
        assert!(files(world)?.is_empty(), "{:?}", files(world)?);
    }
    Ok(())
}

/// A device gets a new disk sequence with its file, and belongs to whom it did all the same.
async fn killed_as_files_are_replaced(world: &mut World) -> Outcome {
    let (mut random, rounds) = rounds::of("restart::killed_as_files_are_replaced", 25);
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let images = [Image::sparse(&world.folder, "one", MIB)?, Image::sparse(&world.folder, "other", MIB)?];
    let read_only = |lifetime| AttachOptions { lifetime, read_only: true, ..AttachOptions::default() };
    let lasting = world.attach(&images[0].open()?, &read_only(Lifetime::Persistent)).await?;
    let bound = world.attach(&images[0].open()?, &read_only(Lifetime::Client)).await?;
    let all = [&lasting, &bound];
    for _ in 0..rounds {
        let mut calls = tokio::task::JoinSet::new();
        let mut before = Vec::new();
        for attached in all {
            let properties = world.properties(&attached.path).await?;
            let next = images.iter().find(|image| !shows(&properties, image)).unwrap();
            let (object, file) = (world.object(&attached.path).await?, next.open()?);
            calls.spawn(async move { object.replace_backing_file(file.as_fd()).await });
            before.push(properties);
        }
        tokio::time::sleep(Duration::from_micros(random.u64(..4000))).await;
        world.kill_daemon().await?;
        let answered = calls.join_all().await.iter().filter(|reply| reply.is_ok()).count();
        world.restart_managed(&manager).await?;
        let mut replaced = 0;
        for (attached, before) in all.iter().zip(before) {
            let after = world.properties(&attached.path).await?;
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
        assert!(replaced >= answered, "{answered} were told that it is done, and {replaced} are");
        assert_eq!(manager.kept().len(), 1, "{:?}", manager.kept());
    }
    for attached in all {
        world.detach(attached).await?;
    }
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    assert!(files(world)?.is_empty(), "{:?}", files(world)?);
    Ok(())
}

fn shows(attachment: &AttachmentProperties, image: &Image) -> bool {
    attachment.backing_file.strip_suffix(b"\0") == Some(image.path.as_os_str().as_encoded_bytes())
}
