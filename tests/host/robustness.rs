//! Daemons that die, that are too many, and that are asked to end.

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::eventually;
use loopd_tests::world::World;
use loopd_tests::{Outcome, ROOT};

loopd_tests::tests! {
    "robustness";
    Setup::None => [
        killed_daemon,
        killed_daemon_and_an_opener,
        second_daemon,
        asked_to_end,
        readiness_is_notified,
        no_bus,
        a_thousand_calls,
    ];
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
