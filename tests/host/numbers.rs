//! Device numbers that another program has made unusable: set read-only, or without a node.

use anyhow::Result;
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::fixture::{Fixture, expect_kind};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;

loopd_tests::tests! {
    "numbers";
    Setup::None => [
        number_that_was_set_read_only_is_not_used,
        number_whose_node_is_missing_is_not_used,
        machine_without_nodes_is_named_and_nothing_is_left,
    ];
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

async fn free(fixture: &Fixture) -> Result<LoopDevice> {
    LoopDevice::from_node(&fixture.manager.find_free().await?)
}

/// A free number that is set read-only until this is dropped.
struct ReadOnly(LoopDevice);

impl ReadOnly {
    async fn set(number: LoopDevice) -> Result<Self> {
        run("blockdev", ["--setro", &number.node()]).await?;
        Ok(Self(number))
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        restore("blockdev", &["--setrw", &self.0.node()]);
    }
}

/// A free number without its node until this is dropped.
struct WithoutNode(LoopDevice);

impl WithoutNode {
    fn remove(number: LoopDevice) -> Result<Self> {
        std::fs::remove_file(number.node())?;
        Ok(Self(number))
    }
}

impl Drop for WithoutNode {
    fn drop(&mut self) {
        restore("mknod", &["-m", "660", &self.0.node(), "b", "7", &self.0.0.to_string()]);
        restore("chown", &["root:disk", &self.0.node()]);
    }
}

fn restore(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status();
    assert!(status.is_ok_and(|status| status.success()), "{program} {arguments:?}");
}

async fn number_that_was_set_read_only_is_not_used(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let number = free(fixture).await?;
    let read_only = ReadOnly::set(number).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_ne!(attached.device, number);
    assert!(!fixture.properties(&attached.path).await?.read_only);
    fixture.detach(&attached).await?;
    let wanted = AttachOptions { number: Some(number.0), ..persistent() };
    let error = fixture.attach_fails(&image.open()?, &wanted).await?;
    expect_kind(&error, ErrorKind::Kernel)?;
    assert!(error.message.contains(&format!("blockdev --setrw {}", number.node())), "{error}");
    // A read-only device may have it.
    let options = AttachOptions { read_only: true, ..wanted.clone() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    fixture.detach(&attached).await?;
    drop(read_only);
    let attached = fixture.attach(&image.open()?, &wanted).await?;
    assert!(!fixture.properties(&attached.path).await?.read_only);
    fixture.detach(&attached).await
}

async fn number_whose_node_is_missing_is_not_used(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let number = free(fixture).await?;
    let _without_node = WithoutNode::remove(number)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_ne!(attached.device, number);
    fixture.detach(&attached).await?;
    let wanted = AttachOptions { number: Some(number.0), ..persistent() };
    let error = fixture.attach_fails(&image.open()?, &wanted).await?;
    expect_kind(&error, ErrorKind::Kernel)?;
    assert!(error.message.contains(&format!("mknod {}", number.node())), "{error}");
    Ok(())
}

/// As in a container: the control device, and no others.
async fn machine_without_nodes_is_named_and_nothing_is_left(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let devices = || std::fs::read_dir("/sys/block").map(Iterator::count);
    let script = "mount -t tmpfs none /mnt && mknod /mnt/null c 1 3 && mknod /mnt/loop-control c 10 237 \
                  && mount --move /mnt /dev && exec \"$@\"";
    fixture.restart_daemon_under(&["unshare", "--mount", "sh", "-c", script, "sh"]).await?;
    // A free device to start with: the kernel makes one if there is none.
    free(fixture).await?;
    let before = devices()?;
    let error = fixture.attach_fails(&image.open()?, &persistent()).await?;
    expect_kind(&error, ErrorKind::Kernel)?;
    assert!(error.message.contains("container") && error.message.contains("mknod /dev/loop"), "{error}");
    assert_eq!(devices()?, before, "devices are left");
    fixture.restart_daemon(&[]).await
}
