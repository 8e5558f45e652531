//! Throwaway views: writable, and the file is not changed.

use anyhow::{Result, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::{GAMES, Outcome};

loopd_tests::tests! {
    "throwaway";
    Setup::None => [changes_are_discarded, run_with_a_throwaway_view, invalid_arguments_are_rejected];
    Setup::StandIn(Answer::Yes) => [read_only_file_has_a_writable_view];
}

/// A file and its contents.
fn image(fixture: &Fixture) -> Result<(Image, Vec<u8>)> {
    let image = Image::sparse(&fixture.directory, "holiday.img", 4 * MIB)?;
    std::os::unix::fs::FileExt::write_all_at(&image.open()?, b"before", MIB)?;
    let bytes = std::fs::read(&image.path)?;
    Ok((image, bytes))
}

fn files(fixture: &Fixture) -> Result<usize> {
    Ok(std::fs::read_dir(&fixture.directory)?.count())
}

async fn attach(fixture: &Fixture, user: loopd_tests::User, arguments: &[&str]) -> Result<LoopDevice> {
    let output = fixture.loopctl_as(user, [&["attach", "--throwaway"], arguments].concat()).await?;
    ensure!(output.status.success(), "{output:?}");
    LoopDevice::from_node(String::from_utf8(output.stdout)?.trim_end())
}

/// Writes to the device.
fn scribble(device: LoopDevice) -> Result<()> {
    let node = std::fs::File::options().write(true).open(device.node())?;
    std::os::unix::fs::FileExt::write_all_at(&node, b"after!", MIB)?;
    Ok(node.sync_all()?)
}

async fn changes_are_discarded(fixture: &mut Fixture) -> Outcome {
    let (image, before) = image(fixture)?;
    let count = files(fixture)?;
    let device = attach(fixture, loopd_tests::ROOT, &[image.name()]).await?;
    let object = fixture.object_of(device).await?.expect("it is attached");
    let properties = fixture.properties(&object).await?;
    assert!(!properties.read_only);
    assert_eq!(properties.reference, "holiday.img");
    let shown = String::from_utf8(device.backing_file().unwrap_or_default())?;
    assert!(
        shown.starts_with(fixture.directory.to_str().unwrap()) && shown.ends_with("(deleted)"),
        "{shown}"
    );
    assert_eq!(std::fs::read(device.node())?, before);
    scribble(device)?;
    assert_eq!(std::fs::read(&image.path)?, before);
    fixture.loopctl(["detach", &device.node()]).await?;
    assert_eq!(files(fixture)?, count, "something is left in the directory");
    fixture.assert_no_leak().await
}

async fn run_with_a_throwaway_view(fixture: &mut Fixture) -> Outcome {
    let (image, before) = image(fixture)?;
    let arguments = ["run", "--throwaway", image.name(), "--", "mkfs.ext4", "-q", "-F", "{}"];
    let output = fixture.loopctl(arguments).await?;
    ensure!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(&image.path)?, before);
    fixture.assert_no_leak().await
}

async fn invalid_arguments_are_rejected(fixture: &mut Fixture) -> Outcome {
    let (image, _) = image(fixture)?;
    for arguments in [&["--throwaway", "-r"][..], &["--yes"], &["--throwaway-dir", "/tmp"]] {
        let output = fixture.loopctl([&["attach", image.name()], arguments].concat()).await?;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    let output = fixture.loopctl(["attach", "--throwaway", "--throwaway-dir", "/proc", image.name()]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let output = String::from_utf8(output.stderr)?;
    assert!(output.contains("/proc") && output.contains("--throwaway-dir"), "{output}");
    fixture.assert_no_leak().await
}

async fn read_only_file_has_a_writable_view(fixture: &mut Fixture) -> Outcome {
    let (image, before) = image(fixture)?;
    image.chmod(0o444)?;
    // They may not write to its directory either.
    let output = fixture.loopctl_as(GAMES, ["attach", "--throwaway", image.name()]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let device = attach(fixture, GAMES, &[image.name(), "--throwaway-dir", "/dev/shm"]).await?;
    assert!(!device.flag("ro")?);
    scribble(device)?;
    assert_eq!(std::fs::read(&image.path)?, before);
    fixture.loopctl_as(GAMES, ["detach", &device.node()]).await?;
    eventually("it is detached", async || Ok(!device.bound())).await
}
