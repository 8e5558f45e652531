//! Attachments live and die with their clients.

use std::os::fd::AsFd as _;
use std::time::Duration;

use loopd_dbus::AttachOptions;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::sysfs;
use loopd_tests::world::{Attached, World};
use loopd_tests::{GAMES, Outcome, ROOT, rounds};

loopd_tests::tests! {
    "clients";
    Setup::None => [
        killed_client,
        client_that_says_goodbye,
        persistent_survives,
        two_devices_of_one_client,
        in_use_at_its_end,
        reader_at_its_end,
        gone_before_it_is_served,
        killed_at_any_moment,
    ];
    Setup::StandIn(Answer::Yes) => [two_clients_of_one_user];
    Setup::StandIn(Answer::Never) => [killed_while_polkit_asks];
}

/// A held probe of root's and what it attached.
async fn hold(
    world: &World,
    image: &Image,
    options: &[&str],
) -> anyhow::Result<(loopd_tests::probe::Probe, Attached)> {
    let path = image.path.to_str().unwrap();
    let words = ["--hold", "setup", "regular", path].into_iter().chain(options.iter().copied());
    let mut probe = world.probe_hold(ROOT, words)?;
    let attached = probe.reply().await?.attached()?;
    assert!(attached.device.bound());
    Ok((probe, attached))
}

async fn killed_client(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (probe, attached) = hold(world, &image, &[]).await?;
    probe.kill().await?;
    world.gone(&attached).await
}

async fn client_that_says_goodbye(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (probe, attached) = hold(world, &image, &[]).await?;
    probe.close().await?;
    world.gone(&attached).await
}

async fn persistent_survives(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let other = Image::sparse(&world.folder, "other", MIB)?;
    let (first, persistent) = hold(world, &image, &["lifetime=s:persistent"]).await?;
    let (second, sentinel) = hold(world, &other, &[]).await?;
    first.kill().await?;
    second.kill().await?;
    // The daemon saw the first one go before it saw the second.
    world.gone(&sentinel).await?;
    assert!(persistent.device.bound());
    assert_eq!(world.properties(&persistent.path).await?.state, "attached");
    world.detach(&persistent).await
}

async fn two_devices_of_one_client(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let connection = world.connect().await?;
    let manager = Manager::new(&connection, Interaction::Forbidden).await?;
    let mut all = Vec::new();
    for _ in 0..2 {
        let file = image.open()?;
        let options = AttachOptions::default();
        all.push(Attached::new(manager.setup_loop(file.as_fd(), &options).await?)?);
    }
    assert_ne!(all[0].device, all[1].device);
    drop(manager);
    connection.close().await?;
    for attached in &all {
        world.gone(attached).await?;
    }
    Ok(())
}

async fn two_clients_of_one_user(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let mut first = world.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
    let mut second = world.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
    let one = first.reply().await?.attached()?;
    let two = second.reply().await?.attached()?;
    first.kill().await?;
    world.gone(&one).await?;
    assert!(two.device.bound());
    assert_eq!(world.properties(&two.path).await?.state, "attached");
    second.kill().await?;
    world.gone(&two).await
}

async fn in_use_at_its_end(world: &mut World) -> Outcome {
    let uuid = "11111111-2222-3333-4444-00000000000d";
    let image = Image::ext4(&world.folder, "image", "in-use", uuid).await?;
    let (probe, attached) = hold(world, &image, &[]).await?;
    let mounted = Mounted::new(attached.device, &world.folder, "mount point").await?;
    let signals = world.signals().await?;
    probe.kill().await?;
    let is_detaching = |value: &zbus::OwnedVariant| <&str>::try_from(value).is_ok_and(|s| s == "detaching");
    signals.changed(&attached.path, "State", is_detaching).await?;
    assert_eq!(world.properties(&attached.path).await?.state, "detaching");
    assert!(attached.device.bound());
    std::fs::write(mounted.folder.join("file"), "data")?;
    assert_eq!(std::fs::read(mounted.folder.join("file"))?, b"data");
    mounted.unmount().await?;
    world.gone(&attached).await
}

async fn reader_at_its_end(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let (probe, attached) = hold(world, &image, &[]).await?;
    let reader = std::fs::File::open(attached.device.node())?;
    probe.kill().await?;
    eventually("it is detaching", async || Ok(world.properties(&attached.path).await?.state == "detaching"))
        .await?;
    drop(reader);
    world.gone(&attached).await
}

/// When the daemon takes up the call, its sender has left the bus.
async fn gone_before_it_is_served(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for _ in 0..10 {
        world.daemon()?.freeze(true)?;
        let connection = world.connect().await?;
        let name = connection.unique_name().unwrap().clone();
        let file = image.open()?;
        for wait in [true, false] {
            let options = AttachOptions { wait, ..AttachOptions::default() };
            let call = zbus::Message::method_call(ROOT_PATH, "SetupLoop")
                .destination(BUS_NAME)
                .interface(MANAGER)
                .build(&(zbus::Fd::from(file.as_fd()), options.encode()))?;
            connection.send(&call).await?;
        }
        connection.close().await?;
        let names = zbus::fdo::DBusProxy::new(&world.connection).await?;
        eventually("the client is gone", async || Ok(!names.name_has_owner((&name).into()).await?)).await?;
        world.daemon()?.freeze(false)?;
        // The answer to a later call: the daemon has taken up the earlier ones.
        world.manager.version().await?;
    }
    world.assert_no_leak().await?;
    assert!(world.list(false).await?.is_empty());
    Ok(())
}

async fn killed_while_polkit_asks(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let probe = world.probe_hold(GAMES, ["--hold", "--interactive", "setup", "regular", path])?;
    let polkit = world.stand_in()?;
    eventually("polkit is asked", async || Ok(polkit.checks().len() == 1)).await?;
    let id = polkit.checks()[0].cancellation_id.clone();
    assert_ne!(id, "", "the check cannot be cancelled");
    probe.kill().await?;
    eventually("the question is taken back", async || Ok(polkit.cancelled().contains(&id))).await?;
    assert!(sysfs::bound_by_tests(&world.folder).is_empty());
    assert!(world.list(false).await?.is_empty());
    Ok(())
}

/// A client that is killed within five milliseconds after it has sent its call.
async fn killed_at_any_moment(world: &mut World) -> Outcome {
    let (mut random, rounds) = rounds::of("clients::killed_at_any_moment", 200);
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap().to_owned();
    for _ in 0..rounds {
        let wait = if random.bool() { "wait=b:true" } else { "wait=b:false" };
        let mut probe = world.probe_hold(ROOT, ["--hold", "--prompted", "setup", "regular", &path, wait])?;
        probe.ready().await?;
        probe.go().await?;
        tokio::time::sleep(Duration::from_micros(random.u64(0..5000))).await;
        probe.kill().await?;
    }
    world.assert_no_leak().await?;
    assert!(world.list(false).await?.is_empty());
    Ok(())
}
