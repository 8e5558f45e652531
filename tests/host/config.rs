//! The configuration: read at the start and at SIGHUP, refused where it is broken.

use std::path::Path;

use loopd_dbus::{AttachOptions, ErrorKind};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome};

loopd_tests::tests! {
    "config";
    Setup::StandIn(Answer::Yes) => [limits_change_at_a_signal];
    Setup::None => [broken_at_the_start, checked_by_hand];
}

/// What the daemon says from now on.
async fn reload(world: &mut World, expected: &str) -> Outcome {
    let said = world.log().len();
    world.daemon()?.reload()?;
    eventually(&format!("the log says {expected:?}"), async || Ok(world.log()[said..].contains(expected)))
        .await
}

/// How many attachments one connection of a user can have.
async fn attachments_of_a_user(world: &mut World, image: &Image) -> anyhow::Result<usize> {
    let path = image.path.to_str().unwrap();
    let mut probes = Vec::new();
    loop {
        let mut probe = world.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
        let reply = probe.reply().await?;
        if reply.attached().is_err() {
            reply.refused(ErrorKind::LimitExceeded)?;
            probe.close().await?;
            break;
        }
        probes.push(probe);
    }
    let had = probes.len();
    for probe in probes {
        probe.close().await?;
    }
    world.assert_no_leak().await?;
    Ok(had)
}

async fn limits_change_at_a_signal(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    world.configure("[limits]\nattachments = 2\n")?;
    world.restart_daemon(&[]).await?;
    assert_eq!(attachments_of_a_user(world, &image).await?, 2);

    world.configure("[limits]\nattachments = 1\n")?;
    reload(world, "reloaded the configuration").await?;
    assert_eq!(attachments_of_a_user(world, &image).await?, 1);

    // A broken one changes nothing, whatever else it says.
    world.configure("[limits]\nattachments = 3\ncals = 5\n")?;
    reload(world, "loopd.toml:3:1: unknown field `cals`").await?;
    assert_eq!(attachments_of_a_user(world, &image).await?, 1);

    let drop_ins = world.folder.join("loopd.toml.d");
    std::fs::create_dir(&drop_ins)?;
    std::fs::write(drop_ins.join("10-more.toml"), "[limits]\nattachments = 3\n")?;
    world.configure("[limits]\nattachments = 1\n")?;
    reload(world, "reloaded the configuration").await?;
    assert_eq!(attachments_of_a_user(world, &image).await?, 3);
    Ok(())
}

async fn broken_at_the_start(world: &mut World) -> Outcome {
    let folder = world.folder.join("second");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("loopd.toml"), "[times]\nidle-exit = \"soon\"\n")?;
    let mut second = world.spawn_daemon(&folder)?;
    let status = second.end().await?;
    assert_eq!(status.code(), Some(78), "{}", second.log());
    assert!(second.log().contains("loopd.toml:2:13: invalid type"), "{}", second.log());
    // The one that runs does not mind.
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&attached).await
}

async fn checked_by_hand(world: &mut World) -> Outcome {
    let check = async |file: &Path| {
        let mut command = world.command(loopd_tests::host::built("loopd"));
        command.arg("--check-config").arg(file);
        output(command).await
    };
    let file = world.folder.join("loopd.toml");
    world.configure("[limits]\ncalls = 5\n")?;
    let good = check(&file).await?;
    assert!(good.status.success(), "{good:?}");
    assert_eq!(String::from_utf8(good.stdout)?, format!("{}: ok\n", file.display()));

    world.configure("[limits]\ncals = 5\n")?;
    let bad = check(&file).await?;
    assert_eq!((bad.status.code(), bad.stdout.as_slice()), (Some(1), &b""[..]));
    let complaint = String::from_utf8(bad.stderr)?;
    assert!(complaint.starts_with(&format!("{}:2:1: unknown field `cals`", file.display())), "{complaint}");
    Ok(())
}
