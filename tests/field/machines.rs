//! Devices of other programs, parallel callers, and machines without udev or without nodes.

use std::time::{Duration, Instant};

use anyhow::ensure;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup::Losetup;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, Outcome, host};

use tokio::io::AsyncReadExt as _;

use crate::row::{file, loopctl, note, other, rows};

rows! {
    "current at the time of the call":
        "losetup attaches; list, losetup -a and losetup /dev/loopN at once, twenty times" => attached_just_now,
        "losetup detaches; list at once, twenty times" => detached_just_now,
        "losetup --set-capacity; list at once" => grown_just_now,
        "losetup --sector-size; list at once" => other_blocks_just_now,
        "mount -o loop; list at once" => mounted_just_now;
    "who holds it":
        "a loop device on the device" => loop_on_it,
        "a loop device on a partition of it" => loop_on_a_partition,
        "a process with the node open" => process_on_it,
        "a mount in another mount namespace" => mount_elsewhere;
    "numbers that another program has changed":
        "a free number that was set read-only" => read_only_number,
        "the same, asked for by its name" => read_only_number_by_name,
        "a number whose node is missing" => number_without_node;
    "environments":
        "udevd has ended, and its socket is there" => udev_has_ended,
        "udevd in another network namespace" => udev_is_not_heard,
        "no udev at all" => no_udev;
    "parallel callers":
        "forty attaches of one user at once" => forty_at_once,
        "forty attaches that reuse one device" => forty_reuse_one,
        "forty detaches at once" => forty_detaches;
}

async fn attached_just_now(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    for round in 0..20 {
        let foreign = Losetup::new(&[], &image).await?;
        let node = foreign.device.node();
        let output = match round % 3 {
            0 => fixture.loopctl(["list", "--all"]).await?,
            1 => fixture.loopctl(["losetup", "-a"]).await?,
            _ => fixture.loopctl(["losetup", &node]).await?,
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains(&node) && text.contains("/image"), "round {round}: {output:?}");
    }
    note("20 of 20 were there");
    Ok(())
}

async fn detached_just_now(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    for round in 0..20 {
        let device = LoopDevice::from_node(
            String::from_utf8(fixture.loopctl(["attach", image.name()]).await?.stdout)?.trim_end(),
        )?;
        other("losetup", &["-d", &device.node()]).await?;
        let output = fixture.loopctl(["list", "--all"]).await?;
        ensure!(!String::from_utf8_lossy(&output.stdout).contains("/image"), "round {round}: {output:?}");
    }
    note("20 of 20 were gone");
    Ok(())
}

async fn grown_just_now(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let foreign = Losetup::new(&[], &image).await?;
    image.open()?.set_len(5 * MIB)?;
    other("losetup", &["-c", &foreign.device.node()]).await?;
    let listed = loopctl(fixture, &["list", "--all", "-o", "device,size"]).await?;
    ensure!(listed.output.contains("5M"), "{}", listed.output);
    Ok(())
}

async fn loop_on_it(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let upper = Losetup::new(&[], &Image { path: device.node().into() }).await?;
    loopctl(fixture, &["detach", &device.node()]).await?.fails_with(&upper.device.node())?;
    drop(upper);
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn process_on_it(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let open = std::fs::File::open(device.node())?;
    let pid = std::process::id().to_string();
    loopctl(fixture, &["detach", &device.node()]).await?.fails_with(&pid)?;
    drop(open);
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn free(fixture: &Fixture) -> anyhow::Result<LoopDevice> {
    LoopDevice::from_node(&fixture.manager.find_free().await?)
}

async fn read_only_number(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let number = free(fixture).await?;
    other("blockdev", &["--setro", &number.node()]).await?;
    let printed = loopctl(fixture, &["attach", image.name()]).await;
    other("blockdev", &["--setrw", &number.node()]).await?;
    let device = printed?.device()?;
    let is_read_only = device.flag("ro")?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()?;
    ensure!(!is_read_only, "it came out read-only");
    Ok(())
}

async fn number_without_node(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let number = free(fixture).await?;
    std::fs::remove_file(number.node())?;
    let printed = loopctl(fixture, &["attach", "--device", &number.node(), image.name()]).await;
    other("mknod", &["-m", "660", &number.node(), "b", "7", &number.0.to_string()]).await?;
    other("chown", &["root:disk", &number.node()]).await?;
    printed?.fails_with(&number.node())
}

const SOON: Duration = Duration::from_secs(1);

async fn attach_in_silence(fixture: &Fixture, image: &Image, text: &str) -> Outcome {
    let begin = Instant::now();
    let printed = loopctl(fixture, &["attach", image.name()]).await?;
    let took = begin.elapsed();
    note(format!("after {} ms", took.as_millis()));
    let device = printed.device()?;
    loopctl(fixture, &["detach", &device.node()]).await?;
    printed.warns_of(text)?;
    ensure!(took < SOON, "it took {took:?}");
    Ok(())
}

async fn udev_has_ended(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    host::get()?.udev.kill()?;
    let tried = attach_in_silence(fixture, &image, "udev does not answer").await;
    host::get()?.udev.start()?;
    tried
}

async fn udev_is_not_heard(fixture: &mut Fixture) -> Outcome {
    fixture.restart_daemon_under(&["unshare", "--net"]).await?;
    let image = file(fixture, "image", MIB, &[])?;
    attach_in_silence(fixture, &image, "udev's events do not arrive").await
}

async fn forty_at_once(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let calls = (0..40).map(|_| fixture.loopctl_as(GAMES, ["attach", "--no-wait", image.name()]));
    let outputs = futures_util::future::join_all(calls).await;
    let good = outputs.iter().filter(|output| output.as_ref().is_ok_and(|output| output.status.success()));
    note(format!("{} of 40 are attached", good.count()));
    let output = fixture.loopctl_as(GAMES, ["detach", "--all"]).await?;
    ensure!(output.status.success(), "{output:?}");
    for output in outputs {
        let output = output?;
        ensure!(output.status.success(), "{output:?}");
    }
    Ok(())
}

async fn other_blocks_just_now(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let foreign = Losetup::new(&[], &image).await?;
    for size in ["4096", "1024"] {
        other("losetup", &["-b", size, &foreign.device.node()]).await?;
        let listed =
            loopctl(fixture, &["losetup", "-l", "-n", "-O", "LOG-SEC", &foreign.device.node()]).await?;
        ensure!(listed.output.trim() == size, "{}", listed.output);
    }
    Ok(())
}

async fn mounted_just_now(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    let directory = fixture.directory.join("mounted");
    std::fs::create_dir(&directory)?;
    let directory = directory.to_str().unwrap();
    other("mount", &["-o", "loop", image.name(), directory]).await?;
    let listed = loopctl(fixture, &["list", "--all", "-o", "device,mountpoints"]).await;
    other("umount", &[directory]).await?;
    let listed = listed?;
    ensure!(listed.output.contains("/mounted"), "{}", listed.output);
    Ok(())
}

async fn loop_on_a_partition(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 8 * MIB, &[])?;
    Gpt::new(&[(2048, 4095)]).write(&image)?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let upper = Losetup::new(&[], &Image { path: device.partition_node(1).into() }).await?;
    loopctl(fixture, &["detach", &device.node()]).await?.fails_with(&upper.device.node())?;
    drop(upper);
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn mount_elsewhere(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let directory = fixture.directory.join("elsewhere");
    std::fs::create_dir(&directory)?;
    let script = "mount \"$1\" \"$2\" && echo mounted && exec cat";
    let mut container = tokio::process::Command::new("unshare");
    container.args(["--mount", "sh", "-c", script, "sh", &device.node()]).arg(&directory);
    container.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut container = container.spawn()?;
    let mut line = [0; 8];
    container.stdout.as_mut().unwrap().read_exact(&mut line).await?;
    let printed = loopctl(fixture, &["detach", &device.node()]).await?;
    drop(container.stdin.take());
    container.wait().await?;
    printed.fails_with("/elsewhere in the mount namespace of")?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn read_only_number_by_name(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let number = free(fixture).await?;
    other("blockdev", &["--setro", &number.node()]).await?;
    let printed = loopctl(fixture, &["attach", "--device", &number.node(), image.name()]).await;
    other("blockdev", &["--setrw", &number.node()]).await?;
    printed?.fails_with("blockdev --setrw")
}

async fn no_udev(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    host::get()?.udev.stop()?;
    let begin = Instant::now();
    let printed = loopctl(fixture, &["attach", image.name()]).await;
    let took = begin.elapsed();
    host::get()?.udev.start()?;
    let device = printed?.device()?;
    note(format!("after {} ms", took.as_millis()));
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()?;
    ensure!(took < SOON, "it took {took:?}");
    Ok(())
}

async fn forty_reuse_one(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let calls = (0..40).map(|_| fixture.loopctl_as(GAMES, ["attach", "--overlap", "reuse", image.name()]));
    let mut nodes = std::collections::BTreeSet::new();
    for output in futures_util::future::join_all(calls).await {
        let output = output?;
        ensure!(output.status.success(), "{output:?}");
        nodes.insert(String::from_utf8(output.stdout)?);
    }
    note(format!("they got {}", nodes.iter().map(|node| node.trim_end()).collect::<Vec<_>>().join(", ")));
    ensure!(nodes.len() == 1, "several devices");
    let output = fixture.loopctl_as(GAMES, ["detach", "--all"]).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

async fn forty_detaches(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    let mut nodes = Vec::new();
    for _ in 0..40 {
        let output = fixture.loopctl_as(GAMES, ["attach", "--no-wait", image.name()]).await?;
        ensure!(output.status.success(), "{output:?}");
        nodes.push(String::from_utf8(output.stdout)?.trim_end().to_owned());
    }
    let calls = nodes.iter().map(|node| fixture.loopctl_as(GAMES, ["detach", node]));
    for output in futures_util::future::join_all(calls).await {
        let output = output?;
        ensure!(output.status.success(), "{output:?}");
    }
    note("40 of 40 are gone");
    Ok(())
}
