//! The configuration: read at the start and at SIGHUP, rejected if it is invalid.

use std::path::Path;

use loopd_dbus::{AttachOptions, ErrorKind};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::{GAMES, Outcome};

loopd_tests::tests! {
    "config";
    Setup::StandIn(Answer::Yes) => [limits_change_on_sighup];
    Setup::None => [broken_configuration_prevents_the_start, check_config_reports_errors];
}

/// Sends SIGHUP, and waits for a line in the log.
async fn reload(fixture: &mut Fixture, expected: &str) -> Outcome {
    let before = fixture.log().len();
    fixture.daemon()?.reload()?;
    eventually(&format!("the log says {expected:?}"), async || Ok(fixture.log()[before..].contains(expected)))
        .await
}

/// The number of attachments that a user can make.
async fn attachments_of_a_user(fixture: &mut Fixture, image: &Image) -> anyhow::Result<usize> {
    let path = image.name();
    let mut probes = Vec::new();
    loop {
        let mut probe = fixture.probe_hold(GAMES, ["--hold", "setup", "regular", path])?;
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
    fixture.assert_no_leak().await?;
    Ok(had)
}

async fn limits_change_on_sighup(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    fixture.configure("[limits]\nattachments = 2\n")?;
    fixture.restart_daemon(&[]).await?;
    assert_eq!(attachments_of_a_user(fixture, &image).await?, 2);

    fixture.configure("[limits]\nattachments = 1\n")?;
    reload(fixture, "reloaded the configuration").await?;
    assert_eq!(attachments_of_a_user(fixture, &image).await?, 1);

    // An invalid file changes nothing, even if some of its values are valid.
    fixture.configure("[limits]\nattachments = 3\ncals = 5\n")?;
    reload(fixture, "loopd.toml:3:1: unknown field `cals`").await?;
    assert_eq!(attachments_of_a_user(fixture, &image).await?, 1);

    let drop_ins = fixture.directory.join("loopd.toml.d");
    std::fs::create_dir(&drop_ins)?;
    std::fs::write(drop_ins.join("10-more.toml"), "[limits]\nattachments = 3\n")?;
    fixture.configure("[limits]\nattachments = 1\n")?;
    reload(fixture, "reloaded the configuration").await?;
    assert_eq!(attachments_of_a_user(fixture, &image).await?, 3);
    Ok(())
}

async fn broken_configuration_prevents_the_start(fixture: &mut Fixture) -> Outcome {
    let directory = fixture.directory.join("second");
    std::fs::create_dir(&directory)?;
    std::fs::write(directory.join("loopd.toml"), "[times]\nidle-exit = \"soon\"\n")?;
    let mut second = fixture.spawn_daemon(&directory)?;
    let status = second.end().await?;
    assert_eq!(status.code(), Some(78), "{}", second.log());
    assert!(second.log().contains("loopd.toml:2:13: invalid type"), "{}", second.log());
    // The running daemon is not affected.
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&attached).await
}

async fn check_config_reports_errors(fixture: &mut Fixture) -> Outcome {
    let check = async |file: &Path| {
        let mut command = fixture.command(loopd_tests::host::built("loopd"));
        command.arg("--check-config").arg(file);
        output(command).await
    };
    let file = fixture.directory.join("loopd.toml");
    fixture.configure("[limits]\ncalls = 5\n")?;
    let good = check(&file).await?;
    assert!(good.status.success(), "{good:?}");
    assert_eq!(String::from_utf8(good.stdout)?, format!("{}: ok\n", file.display()));

    fixture.configure("[limits]\ncals = 5\n")?;
    let bad = check(&file).await?;
    assert_eq!((bad.status.code(), bad.stdout.as_slice()), (Some(1), &b""[..]));
    let complaint = String::from_utf8(bad.stderr)?;
    assert!(complaint.starts_with(&format!("{}:2:1: unknown field `cals`", file.display())), "{complaint}");
    Ok(())
}
