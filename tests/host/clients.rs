//! Attachments end with their clients.

use std::os::fd::AsFd as _;
use std::time::Duration;

use loopd_dbus::AttachOptions;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::sysfs;
use loopd_tests::{GAMES, Outcome, ROOT, rounds};

loopd_tests::tests! {
    "clients";
    Setup::None => [
        killed_client_loses_its_device,
        disconnected_client_loses_its_device,
        persistent_attachment_survives_its_client,
        all_devices_of_a_client_end_with_it,
        mounted_device_stays_until_it_is_unmounted,
        opened_device_stays_until_it_is_closed,
        call_of_a_disconnected_client_leaves_nothing,
        client_killed_at_any_moment_leaves_nothing,
    ];
    Setup::StandIn(Answer::Yes) => [clients_of_one_user_end_separately];
    Setup::StandIn(Answer::OpenPrompt) => [client_killed_during_a_prompt_leaves_nothing];
}

/// A probe of root that keeps its connection, and its attachment.
async fn hold(
    fixture: &Fixture,
    image: &Image,
    options: &[&str],
) -> anyhow::Result<(loopd_tests::probe::Probe, Attached)> {
    let path = image.name();
    let arguments = ["--hold", "setup", "regular", path].into_iter().chain(options.iter().copied());
    let mut probe = fixture.probe_hold(ROOT, arguments)?;
    let attached = probe.reply().await?.attached()?;
    assert!(attached.device.bound());
    Ok((probe, attached))
}

async fn killed_client_loses_its_device(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (probe, attached) = hold(fixture, &image, &[]).await?;
    probe.kill().await?;
    fixture.gone(&attached).await
}

async fn disconnected_client_loses_its_device(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (probe, attached) = hold(fixture, &image, &[]).await?;
    probe.close().await?;
    fixture.gone(&attached).await
}

async fn persistent_attachment_survives_its_client(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let other = Image::sparse(&fixture.directory, "other", MIB)?;
    let (first, persistent) = hold(fixture, &image, &["lifetime=s:persistent"]).await?;
    let (second, sentinel) = hold(fixture, &other, &[]).await?;
    first.kill().await?;
    second.kill().await?;
    // The daemon has noticed the end of the first client before that of the second.
    fixture.gone(&sentinel).await?;
    assert!(persistent.device.bound());
    assert_eq!(fixture.properties(&persistent.path).await?.state, "attached");
    fixture.detach(&persistent).await
}

async fn all_devices_of_a_client_end_with_it(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let connection = fixture.connect().await?;
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
        fixture.gone(attached).await?;
    }
    Ok(())
}

async fn clients_of_one_user_end_separately(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let mut first = fixture.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
    let mut second = fixture.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
    let one = first.reply().await?.attached()?;
    let two = second.reply().await?.attached()?;
    first.kill().await?;
    fixture.gone(&one).await?;
    assert!(two.device.bound());
    assert_eq!(fixture.properties(&two.path).await?.state, "attached");
    second.kill().await?;
    fixture.gone(&two).await
}

async fn mounted_device_stays_until_it_is_unmounted(fixture: &mut Fixture) -> Outcome {
    let uuid = "11111111-2222-3333-4444-00000000000d";
    let image = Image::ext4(&fixture.directory, "image", "in-use", uuid).await?;
    let (probe, attached) = hold(fixture, &image, &[]).await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
    let signals = fixture.signals().await?;
    probe.kill().await?;
    let is_detaching = |value: &zbus::OwnedVariant| <&str>::try_from(value).is_ok_and(|s| s == "detaching");
    signals.changed(&attached.path, "State", is_detaching).await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
    assert!(attached.device.bound());
    std::fs::write(mounted.directory.join("file"), "data")?;
    assert_eq!(std::fs::read(mounted.directory.join("file"))?, b"data");
    mounted.unmount().await?;
    fixture.gone(&attached).await
}

async fn opened_device_stays_until_it_is_closed(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let (probe, attached) = hold(fixture, &image, &[]).await?;
    let reader = std::fs::File::open(attached.device.node())?;
    probe.kill().await?;
    eventually(
        "it is detaching",
        async || Ok(fixture.properties(&attached.path).await?.state == "detaching"),
    )
    .await?;
    drop(reader);
    fixture.gone(&attached).await
}

/// The sender has disconnected before the daemon handles the call.
async fn call_of_a_disconnected_client_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for _ in 0..10 {
        fixture.daemon()?.freeze(true)?;
        let connection = fixture.connect().await?;
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
        let names = zbus::fdo::DBusProxy::new(&fixture.connection).await?;
        eventually("the client is gone", async || Ok(!names.name_has_owner((&name).into()).await?)).await?;
        fixture.daemon()?.freeze(false)?;
        // The reply to a later call: the daemon has handled the earlier ones.
        fixture.manager.version().await?;
    }
    fixture.assert_no_leak().await?;
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}

async fn client_killed_during_a_prompt_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let probe = fixture.probe_hold(GAMES, ["--hold", "--interactive", "setup", "regular", path])?;
    let polkit = fixture.stand_in()?;
    let prompts = || polkit.checks().into_iter().filter(|check| check.interactive);
    eventually("polkit prompts", async || Ok(prompts().count() == 1)).await?;
    let id = prompts().map(|check| check.cancellation_id).collect::<String>();
    assert_ne!(id, "", "the check cannot be cancelled");
    probe.kill().await?;
    eventually("the question is taken back", async || Ok(polkit.cancelled().contains(&id))).await?;
    assert!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}

/// A client that is killed within five milliseconds after it has sent its call.
async fn client_killed_at_any_moment_leaves_nothing(fixture: &mut Fixture) -> Outcome {
    let (mut random, rounds) = rounds::of("clients::client_killed_at_any_moment_leaves_nothing", 200);
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name().to_owned();
    for _ in 0..rounds {
        let wait = if random.bool() { "wait=b:true" } else { "wait=b:false" };
        let mut probe =
            fixture.probe_hold(ROOT, ["--hold", "--prompted", "setup", "regular", &path, wait])?;
        probe.ready().await?;
        probe.go().await?;
        tokio::time::sleep(Duration::from_micros(random.u64(0..5000))).await;
        probe.kill().await?;
    }
    fixture.assert_no_leak().await?;
    // The kernel detaches first, then its event arrives.
    eventually("no attachment is listed", async || Ok(fixture.list(false).await?.is_empty())).await
}
