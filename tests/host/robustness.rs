//! Daemons that die, that are too many, and that are asked to end.

use std::time::{Duration, Instant};

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::daemon::Daemon;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome, ROOT};

loopd_tests::tests! {
    "robustness";
    Setup::None => [
        killed_daemon,
        killed_daemon_and_an_opener,
        second_daemon,
        asked_to_end,
        readiness_is_notified,
        no_bus,
        old_kernel,
        no_loop_driver,
        a_thousand_calls,
    ];
    Setup::StandIn(Answer::Never) => [asked_twice_to_end];
}

async fn killed_daemon(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let client = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let persistent = world.attach(&image.open()?, &options).await?;
    let mut daemon = world.take_daemon().unwrap();
    daemon.kill().await?;
    drop(daemon);
    eventually("the kernel takes the client's", async || Ok(!client.device.bound())).await?;
    assert!(persistent.device.bound());

    world.restart_daemon(&[]).await?;
    assert_eq!(world.list(false).await?.len(), 1);
    assert!(world.properties(&persistent.path).await?.managed);
    world.detach(&persistent).await?;
    assert!(!persistent.device.bound());
    Ok(())
}

async fn killed_daemon_and_an_opener(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let opener = std::fs::File::open(attached.device.node())?;
    let mut daemon = world.take_daemon().unwrap();
    daemon.kill().await?;
    assert!(attached.device.bound(), "taken from under its opener");
    drop(opener);
    eventually("the last close takes it", async || Ok(!attached.device.bound())).await?;
    world.restart_daemon(&[]).await
}

async fn second_daemon(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let folder = world.folder.join("second");
    std::fs::create_dir(&folder)?;
    let mut second = world.spawn_daemon(&folder)?;
    let status = second.end().await?;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(second.log().contains("org.loopd1"), "{}", second.log());
    // The first one does not mind.
    assert!(attached.device.bound());
    world.detach(&attached).await
}

async fn asked_to_end(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let client = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let persistent = world.attach(&image.open()?, &options).await?;
    // restart_daemon looks at the exit status.
    world.restart_daemon(&[]).await?;
    eventually("the client's is gone", async || Ok(!client.device.bound())).await?;
    assert!(persistent.device.bound());
    world.detach(&persistent).await
}

async fn readiness_is_notified(world: &mut World) -> Outcome {
    let path = world.folder.join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path)?;
    world.restart_daemon(&[("NOTIFY_SOCKET", path.to_str().unwrap())]).await?;
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while !said.contains("READY=1") {
        let length = tokio::time::timeout(loopd_tests::process::PATIENCE, socket.recv(&mut buffer)).await??;
        said += &String::from_utf8_lossy(&buffer[..length]);
    }
    Ok(())
}

async fn no_bus(world: &mut World) -> Outcome {
    let program = loopd_tests::host::built("loopd");
    let mut command = world.command(program);
    command.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
    let output = loopd_tests::process::output(command).await?;
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", output.status);
    assert!(!output.stderr.is_empty());
    Ok(())
}

/// What a daemon says that does not start, and is not to be started again.
async fn unfit(world: &World, wrapper: &[&str]) -> anyhow::Result<String> {
    let folder = world.folder.join("unfit");
    std::fs::create_dir(&folder)?;
    let mut daemon = Daemon::spawn(world.bus(), &folder, wrapper, &[])?;
    let status = daemon.end().await?;
    assert_eq!(status.code(), Some(78), "{status}: {}", daemon.log());
    Ok(daemon.log())
}

async fn old_kernel(world: &mut World) -> Outcome {
    // It says 2.6 then.
    let said = unfit(world, &["setarch", "--uname-2.6"]).await?;
    assert!(said.contains("Linux 2.6") && said.contains("needs Linux 5.15 or newer"), "{said}");
    Ok(())
}

async fn no_loop_driver(world: &mut World) -> Outcome {
    let socket = world.folder.join("bus");
    let script = r#"mount --bind "$0" /dev/loop-control && exec "$@""#;
    let said = unfit(world, &["unshare", "--mount", "sh", "-c", script, socket.to_str().unwrap()]).await?;
    assert!(said.contains("/dev/loop-control") && said.contains("modprobe loop"), "{said}");
    Ok(())
}

async fn asked_twice_to_end(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let mut probe = world.probe_hold(GAMES, ["--interactive", "setup", "regular", path])?;
    let polkit = world.stand_in()?;
    eventually("polkit is asked", async || Ok(polkit.checks().len() == 1)).await?;
    let mut daemon = world.take_daemon().unwrap();
    daemon.ask_to_end()?;
    // It gives its name up, and waits for the call that is under way.
    eventually("the name is free", async || Ok(!world.daemon_is_there().await?)).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(daemon.exited()?.is_none());
    let asked_again = Instant::now();
    daemon.ask_to_end()?;
    let status = daemon.end().await?;
    assert!(status.success(), "{status}");
    assert!(asked_again.elapsed() < Duration::from_secs(2), "{:?}", asked_again.elapsed());
    assert!(probe.reply().await?.attached().is_err());
    Ok(())
}

/// The daemon's descriptors and its answers stay what they are.
async fn a_thousand_calls(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap().to_owned();
    let file = image.open()?;
    for _ in 0..1000 {
        let options = AttachOptions { offset: 100, ..AttachOptions::default() };
        world.attach_fails(&file, &options).await?;
    }
    world.probe(ROOT, ["setup", "opath", &path]).await?.refused(ErrorKind::InvalidBackingFile)?;
    world.assert_no_leak().await
}
