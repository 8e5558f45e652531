//! Backing files whose file system does not answer: they cost their own client its time, and nobody else.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, ListOptions, Overlap};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::world::{Attached, World, expect_kind, refusal};
use loopd_tests::{GAMES, Outcome, udev};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

loopd_tests::tests! {
    "hanging";
    Setup::None => [
        a_file_that_cannot_be_looked_at,
        a_device_that_is_being_read,
        a_device_that_cannot_be_written_back,
        a_client_that_leaves_one_behind,
        a_restart_beside_one,
        an_end_beside_one,
        one_that_has_broken_down,
    ];
    Setup::StandIn(Answer::Yes) => [a_file_system_for_its_user_alone];
}

const BYTES: usize = 16 << 20;
/// More than anything takes that must not wait for the file system.
const SOON: Duration = Duration::from_secs(8);

/// Without udev, which hangs itself when a device does.
fn options() -> AttachOptions {
    AttachOptions { wait: false, ..AttachOptions::default() }
}

/// Everything else goes on meanwhile.
async fn others_go_on(world: &World) -> Outcome {
    for overlap in [Overlap::Allow, Overlap::Refuse, Overlap::Reuse] {
        other_goes_on(world, overlap).await?;
    }
    Ok(())
}

async fn other_goes_on(world: &World, overlap: Overlap) -> Outcome {
    let image = Image::sparse(&world.folder, format!("other {overlap:?}"), MIB)?;
    let options = AttachOptions { overlap, ..options() };
    let attached = timeout(SOON, world.attach(&image.open()?, &options)).await??;
    let all = ListOptions { all: true, ..ListOptions::default() };
    let list = timeout(SOON, world.manager.list(&all)).await??;
    assert!(list.iter().any(|(path, _)| *path == attached.path));
    timeout(SOON, world.detach(&attached)).await??;
    Ok(std::fs::remove_file(&image.path)?)
}

async fn a_file_that_cannot_be_looked_at(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let connection = world.connect().await?;
    let client = Manager::new(&connection, Interaction::Forbidden).await?;
    let file = hanging.open()?;
    hanging.hang();
    let call = tokio::spawn(async move { client.setup_loop(file.as_fd(), &options()).await });
    hanging.asked().await?;
    others_go_on(world).await?;
    assert!(!call.is_finished());
    connection.close().await?;
    others_go_on(world).await?;
    hanging.go_on();
    assert!(call.await?.is_err());
    world.assert_no_leak().await
}

async fn a_device_that_is_being_read(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let attached = world.attach(&hanging.open()?, &AttachOptions::default()).await?;
    hanging.hang();
    let node = attached.device.node();
    let reader = spawn_blocking(move || File::open(node)?.read_exact_at(&mut [0; 512], 5 << 20));
    hanging.asked().await?;
    others_go_on(world).await?;
    let error = timeout(SOON, world.detach_fails(attached.device)).await??;
    expect_kind(&error, ErrorKind::Busy)?;
    hanging.go_on();
    reader.await??;
    world.detach(&attached).await
}

/// Has each close of the device hang, udev's first: there is something to be written back.
fn write_in_vain(hanging: &Hanging, attached: &Attached) -> Outcome {
    let node = File::options().write(true).open(attached.device.node())?;
    hanging.hang();
    Ok(node.write_all_at(&[7; 4096], 0)?)
}

async fn a_device_that_cannot_be_written_back(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let attached = world.attach(&hanging.open()?, &AttachOptions::default()).await?;
    write_in_vain(&hanging, &attached)?;
    let lazy = DetachOptions { lazy: true };
    timeout(SOON, world.manager.detach(&attached.device.node(), lazy)).await??;
    hanging.asked().await?;
    assert_eq!(world.properties(&attached.path).await?.state, "detaching");
    others_go_on(world).await?;
    let again = timeout(SOON, world.manager.detach(&attached.device.node(), lazy)).await?;
    let error = refusal(again)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("may hang"), "{error}");
    hanging.go_on();
    world.gone(&attached).await?;
    let mut written = [0; 4096];
    hanging.open()?.read_exact_at(&mut written, 0)?;
    assert_eq!(written, [7; 4096], "nothing is lost");
    Ok(())
}

async fn a_client_that_leaves_one_behind(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let connection = world.connect().await?;
    let client = Manager::new(&connection, Interaction::Forbidden).await?;
    let attached =
        Attached::new(client.setup_loop(hanging.open()?.as_fd(), &AttachOptions::default()).await?)?;
    write_in_vain(&hanging, &attached)?;
    drop(client);
    connection.close().await?;
    eventually("it is detaching", async || Ok(world.properties(&attached.path).await?.state == "detaching"))
        .await?;
    others_go_on(world).await?;
    hanging.go_on();
    world.gone(&attached).await
}

async fn a_restart_beside_one(world: &mut World) -> Outcome {
    let manager = ServiceManager::start(&world.folder)?;
    world.restart_managed(&manager).await?;
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let persistent = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let lasting = world.attach(&hanging.open()?, &persistent).await?;
    let bound = world.attach(&hanging.open()?, &AttachOptions::default()).await?;
    let other = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let all = [&lasting, &bound, &other];
    let mut before = Vec::new();
    for attached in all {
        before.push(world.properties(&attached.path).await?);
    }
    let foreign = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    udev::settle().await?;
    hanging.hang();
    world.kill_daemon().await?;
    world.restart_managed(&manager).await?;
    assert_eq!(world.properties(&other.path).await?, before[2]);
    let foreign = LoopDevice::from_node(foreign.trim())?;
    assert!(world.object_of(foreign).await?.is_some(), "others' devices are seen");
    run("losetup", ["-d", &foreign.node()]).await?;
    other_goes_on(world, Overlap::Allow).await?;
    // What cannot be known is not guessed.
    let refuse = AttachOptions { overlap: Overlap::Refuse, ..options() };
    let error = timeout(SOON, world.attach_fails(&image.open()?, &refuse)).await??;
    expect_kind(&error, ErrorKind::Timeout)?;
    assert!(error.message.contains("does not answer"), "{error}");
    let error = timeout(SOON, world.detach_fails(lasting.device)).await??;
    expect_kind(&error, ErrorKind::Timeout)?;
    assert!(error.message.contains(&lasting.device.node()), "{error}");
    hanging.go_on();
    for (attached, before) in all.iter().zip(&before) {
        eventually("it is there again", async || {
            Ok(world.properties(&attached.path).await.is_ok_and(|after| after == *before))
        })
        .await?;
    }
    for attached in all {
        world.detach(attached).await?;
    }
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    Ok(())
}

async fn an_end_beside_one(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    let file = hanging.open()?;
    hanging.hang();
    let client = world.manager.clone();
    let call = tokio::spawn(async move { client.setup_loop(file.as_fd(), &options()).await });
    hanging.asked().await?;
    world.daemon()?.ask_to_end()?;
    assert!(timeout(SOON, call).await??.is_err());
    eventually("the name is free", async || Ok(!world.daemon_is_there().await?)).await?;
    // The kernel keeps a process whose thread waits for a file system.
    hanging.go_on();
    world.restart_daemon(&[]).await
}

/// A device of which nothing can be learned is not said to be free.
async fn one_that_has_broken_down(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, BYTES)?;
    world.end_daemon().await?;
    let foreign = run("losetup", ["-f", "--show", hanging.path().to_str().unwrap()]).await?;
    let foreign = LoopDevice::from_node(foreign.trim())?;
    udev::settle().await?;
    hanging.break_down(true);
    world.restart_daemon(&[]).await?;
    other_goes_on(world, Overlap::Refuse).await?;
    let error = world.detach_fails(foreign).await?;
    expect_kind(&error, ErrorKind::Kernel)?;
    assert!(error.message.contains(&foreign.node()) && error.message.contains("EIO"), "{error}");
    hanging.break_down(false);
    world.manager.detach(&foreign.node(), DetachOptions::default()).await?;
    assert!(!foreign.bound());
    Ok(())
}

async fn a_file_system_for_its_user_alone(world: &mut World) -> Outcome {
    let alone = Hanging::mount_for(GAMES, &world.folder, BYTES)?;
    let path = alone.path();
    let reply = world.probe(GAMES, ["setup", "regular", path.to_str().unwrap()]).await?;
    let error = reply.refused(ErrorKind::InvalidBackingFile)?;
    assert!(format!("{error:?}").contains("allow_other"), "{error:?}");
    Ok(())
}
