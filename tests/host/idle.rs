//! Exit on idle loses no call.

use std::os::fd::AsFd as _;
use std::time::Duration;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, Lifetime, ListOptions};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::{Outcome, rounds};
use tokio::time::sleep;

loopd_tests::tests! {
    "idle";
    Setup::None => [
        daemon_exits_on_idle_and_is_activated_again,
        daemon_stays_while_attachments_exist,
        daemon_does_not_exit_before_the_idle_time,
        call_during_the_exit_is_answered,
        attach_during_the_exit_is_kept,
        thousand_calls_around_the_exit_are_answered,
    ];
}

const IDLE: Duration = Duration::from_millis(30);
const CONFIGURATION: &str = "[times]\nidle-exit = 0.03\n";

async fn ended(fixture: &Fixture) -> Outcome {
    eventually("the daemon ends", async || Ok(!fixture.daemon_is_there().await?)).await
}

async fn daemon_exits_on_idle_and_is_activated_again(fixture: &mut Fixture) -> Outcome {
    fixture.configure(CONFIGURATION)?;
    fixture.restart_daemon(&[]).await?;
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    fixture.take_daemon();
    fixture.activate_daemon().await?;
    for _ in 0..3 {
        fixture.manager.version().await?;
        ended(fixture).await?;
    }
    Ok(())
}

async fn daemon_stays_while_attachments_exist(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    fixture.configure(CONFIGURATION)?;
    fixture.activate_daemon().await?;
    let foreign = run("losetup", ["-f", "--show", image.name()]).await?;
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        let opener = std::fs::File::open(attached.device.node())?;
        // Longer than it stays without an attachment.
        sleep(10 * IDLE).await;
        assert!(fixture.daemon_is_there().await?);
        fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        sleep(10 * IDLE).await;
        assert!(fixture.daemon_is_there().await?, "{lifetime}: it is still being detached");
        drop(opener);
        // A foreign device does not keep it running.
        ended(fixture).await?;
        assert!(!attached.device.bound());
    }
    run("losetup", ["-d", foreign.trim()]).await.map(drop)
}

async fn daemon_does_not_exit_before_the_idle_time(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[times]\nidle-exit = 0\n")?;
    fixture.restart_daemon(&[]).await?;
    sleep(10 * IDLE).await;
    assert!(fixture.daemon_is_there().await?);
    fixture.configure(CONFIGURATION)?;
    fixture.daemon()?.reload()?;
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    fixture.take_daemon();
    Ok(())
}

/// Long enough for a busy machine.
const LONG_IDLE: Duration = Duration::from_millis(400);
const LONG_CONFIGURATION: &str = "[times]\nidle-exit = 0.4\n";

/// Stops the bus until the daemon has decided to release its name, with the call already sent. So the daemon
/// receives the call before it has lost the name.
async fn in_the_last_moment<T>(fixture: &Fixture, call: impl Future<Output = T>) -> anyhow::Result<T> {
    fixture.manager.version().await?;
    sleep(LONG_IDLE / 4).await;
    fixture.bus().freeze(true)?;
    let thaw = async {
        sleep(2 * LONG_IDLE).await;
        fixture.bus().freeze(false)
    };
    let (answer, thawed) = futures_util::future::join(call, thaw).await;
    thawed?;
    Ok(answer)
}

async fn call_during_the_exit_is_answered(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let file = image.open()?;
    fixture.configure(LONG_CONFIGURATION)?;
    fixture.restart_daemon(&[]).await?;
    // Without a service manager the daemon acquires its name again.
    let pid = fixture.daemon()?.pid();
    let attached = in_the_last_moment(fixture, fixture.attach(&file, &AttachOptions::default())).await??;
    assert!(fixture.log().contains("a call arrived during the exit on idle"), "{}", fixture.log());
    assert!(attached.device.bound());
    fixture.detach(&attached).await?;
    assert_eq!(fixture.daemon()?.pid(), pid);
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    fixture.take_daemon();
    // With a service manager it cannot stay: it answers and exits.
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    in_the_last_moment(fixture, fixture.manager.list(&ListOptions::default())).await??;
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    fixture.take_daemon();
    Ok(())
}

/// The daemon has notified STOPPING=1, so another daemon takes over.
async fn attach_during_the_exit_is_kept(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let file = image.open()?;
    fixture.configure(LONG_CONFIGURATION)?;
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let attached = in_the_last_moment(fixture, fixture.attach(&file, &AttachOptions::default())).await??;
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(75), "{status}");
    fixture.take_daemon();
    assert!(attached.device.bound());
    fixture.restart_managed(&manager).await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
    fixture.detach(&attached).await?;
    let status = fixture.daemon()?.end().await?;
    assert_eq!(status.code(), Some(0), "{status}");
    fixture.take_daemon();
    Ok(())
}

/// Eight clients make different calls around the exit of the daemon.
async fn thousand_calls_around_the_exit_are_answered(fixture: &mut Fixture) -> Outcome {
    let (mut random, rounds) = rounds::of("idle::thousand_calls_around_the_exit_are_answered", 125);
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    fixture.configure(CONFIGURATION)?;
    fixture.activate_daemon().await?;
    let mut clients = Vec::new();
    for _ in 0..8 {
        let connection = fixture.connect().await?;
        clients.push((Manager::new(&connection, Interaction::Forbidden).await?, connection));
    }
    for round in 0..rounds {
        fixture.manager.version().await?;
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
    ended(fixture).await?;
    let log = fixture.log();
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
