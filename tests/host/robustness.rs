//! Killed daemons, second daemons, and the end of the daemon.

use std::time::{Duration, Instant};

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::daemon::Daemon;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::{GAMES, Outcome, ROOT};

loopd_tests::tests! {
    "robustness";
    Setup::None => [
        killed_daemon_leaves_no_client_devices,
        device_of_a_killed_daemon_stays_while_open,
        second_daemon_exits,
        sigterm_ends_the_daemon,
        readiness_is_notified,
        missing_bus_is_reported,
        old_kernel_is_reported,
        missing_loop_driver_is_reported,
        thousand_calls_leak_nothing,
    ];
    Setup::StandIn(Answer::Never) => [second_sigterm_ends_at_once];
}

async fn killed_daemon_leaves_no_client_devices(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let client = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let persistent = fixture.attach(&image.open()?, &options).await?;
    let mut daemon = fixture.take_daemon().unwrap();
    daemon.kill().await?;
    drop(daemon);
    eventually("the kernel takes the client's", async || Ok(!client.device.bound())).await?;
    assert!(persistent.device.bound());

    fixture.restart_daemon(&[]).await?;
    assert_eq!(fixture.list(false).await?.len(), 1);
    assert!(fixture.properties(&persistent.path).await?.managed);
    fixture.detach(&persistent).await?;
    assert!(!persistent.device.bound());
    Ok(())
}

async fn device_of_a_killed_daemon_stays_while_open(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let opener = std::fs::File::open(attached.device.node())?;
    let mut daemon = fixture.take_daemon().unwrap();
    daemon.kill().await?;
    assert!(attached.device.bound(), "taken from under its opener");
    drop(opener);
    eventually("the last close takes it", async || Ok(!attached.device.bound())).await?;
    fixture.restart_daemon(&[]).await
}

async fn second_daemon_exits(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let directory = fixture.directory.join("second");
    std::fs::create_dir(&directory)?;
    let mut second = fixture.spawn_daemon(&directory)?;
    let status = second.end().await?;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(second.log().contains("org.loopd1"), "{}", second.log());
    // The first one is not affected.
    assert!(attached.device.bound());
    fixture.detach(&attached).await
}

async fn sigterm_ends_the_daemon(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let client = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let persistent = fixture.attach(&image.open()?, &options).await?;
    // restart_daemon checks the exit status.
    fixture.restart_daemon(&[]).await?;
    eventually("the client's is gone", async || Ok(!client.device.bound())).await?;
    assert!(persistent.device.bound());
    fixture.detach(&persistent).await
}

async fn readiness_is_notified(fixture: &mut Fixture) -> Outcome {
    let path = fixture.directory.join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path)?;
    fixture.restart_daemon(&[("NOTIFY_SOCKET", path.to_str().unwrap())]).await?;
    let mut output = String::new();
    let mut buffer = [0; 4096];
    while !output.contains("READY=1") {
        let length = tokio::time::timeout(loopd_tests::process::PATIENCE, socket.recv(&mut buffer)).await??;
        output += &String::from_utf8_lossy(&buffer[..length]);
    }
    Ok(())
}

async fn missing_bus_is_reported(fixture: &mut Fixture) -> Outcome {
    let program = loopd_tests::host::built("loopd");
    let mut command = fixture.command(program);
    command.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent");
    let output = loopd_tests::process::output(command).await?;
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", output.status);
    assert!(!output.stderr.is_empty());
    Ok(())
}

/// The message of a daemon that fails to start and must not be restarted.
async fn unfit(fixture: &Fixture, wrapper: &[&str]) -> anyhow::Result<String> {
    let directory = fixture.directory.join("unfit");
    std::fs::create_dir(&directory)?;
    let mut daemon = Daemon::spawn(fixture.bus(), &directory, wrapper, &[])?;
    let status = daemon.end().await?;
    assert_eq!(status.code(), Some(78), "{status}: {}", daemon.log());
    Ok(daemon.log())
}

async fn old_kernel_is_reported(fixture: &mut Fixture) -> Outcome {
    // uname(2) then reports 2.6.
    let output = unfit(fixture, &["setarch", "--uname-2.6"]).await?;
    assert!(output.contains("Linux 2.6") && output.contains("needs Linux 5.15 or newer"), "{output}");
    Ok(())
}

async fn missing_loop_driver_is_reported(fixture: &mut Fixture) -> Outcome {
    let socket = fixture.directory.join("bus");
    let script = r#"mount --bind "$0" /dev/loop-control && exec "$@""#;
    let output =
        unfit(fixture, &["unshare", "--mount", "sh", "-c", script, socket.to_str().unwrap()]).await?;
    assert!(output.contains("/dev/loop-control") && output.contains("modprobe loop"), "{output}");
    Ok(())
}

async fn second_sigterm_ends_at_once(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let mut probe = fixture.probe_hold(GAMES, ["--interactive", "setup", "regular", path])?;
    let polkit = fixture.stand_in()?;
    eventually("polkit is asked", async || Ok(polkit.checks().len() == 1)).await?;
    let mut daemon = fixture.take_daemon().unwrap();
    daemon.ask_to_end()?;
    // It releases its name, and waits for the call in progress.
    eventually("the name is free", async || Ok(!fixture.daemon_is_there().await?)).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(daemon.exited()?.is_none(), "it has not waited");
    let asked_again = Instant::now();
    daemon.ask_to_end()?;
    let status = daemon.end().await?;
    assert!(status.success(), "{status}");
    assert!(asked_again.elapsed() < Duration::from_secs(2), "{:?}", asked_again.elapsed());
    assert!(probe.reply().await?.attached().is_err());
    Ok(())
}

/// The daemon's descriptors and its replies do not change.
async fn thousand_calls_leak_nothing(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name().to_owned();
    let file = image.open()?;
    for _ in 0..1000 {
        let options = AttachOptions { offset: 1 << 40, ..AttachOptions::default() };
        fixture.attach_fails(&file, &options).await?;
    }
    fixture.probe(ROOT, ["setup", "opath", &path]).await?.refused(ErrorKind::InvalidBackingFile)?;
    fixture.assert_no_leak().await
}
