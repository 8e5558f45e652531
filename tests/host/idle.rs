//! The daemon ends when nobody needs it, and no call is lost over it.

use std::os::fd::AsFd as _;
use std::time::Duration;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, Lifetime, ListOptions};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::world::{Attached, World};
use loopd_tests::{Outcome, rounds};
use tokio::time::sleep;

loopd_tests::tests! {
    "idle";
    Setup::None => [
        ends_and_is_started_again,
        stays_while_something_is_attached,
        not_before_it_is_told_to,
        a_call_in_the_last_moment_is_answered,
        what_is_attached_in_the_last_moment_stays,
        a_thousand_calls_around_its_end,
    ];
}

const IDLE: Duration = Duration::from_millis(30);
const CONFIGURATION: &str = "[times]\nidle-exit = 0.03\n";

async fn ended(world: &World) -> Outcome {
    eventually("the daemon ends", async || Ok(!world.daemon_is_there().await?)).await
}

async fn ends_and_is_started_again(world: &mut World) -> Outcome {
    world.configure(CONFIGURATION)?;
    world.restart_daemon(&[]).await?;
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    world.take_daemon();
    world.activate_daemon().await?;
    for _ in 0..3 {
        world.manager.version().await?;
        ended(world).await?;
    }
    Ok(())
}

async fn stays_while_something_is_attached(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    world.configure(CONFIGURATION)?;
    world.activate_daemon().await?;
    let foreign = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = world.attach(&image.open()?, &options).await?;
        let opener = std::fs::File::open(attached.device.node())?;
        sleep(10 * IDLE).await;
        assert!(world.daemon_is_there().await?);
        world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        sleep(10 * IDLE).await;
        assert!(world.daemon_is_there().await?, "{lifetime}: it is still being detached");
        drop(opener);
        // What is not loopd's does not keep it.
        ended(world).await?;
        assert!(!attached.device.bound());
    }
    run("losetup", ["-d", foreign.trim()]).await.map(drop)
}

async fn not_before_it_is_told_to(world: &mut World) -> Outcome {
    world.configure("[times]\nidle-exit = 0\n")?;
    world.restart_daemon(&[]).await?;
    sleep(10 * IDLE).await;
    assert!(world.daemon_is_there().await?);
    world.configure(CONFIGURATION)?;
    world.daemon()?.reload()?;
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    world.take_daemon();
    Ok(())
}

/// So long that a busy machine does not matter.
const LONG_IDLE: Duration = Duration::from_millis(400);
const LONG_CONFIGURATION: &str = "[times]\nidle-exit = 0.4\n";

/// Stops the bus for so long that the daemon gives up its name after the call was made, and learns of
/// the call before it has lost the name.
async fn in_the_last_moment<T>(world: &World, call: impl Future<Output = T>) -> anyhow::Result<T> {
    world.manager.version().await?;
    sleep(LONG_IDLE / 4).await;
    world.bus().freeze(true)?;
    let thaw = async {
        sleep(2 * LONG_IDLE).await;
        world.bus().freeze(false)
    };
    let (answer, thawed) = futures_util::future::join(call, thaw).await;
    thawed?;
    Ok(answer)
}

async fn a_call_in_the_last_moment_is_answered(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let file = image.open()?;
    world.configure(LONG_CONFIGURATION)?;
    world.restart_daemon(&[]).await?;
    // Without a service manager the daemon takes its name again.
    let pid = world.daemon()?.pid();
    let attached = in_the_last_moment(world, world.attach(&file, &AttachOptions::default())).await??;
    assert!(world.log().contains("a call arrived during the exit on idle"), "{}", world.log());
    assert!(attached.device.bound());
    world.detach(&attached).await?;
    assert_eq!(world.daemon()?.pid(), pid);
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    world.take_daemon();
    // With one it cannot go back, answers, and ends.
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    in_the_last_moment(world, world.manager.list(&ListOptions::default())).await??;
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    world.take_daemon();
    Ok(())
}

/// The daemon has told the service manager that it ends: another one is to take over.
async fn what_is_attached_in_the_last_moment_stays(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let file = image.open()?;
    world.configure(LONG_CONFIGURATION)?;
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let attached = in_the_last_moment(world, world.attach(&file, &AttachOptions::default())).await??;
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(75), "{status}");
    world.take_daemon();
    assert!(attached.device.bound());
    world.restart_managed(&manager).await?;
    assert_eq!(world.properties(&attached.path).await?.state, "attached");
    world.detach(&attached).await?;
    let status = world.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    world.take_daemon();
    Ok(())
}

/// Eight clients call at moments around the end of the daemon, each in its own way.
async fn a_thousand_calls_around_its_end(world: &mut World) -> Outcome {
    let (mut random, rounds) = rounds::of("idle::a_thousand_calls_around_its_end", 125);
    let image = Image::sparse(&world.folder, "image", MIB)?;
    world.configure(CONFIGURATION)?;
    world.activate_daemon().await?;
    let mut clients = Vec::new();
    for _ in 0..8 {
        let connection = world.connect().await?;
        clients.push((Manager::new(&connection, Interaction::Forbidden).await?, connection));
    }
    for round in 0..rounds {
        world.manager.version().await?;
        let mut calls = tokio::task::JoinSet::new();
        for (kind, (client, connection)) in clients.iter().enumerate() {
            let (client, connection, file) = (client.clone(), connection.clone(), image.open()?);
            let delay = IDLE + Duration::from_micros(random.u64(..6000));
            calls.spawn(async move {
                sleep(delay).await;
                call(kind, &client, &connection, &file).await
            });
        }
        while let Some(answer) = calls.join_next().await {
            answer?.map_err(|error| error.context(format!("round {round}")))?;
        }
    }
    ended(world).await?;
    let log = world.log();
    let count = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    let (starts, returns) = (count("ready"), count("a call arrived during the exit on idle"));
    println!("{} calls, {starts} starts, {returns} in the last moment", 9 * rounds);
    assert!(starts as u64 > rounds / 20 && returns > 0, "it was timed badly");
    Ok(())
}

async fn call(
    kind: usize,
    client: &Manager,
    connection: &zbus::Connection,
    file: &std::fs::File,
) -> anyhow::Result<()> {
    match kind % 4 {
        0 => drop(client.version().await?),
        1 => drop(client.list(&ListOptions::default()).await?),
        2 => {
            let path = loopd_dbus::names::ROOT_PATH;
            let name = loopd_dbus::names::BUS_NAME;
            let objects = zbus::fdo::ObjectManagerProxy::new(connection, name, path).await?;
            objects.get_managed_objects().await?;
        }
        _ => {
            let options = AttachOptions { wait: false, ..AttachOptions::default() };
            let attached = Attached::new(client.setup_loop(file.as_fd(), &options).await?)?;
            client.detach(&attached.device.node(), DetachOptions::default()).await?;
        }
    }
    Ok(())
}
