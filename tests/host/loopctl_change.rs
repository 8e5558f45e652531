//! `loopctl resize`, `loopctl set` and `loopctl attach --overlap`; and how wide a table is.

use anyhow::{Context as _, Result, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::{GAMES, Outcome, ROOT, User};

loopd_tests::tests! {
    "loopctl_change";
    Setup::None => [
        resize_adopts_the_size_of_the_file,
        resize_by_file_changes_all_devices_of_it,
        set_changes_the_settings,
        set_reports_unsupported_settings,
        overlap_reuse_returns_the_device,
        overlap_refuse_fails,
        table_fits_the_terminal,
    ];
    Setup::StandIn(Answer::Yes) => [user_changes_own_devices];
    Setup::StandIn(Answer::No) => [user_cannot_change_other_devices];
}

/// Runs loopctl; returns its output or its error message.
async fn loopctl(fixture: &Fixture, user: User, arguments: &[&str]) -> Result<Result<String, String>> {
    let output = fixture.loopctl_as(user, arguments).await?;
    let text = |bytes| String::from_utf8(bytes);
    match output.status.code() {
        Some(0) => {
            ensure!(output.stderr.is_empty(), "{output:?}");
            Ok(Ok(text(output.stdout)?))
        }
        Some(1) => {
            ensure!(output.stdout.is_empty() && !output.stderr.is_empty(), "{output:?}");
            Ok(Err(text(output.stderr)?))
        }
        _ => anyhow::bail!("{output:?}"),
    }
}

async fn done(fixture: &Fixture, arguments: &[&str]) -> Result<String> {
    loopctl(fixture, ROOT, arguments).await?.map_err(anyhow::Error::msg)
}

async fn failed(fixture: &Fixture, arguments: &[&str]) -> Result<String> {
    match loopctl(fixture, ROOT, arguments).await? {
        Ok(printed) => anyhow::bail!("{arguments:?} should fail and printed {printed:?}"),
        Err(complaint) => Ok(complaint),
    }
}

async fn attach(fixture: &Fixture, arguments: &[&str]) -> Result<LoopDevice> {
    LoopDevice::from_node(done(fixture, &[&["attach"], arguments].concat()).await?.trim_end())
}

async fn silently(fixture: &Fixture, arguments: &[&str]) -> Outcome {
    let printed = done(fixture, arguments).await?;
    ensure!(printed.is_empty(), "{arguments:?} printed {printed:?}");
    Ok(())
}

fn bytes(device: LoopDevice) -> Result<u64> {
    Ok(device.number::<u64>("size")? * 512)
}

async fn resize_adopts_the_size_of_the_file(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = attach(fixture, &[image.name()]).await?;
    for size in [4 * MIB, 2 * MIB] {
        image.open()?.set_len(size)?;
        silently(fixture, &["resize", &device.node()]).await?;
        assert_eq!(bytes(device)?, size);
        eventually("loopd has seen it", async || {
            Ok(done(fixture, &["info", &device.node()]).await?.contains(&format!("{size} ")))
        })
        .await?;
    }
    silently(fixture, &["detach", &device.node()]).await?;
    let output = failed(fixture, &["resize", &device.node()]).await?;
    assert!(output.contains(&device.node()), "{output}");
    Ok(())
}

/// A file selects all devices that it is attached to.
async fn resize_by_file_changes_all_devices_of_it(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let devices = [attach(fixture, &[image.name()]).await?, attach(fixture, &[image.name()]).await?];
    image.open()?.set_len(2 * MIB)?;
    silently(fixture, &["resize", image.name()]).await?;
    for device in devices {
        assert_eq!(bytes(device)?, 2 * MIB);
    }
    silently(fixture, &["detach", image.name()]).await
}

async fn set_changes_the_settings(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = attach(fixture, &[image.name()]).await?;
    silently(fixture, &["set", &device.node(), "-b", "4K", "--direct-io", "on"]).await?;
    assert_eq!(device.number::<u32>("queue/logical_block_size")?, 4096);
    assert!(device.flag("loop/dio")?);
    let shown = done(fixture, &["list", "-o", "blocksize,dio", "--no-legend"]).await?;
    assert_eq!(shown.split_whitespace().collect::<Vec<_>>(), ["4096", "yes"]);
    silently(fixture, &["set", image.name(), "--direct-io", "off", "--lifetime", "persistent"]).await?;
    assert!(!device.flag("loop/dio")?);
    silently(fixture, &["detach", &device.node()]).await
}

async fn set_reports_unsupported_settings(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let output = failed(fixture, &["set", image.name(), "-b", "1K"]).await?;
    assert!(output.contains(image.name()) && output.contains("not attached"), "{output}");
    for arguments in [
        &["set", "loop3"][..],
        &["set", "-b", "1K"],
        &["set", "loop3", "-b", "1000"],
        &["set", "loop3", "-b", "0"],
        &["set", "loop3", "--direct-io", "perhaps"],
        &["set", "loop3", "--lifetime", "client"],
        &["resize"],
        &["resize", "loop3", "4M"],
    ] {
        let output = fixture.loopctl(arguments).await?;
        ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    }
    Ok(())
}

async fn overlap_reuse_returns_the_device(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = attach(fixture, &[image.name()]).await?;
    let again = attach(fixture, &["--overlap", "reuse", image.name()]).await?;
    assert_eq!(again, device);
    let output = failed(fixture, &["attach", "--overlap", "reuse", "-o", "512", image.name()]).await?;
    assert!(output.contains(&device.node()), "{output}");
    silently(fixture, &["detach", &device.node()]).await?;
    // A file that is not attached is attached.
    let new = attach(fixture, &["--overlap", "reuse", "-r", image.name()]).await?;
    let output = failed(fixture, &["attach", "--overlap", "reuse", image.name()]).await?;
    assert!(output.contains("read-only"), "{output}");
    assert_eq!(attach(fixture, &["--overlap", "reuse", "-r", image.name()]).await?, new);
    silently(fixture, &["detach", &new.node()]).await
}

async fn overlap_refuse_fails(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = attach(fixture, &["--overlap", "refuse", image.name()]).await?;
    let output = failed(fixture, &["attach", "--overlap", "refuse", image.name()]).await?;
    assert!(output.contains(image.name()) && output.contains(&device.node()), "{output}");
    silently(fixture, &["detach", &device.node()]).await
}

async fn user_changes_own_devices(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let node = loopctl(fixture, GAMES, &["attach", image.name()]).await?.map_err(anyhow::Error::msg)?;
    let asked = fixture.stand_in()?.checks().len();
    let node = node.trim_end();
    for arguments in [&["set", node, "-b", "1K"][..], &["resize", node], &["detach", node]] {
        loopctl(fixture, GAMES, arguments).await?.map_err(anyhow::Error::msg).context(arguments.join(" "))?;
    }
    assert_eq!(fixture.stand_in()?.checks().len(), asked, "what is one's own is not asked about");
    Ok(())
}

async fn user_cannot_change_other_devices(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = attach(fixture, &[image.name()]).await?;
    let node = device.node();
    image.open()?.set_len(2 * MIB)?;
    for arguments in
        [&["set", &node, "-b", "1K"][..], &["set", &node, "--direct-io", "on"], &["resize", &node]]
    {
        let answer = loopctl(fixture, GAMES, arguments).await?;
        ensure!(answer.is_err(), "{arguments:?}: {answer:?}");
    }
    assert_eq!((bytes(device)?, device.number::<u32>("queue/logical_block_size")?), (MIB, 512));
    silently(fixture, &["detach", &node]).await
}

async fn table_fits_the_terminal(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "i".repeat(60), MIB)?;
    let device = attach(fixture, &[image.name()]).await?;
    let loopctl = fixture.tool(ROOT, "loopctl")?.get_program().to_string_lossy().into_owned();
    // A terminal of unknown width reports 0 columns.
    for (columns, is_whole) in [(250, true), (100, false), (0, true)] {
        let mut terminal = fixture.command("script");
        terminal.args(["-qec", &format!("stty rows 24 cols {columns}; {loopctl} list"), "/dev/null"]);
        let shown = String::from_utf8(output(terminal).await?.stdout)?;
        assert_eq!(shown.contains(image.name()), is_whole, "{columns}: {shown}");
        assert!(shown.contains("\u{2026}") != is_whole, "{columns}: {shown}");
    }
    silently(fixture, &["detach", &device.node()]).await
}
