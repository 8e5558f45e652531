//! Backing files whose file system does not answer: only their own client waits.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, ListOptions, Overlap};
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::service_manager::ServiceManager;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::{GAMES, Outcome, udev};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

loopd_tests::tests! {
    "hanging";
    Setup::None => [
        hanging_stat_delays_only_its_caller,
        hanging_read_delays_only_its_device,
        hanging_write_back_delays_only_its_device,
        client_with_a_hanging_device_disconnects,
        restart_with_a_hanging_device,
        sigterm_with_a_hanging_device,
        failing_file_system_is_reported,
    ];
    Setup::StandIn(Answer::Yes) => [fuse_file_of_a_user_is_attached];
}

const BYTES: usize = 16 << 20;
/// A time limit for calls that must not wait for the file system.
const SOON: Duration = Duration::from_secs(8);

/// Without waiting for udev, which hangs itself on such a device.
fn options() -> AttachOptions {
    AttachOptions { wait: false, ..AttachOptions::default() }
}

/// Checks that other clients are served.
async fn others_are_served(fixture: &Fixture) -> Outcome {
    for overlap in [Overlap::Allow, Overlap::Refuse, Overlap::Reuse] {
        other_is_served(fixture, overlap).await?;
    }
    Ok(())
}

async fn other_is_served(fixture: &Fixture, overlap: Overlap) -> Outcome {
    let image = Image::sparse(&fixture.directory, format!("other {overlap:?}"), MIB)?;
    let options = AttachOptions { overlap, ..options() };
    let attached = timeout(SOON, fixture.attach(&image.open()?, &options)).await??;
    let all = ListOptions { all: true, ..ListOptions::default() };
    let list = timeout(SOON, fixture.manager.list(&all)).await??;
    assert!(list.iter().any(|(path, _)| *path == attached.path));
    timeout(SOON, fixture.detach(&attached)).await??;
    Ok(std::fs::remove_file(&image.path)?)
}

async fn hanging_stat_delays_only_its_caller(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let connection = fixture.connect().await?;
    let client = Manager::new(&connection, Interaction::Forbidden).await?;
    let file = hanging.open()?;
    hanging.hang();
    let call = tokio::spawn(async move { client.setup_loop(file.as_fd(), &options()).await });
    hanging.asked().await?;
    others_are_served(fixture).await?;
    assert!(!call.is_finished());
    connection.close().await?;
    others_are_served(fixture).await?;
    hanging.go_on();
    assert!(call.await?.is_err());
    fixture.assert_no_leak().await
}

async fn hanging_read_delays_only_its_device(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let attached = fixture.attach(&hanging.open()?, &AttachOptions::default()).await?;
    hanging.hang();
    let node = attached.device.node();
    let reader = spawn_blocking(move || File::open(node)?.read_exact_at(&mut [0; 512], 5 << 20));
    hanging.asked().await?;
    others_are_served(fixture).await?;
    let error = timeout(SOON, fixture.detach_fails(attached.device)).await??;
    expect_kind(&error, ErrorKind::Busy)?;
    hanging.go_on();
    reader.await??;
    fixture.detach(&attached).await
}

/// Writes to the device of a file system that hangs: each close of the device waits for the data to be written back.
fn leave_dirty_data(hanging: &Hanging, attached: &Attached) -> Outcome {
    let node = File::options().write(true).open(attached.device.node())?;
    hanging.hang();
    Ok(node.write_all_at(&[7; 4096], 0)?)
}

async fn hanging_write_back_delays_only_its_device(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let attached = fixture.attach(&hanging.open()?, &AttachOptions::default()).await?;
    leave_dirty_data(&hanging, &attached)?;
    let lazy = DetachOptions { lazy: true };
    timeout(SOON, fixture.manager.detach(&attached.device.node(), lazy)).await??;
    hanging.asked().await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
    others_are_served(fixture).await?;
    let again = timeout(SOON, fixture.manager.detach(&attached.device.node(), lazy)).await?;
    let error = refusal(again)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("may hang"), "{error}");
    hanging.go_on();
    fixture.gone(&attached).await?;
    let mut written = [0; 4096];
    hanging.open()?.read_exact_at(&mut written, 0)?;
    assert_eq!(written, [7; 4096], "nothing is lost");
    Ok(())
}

async fn client_with_a_hanging_device_disconnects(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let connection = fixture.connect().await?;
    let client = Manager::new(&connection, Interaction::Forbidden).await?;
    let attached =
        Attached::new(client.setup_loop(hanging.open()?.as_fd(), &AttachOptions::default()).await?)?;
    leave_dirty_data(&hanging, &attached)?;
    // They end in one pass with the hanging one, and after it.
    let image = Image::sparse(&fixture.directory, "other-of-the-client", MIB)?;
    let mut others = Vec::new();
    for _ in 0..10 {
        others.push(Attached::new(client.setup_loop(image.open()?.as_fd(), &options()).await?)?);
    }
    drop(client);
    connection.close().await?;
    for other in &others {
        timeout(SOON, fixture.gone(other)).await??;
    }
    hanging.asked().await?;
    eventually(
        "it is detaching",
        async || Ok(fixture.properties(&attached.path).await?.state == "detaching"),
    )
    .await?;
    others_are_served(fixture).await?;
    hanging.go_on();
    fixture.gone(&attached).await
}

async fn restart_with_a_hanging_device(fixture: &mut Fixture) -> Outcome {
    let manager = ServiceManager::start(&fixture.directory)?;
    fixture.restart_managed(&manager).await?;
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let persistent = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let lasting = fixture.attach(&hanging.open()?, &persistent).await?;
    let bound = fixture.attach(&hanging.open()?, &AttachOptions::default()).await?;
    let other = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let all = [&lasting, &bound, &other];
    let mut before = Vec::new();
    for attached in all {
        before.push(fixture.properties(&attached.path).await?);
    }
    let foreign = run("losetup", ["-f", "--show", image.name()]).await?;
    udev::settle().await?;
    hanging.hang();
    fixture.kill_daemon().await?;
    fixture.restart_managed(&manager).await?;
    assert_eq!(fixture.properties(&other.path).await?, before[2]);
    let foreign = LoopDevice::from_node(foreign.trim())?;
    assert!(fixture.object_of(foreign).await?.is_some(), "others' devices are seen");
    run("losetup", ["-d", &foreign.node()]).await?;
    other_is_served(fixture, Overlap::Allow).await?;
    // Unknown properties are not guessed.
    let refuse = AttachOptions { overlap: Overlap::Refuse, ..options() };
    let error = timeout(SOON, fixture.attach_fails(&image.open()?, &refuse)).await??;
    expect_kind(&error, ErrorKind::Timeout)?;
    assert!(error.message.contains("does not answer"), "{error}");
    let error = timeout(SOON, fixture.detach_fails(lasting.device)).await??;
    expect_kind(&error, ErrorKind::Timeout)?;
    assert!(error.message.contains(&lasting.device.node()), "{error}");
    hanging.go_on();
    for (attached, before) in all.iter().zip(&before) {
        eventually("it is there again", async || {
            Ok(fixture.properties(&attached.path).await.is_ok_and(|after| after == *before))
        })
        .await?;
    }
    for attached in all {
        fixture.detach(attached).await?;
    }
    assert!(manager.kept().is_empty(), "{:?}", manager.kept());
    Ok(())
}

async fn sigterm_with_a_hanging_device(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    let file = hanging.open()?;
    hanging.hang();
    let client = fixture.manager.clone();
    let call = tokio::spawn(async move { client.setup_loop(file.as_fd(), &options()).await });
    hanging.asked().await?;
    fixture.daemon()?.ask_to_end()?;
    assert!(timeout(SOON, call).await??.is_err());
    eventually("the name is free", async || Ok(!fixture.daemon_is_there().await?)).await?;
    // The kernel keeps a process while a thread waits for a file system.
    hanging.go_on();
    fixture.restart_daemon(&[]).await
}

/// A device whose state is unknown is not reported as free.
async fn failing_file_system_is_reported(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, BYTES)?;
    fixture.end_daemon().await?;
    let foreign = losetup::attach(&[hanging.path().to_str().unwrap()]).await?;
    udev::settle().await?;
    hanging.break_down(true);
    fixture.restart_daemon(&[]).await?;
    other_is_served(fixture, Overlap::Refuse).await?;
    let error = fixture.detach_fails(foreign).await?;
    expect_kind(&error, ErrorKind::Kernel)?;
    assert!(error.message.contains(&foreign.node()) && error.message.contains("EIO"), "{error}");
    hanging.break_down(false);
    fixture.manager.detach(&foreign.node(), DetachOptions::default()).await?;
    assert!(!foreign.bound());
    Ok(())
}

async fn fuse_file_of_a_user_is_attached(fixture: &mut Fixture) -> Outcome {
    let alone = Hanging::mount_for(GAMES, &fixture.directory, BYTES)?;
    let path = alone.path();
    let reply = fixture.probe(GAMES, ["setup", "regular", path.to_str().unwrap()]).await?;
    let error = reply.refused(ErrorKind::InvalidBackingFile)?;
    assert!(format!("{error:?}").contains("allow_other"), "{error:?}");
    Ok(())
}
