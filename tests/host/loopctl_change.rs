//! `loopctl resize`, `loopctl set` and `loopctl attach --overlap`; and how wide a table is.

use anyhow::{Context as _, Result, ensure};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome, ROOT, User};

loopd_tests::tests! {
    "loopctl_change";
    Setup::None => [
        resize,
        resize_by_file,
        set,
        set_what_cannot_be,
        overlap_reuse,
        overlap_refuse,
        table_is_as_wide_as_the_terminal,
    ];
    Setup::StandIn(Answer::Yes) => [users_own];
    Setup::StandIn(Answer::No) => [not_others];
}

/// Runs loopctl; gives what it printed, or what it complained about.
async fn loopctl(world: &World, user: User, words: &[&str]) -> Result<Result<String, String>> {
    let output = world.loopctl_as(user, words).await?;
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

async fn done(world: &World, words: &[&str]) -> Result<String> {
    loopctl(world, ROOT, words).await?.map_err(anyhow::Error::msg)
}

async fn failed(world: &World, words: &[&str]) -> Result<String> {
    match loopctl(world, ROOT, words).await? {
        Ok(printed) => anyhow::bail!("{words:?} should fail and printed {printed:?}"),
        Err(complaint) => Ok(complaint),
    }
}

async fn attach(world: &World, words: &[&str]) -> Result<LoopDevice> {
    LoopDevice::from_node(done(world, &[&["attach"], words].concat()).await?.trim_end())
}

async fn silently(world: &World, words: &[&str]) -> Outcome {
    let printed = done(world, words).await?;
    ensure!(printed.is_empty(), "{words:?} printed {printed:?}");
    Ok(())
}

fn bytes(device: LoopDevice) -> Result<u64> {
    Ok(device.number::<u64>("size")? * 512)
}

async fn resize(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let device = attach(world, &[image.name()]).await?;
    for size in [4 * MIB, 2 * MIB] {
        image.open()?.set_len(size)?;
        silently(world, &["resize", &device.node()]).await?;
        assert_eq!(bytes(device)?, size);
        eventually("loopd has seen it", async || {
            Ok(done(world, &["info", &device.node()]).await?.contains(&format!("{size} ")))
        })
        .await?;
    }
    silently(world, &["detach", &device.node()]).await?;
    let said = failed(world, &["resize", &device.node()]).await?;
    assert!(said.contains(&device.node()), "{said}");
    Ok(())
}

/// A file stands for each device that it is attached to.
async fn resize_by_file(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let devices = [attach(world, &[image.name()]).await?, attach(world, &[image.name()]).await?];
    image.open()?.set_len(2 * MIB)?;
    silently(world, &["resize", image.name()]).await?;
    for device in devices {
        assert_eq!(bytes(device)?, 2 * MIB);
    }
    silently(world, &["detach", image.name()]).await
}

async fn set(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let device = attach(world, &[image.name()]).await?;
    silently(world, &["set", &device.node(), "-b", "4K", "--direct-io", "on"]).await?;
    assert_eq!(device.number::<u32>("queue/logical_block_size")?, 4096);
    assert!(device.flag("loop/dio")?);
    let shown = done(world, &["list", "-o", "blocksize,dio", "--no-legend"]).await?;
    assert_eq!(shown.split_whitespace().collect::<Vec<_>>(), ["4096", "yes"]);
    silently(world, &["set", image.name(), "--direct-io", "off", "--lifetime", "persistent"]).await?;
    assert!(!device.flag("loop/dio")?);
    silently(world, &["detach", &device.node()]).await
}

async fn set_what_cannot_be(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let said = failed(world, &["set", image.name(), "-b", "1K"]).await?;
    assert!(said.contains(image.name()) && said.contains("not attached"), "{said}");
    for words in [
        &["set", "loop3"][..],
        &["set", "-b", "1K"],
        &["set", "loop3", "-b", "1000"],
        &["set", "loop3", "-b", "0"],
        &["set", "loop3", "--direct-io", "perhaps"],
        &["set", "loop3", "--lifetime", "client"],
        &["resize"],
        &["resize", "loop3", "4M"],
    ] {
        let output = world.loopctl(words).await?;
        ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{words:?}: {output:?}");
    }
    Ok(())
}

async fn overlap_reuse(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let device = attach(world, &[image.name()]).await?;
    let again = attach(world, &["--overlap", "reuse", image.name()]).await?;
    assert_eq!(again, device);
    let said = failed(world, &["attach", "--overlap", "reuse", "-o", "512", image.name()]).await?;
    assert!(said.contains(&device.node()), "{said}");
    silently(world, &["detach", &device.node()]).await?;
    // What is not attached is.
    let new = attach(world, &["--overlap", "reuse", "-r", image.name()]).await?;
    let said = failed(world, &["attach", "--overlap", "reuse", image.name()]).await?;
    assert!(said.contains("read-only"), "{said}");
    assert_eq!(attach(world, &["--overlap", "reuse", "-r", image.name()]).await?, new);
    silently(world, &["detach", &new.node()]).await
}

async fn overlap_refuse(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let device = attach(world, &["--overlap", "refuse", image.name()]).await?;
    let said = failed(world, &["attach", "--overlap", "refuse", image.name()]).await?;
    assert!(said.contains(image.name()) && said.contains(&device.node()), "{said}");
    silently(world, &["detach", &device.node()]).await
}

async fn users_own(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let node = loopctl(world, GAMES, &["attach", image.name()]).await?.map_err(anyhow::Error::msg)?;
    let asked = world.stand_in()?.checks().len();
    let node = node.trim_end();
    for words in [&["set", node, "-b", "1K"][..], &["resize", node], &["detach", node]] {
        loopctl(world, GAMES, words).await?.map_err(anyhow::Error::msg).context(words.join(" "))?;
    }
    assert_eq!(world.stand_in()?.checks().len(), asked, "what is one's own is not asked about");
    Ok(())
}

async fn not_others(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let device = attach(world, &[image.name()]).await?;
    let node = device.node();
    image.open()?.set_len(2 * MIB)?;
    for words in [&["set", &node, "-b", "1K"][..], &["set", &node, "--direct-io", "on"], &["resize", &node]] {
        let answer = loopctl(world, GAMES, words).await?;
        ensure!(answer.is_err(), "{words:?}: {answer:?}");
    }
    assert_eq!((bytes(device)?, device.number::<u32>("queue/logical_block_size")?), (MIB, 512));
    silently(world, &["detach", &node]).await
}

async fn table_is_as_wide_as_the_terminal(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "i".repeat(60), MIB)?;
    let device = attach(world, &[image.name()]).await?;
    let loopctl = world.tool(ROOT, "loopctl")?.get_program().to_string_lossy().into_owned();
    // A terminal that does not know its width has 0 columns.
    for (columns, is_whole) in [(250, true), (100, false), (0, true)] {
        let mut terminal = world.command("script");
        terminal.args(["-qec", &format!("stty rows 24 cols {columns}; {loopctl} list"), "/dev/null"]);
        let shown = String::from_utf8(output(terminal).await?.stdout)?;
        assert_eq!(shown.contains(image.name()), is_whole, "{columns}: {shown}");
        assert!(shown.contains("\u{2026}") != is_whole, "{columns}: {shown}");
    }
    silently(world, &["detach", &device.node()]).await
}
