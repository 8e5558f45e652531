//! Throwaway views: writable, and the file stays as it is.

use anyhow::{Result, ensure};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome};

loopd_tests::tests! {
    "throwaway";
    Setup::None => [attached, for_a_command, wrong_arguments];
    Setup::StandIn(Answer::Yes) => [of_a_file_that_may_only_be_read];
}

/// A file with something in it, and what that is.
fn image(world: &World) -> Result<(Image, Vec<u8>)> {
    let image = Image::sparse(&world.folder, "holiday.img", 4 * MIB)?;
    std::os::unix::fs::FileExt::write_all_at(&image.open()?, b"before", MIB)?;
    let bytes = std::fs::read(&image.path)?;
    Ok((image, bytes))
}

fn files(world: &World) -> Result<usize> {
    Ok(std::fs::read_dir(&world.folder)?.count())
}

async fn attach(world: &World, user: loopd_tests::User, words: &[&str]) -> Result<LoopDevice> {
    let output = world.loopctl_as(user, [&["attach", "--throwaway"], words].concat()).await?;
    ensure!(output.status.success(), "{output:?}");
    LoopDevice::from_node(String::from_utf8(output.stdout)?.trim_end())
}

/// Writes to the device.
fn scribble(device: LoopDevice) -> Result<()> {
    let node = std::fs::File::options().write(true).open(device.node())?;
    std::os::unix::fs::FileExt::write_all_at(&node, b"after!", MIB)?;
    Ok(node.sync_all()?)
}

async fn attached(world: &mut World) -> Outcome {
    let (image, before) = image(world)?;
    let beside = files(world)?;
    let device = attach(world, loopd_tests::ROOT, &[image.name()]).await?;
    let object = world.object_of(device).await?.expect("it is attached");
    let properties = world.properties(&object).await?;
    assert!(!properties.read_only);
    assert_eq!(properties.reference, "holiday.img");
    let shown = String::from_utf8(device.backing_file().unwrap_or_default())?;
    assert!(shown.starts_with(world.folder.to_str().unwrap()) && shown.ends_with("(deleted)"), "{shown}");
    assert_eq!(std::fs::read(device.node())?, before);
    scribble(device)?;
    assert_eq!(std::fs::read(&image.path)?, before);
    world.loopctl(["detach", &device.node()]).await?;
    assert_eq!(files(world)?, beside, "something is left beside the file");
    world.assert_no_leak().await
}

async fn for_a_command(world: &mut World) -> Outcome {
    let (image, before) = image(world)?;
    let words = ["run", "--throwaway", image.name(), "--", "mkfs.ext4", "-q", "-F", "{}"];
    let output = world.loopctl(words).await?;
    ensure!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(&image.path)?, before);
    world.assert_no_leak().await
}

async fn wrong_arguments(world: &mut World) -> Outcome {
    let (image, _) = image(world)?;
    for words in [&["--throwaway", "-r"][..], &["--yes"], &["--throwaway-dir", "/tmp"]] {
        let output = world.loopctl([&["attach", image.name()], words].concat()).await?;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    let output = world.loopctl(["attach", "--throwaway", "--throwaway-dir", "/proc", image.name()]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr)?;
    assert!(said.contains("/proc") && said.contains("--throwaway-dir"), "{said}");
    world.assert_no_leak().await
}

async fn of_a_file_that_may_only_be_read(world: &mut World) -> Outcome {
    let (image, before) = image(world)?;
    image.chmod(0o444)?;
    // Nor may they write beside it.
    let output = world.loopctl_as(GAMES, ["attach", "--throwaway", image.name()]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let device = attach(world, GAMES, &[image.name(), "--throwaway-dir", "/dev/shm"]).await?;
    assert!(!device.flag("ro")?);
    scribble(device)?;
    assert_eq!(std::fs::read(&image.path)?, before);
    world.loopctl_as(GAMES, ["detach", &device.node()]).await?;
    eventually("it is detached", async || Ok(!device.bound())).await
}
