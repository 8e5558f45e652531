//! No two file systems are mounted on the same bytes, not even if another program mounted the first one.

use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command, Stdio};

use loopd_dbus::proxy::{Attachment, Interaction, Volume};
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime, MountOptions, UnmountOptions};
use loopd_tests::Outcome;
use loopd_tests::fixture::{Attached, Fixture, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::sysfs::{Extent, LoopDevice};
use loopd_tests::units::Units;

loopd_tests::tests! {
    "same_bytes";
    Setup::None => [
        mount_by_another_program_is_found,
        mount_in_another_namespace_is_found,
        mount_at_another_offset_is_found,
        mount_through_another_loop_device_is_found,
        read_only_devices_may_both_be_mounted,
        mount_of_the_replacement_file_is_found,
        block_size_of_a_device_in_use_is_busy,
    ];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e1";

async fn image(fixture: &Fixture) -> anyhow::Result<Image> {
    Image::ext4(&fixture.directory, "image", "data", UUID).await
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

async fn volume(fixture: &Fixture, attached: &Attached) -> anyhow::Result<Volume> {
    let path = attached.path.as_str().to_owned().try_into()?;
    Ok(Volume::new(&fixture.connection, path, Interaction::Forbidden).await?)
}

/// Checks that the other device prevents a mount, also a read-only one; returns the message of the latter.
async fn refused(fixture: &Fixture, attached: &Attached, other: LoopDevice) -> anyhow::Result<String> {
    let mut message = String::new();
    for read_only in [false, true] {
        let wanted = MountOptions { read_only, filesystem: "ext4".to_owned(), ..MountOptions::default() };
        let error = refusal(volume(fixture, attached).await?.mount(&wanted).await)?;
        assert_eq!(error.kind, ErrorKind::Busy, "{error}");
        assert!(error.message.contains(&format!("{} (", other.node())), "{error}");
        message = error.message;
    }
    Ok(message)
}

/// Checks that it can be mounted now; unmounts and detaches it.
async fn mount_and_detach(fixture: &Fixture, attached: &Attached) -> anyhow::Result<()> {
    let volume = volume(fixture, attached).await?;
    let wanted = MountOptions { filesystem: "ext4".to_owned(), ..MountOptions::default() };
    volume.mount(&wanted).await?;
    volume.unmount(UnmountOptions::default()).await?;
    fixture.detach(attached).await
}

async fn mount_by_another_program_is_found(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let other = losetup::attach(&[image.name()]).await?;
    let mounted = Mounted::new(other, &fixture.directory, "other").await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let message = refused(fixture, &attached, other).await?;
    assert!(message.contains(mounted.directory.to_str().unwrap()), "{message}");
    mounted.unmount().await?;
    mount_and_detach(fixture, &attached).await?;
    losetup::detach(other).await?;
    run("e2fsck", ["-fn", image.name()]).await?;
    fixture.assert_no_leak().await
}

/// Holds a mount in another mount namespace.
fn mount_elsewhere(device: LoopDevice, fixture: &Fixture) -> anyhow::Result<Child> {
    let directory = fixture.directory.join("elsewhere");
    std::fs::create_dir_all(&directory)?;
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount \"$0\" \"$1\" && echo ready && read -r _"])
        .arg(device.node())
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line)?;
    assert_eq!(line, "ready\n");
    Ok(child)
}

fn end(mut child: Child) -> anyhow::Result<()> {
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

async fn mount_in_another_namespace_is_found(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let other = losetup::attach(&[image.name()]).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;

    let elsewhere = mount_elsewhere(other, fixture)?;
    let message = refused(fixture, &attached, other).await?;
    assert!(message.contains("another mount namespace"), "{message}");
    end(elsewhere)?;

    let mounted = Mounted::new(other, &fixture.directory, "other").await?;
    let in_use = std::fs::File::create(mounted.directory.join("file"))?;
    run("umount", ["--lazy", mounted.directory.to_str().unwrap()]).await?;
    std::mem::forget(mounted);
    let message = refused(fixture, &attached, other).await?;
    assert!(message.contains("unmounted lazily"), "{message}");
    drop(in_use);

    mount_and_detach(fixture, &attached).await?;
    losetup::detach(other).await?;
    run("e2fsck", ["-fn", image.name()]).await?;
    fixture.assert_no_leak().await
}

async fn mount_at_another_offset_is_found(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    for start in [0, 8 * MIB] {
        image.add_ext4(Extent { start, size: 8 * MIB }, "data", UUID).await?;
    }
    let other = losetup::attach(&["-o", "8M", image.name()]).await?;
    let mounted = Mounted::new(other, &fixture.directory, "other").await?;
    let whole = fixture.attach(&image.open()?, &persistent()).await?;
    refused(fixture, &whole, other).await?;
    let half = AttachOptions { size_limit: 8 * MIB, ..persistent() };
    let first = fixture.attach(&image.open()?, &half).await?;
    mount_and_detach(fixture, &first).await?;
    mounted.unmount().await?;
    mount_and_detach(fixture, &whole).await?;
    losetup::detach(other).await?;
    fixture.assert_no_leak().await
}

async fn mount_through_another_loop_device_is_found(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    // On our device, and on another one with the same file.
    let beside = losetup::attach(&[image.name()]).await?;
    for below in [attached.device, beside] {
        let above = losetup::attach(&[&below.node()]).await?;
        let mounted = Mounted::new(above, &fixture.directory, "above").await?;
        refused(fixture, &attached, above).await?;
        mounted.unmount().await?;
        losetup::detach(above).await?;
    }
    losetup::detach(beside).await?;
    // The reverse: the device below ours is mounted.
    let above = fixture
        .attach(&std::fs::File::options().read(true).write(true).open(attached.device.node())?, &persistent())
        .await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "below").await?;
    refused(fixture, &above, attached.device).await?;
    mounted.unmount().await?;
    mount_and_detach(fixture, &above).await?;
    mount_and_detach(fixture, &attached).await?;
    fixture.assert_no_leak().await
}

async fn read_only_devices_may_both_be_mounted(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let other = losetup::attach(&["-r", image.name()]).await?;
    let mounted = Mounted::new(other, &fixture.directory, "other").await?;
    let writable = fixture.attach(&image.open()?, &persistent()).await?;
    refused(fixture, &writable, other).await?;
    fixture.detach(&writable).await?;
    let read_only = AttachOptions { read_only: true, ..persistent() };
    let attached = fixture.attach(&image.open()?, &read_only).await?;
    mount_and_detach(fixture, &attached).await?;
    mounted.unmount().await?;
    losetup::detach(other).await?;
    fixture.assert_no_leak().await
}

async fn mount_of_the_replacement_file_is_found(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture).await?;
    let first = Image::sparse(&fixture.directory, "first", image.open()?.metadata()?.len())?;
    let read_only = AttachOptions { read_only: true, ..persistent() };
    let attached = fixture.attach(&first.open()?, &read_only).await?;
    let object =
        Attachment::new(&fixture.connection, attached.path.clone().into(), Interaction::Forbidden).await?;
    let other = losetup::attach(&[image.name()]).await?;
    let mounted = Mounted::new(other, &fixture.directory, "other").await?;
    let error = refusal(object.replace_backing_file(image.open()?.as_fd()).await)?;
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains(mounted.directory.to_str().unwrap()), "{error}");
    assert_eq!(fixture.properties(&attached.path).await?.backing_inode, first.open()?.metadata()?.ino());
    mounted.unmount().await?;
    object.replace_backing_file(image.open()?.as_fd()).await?;
    fixture.detach(&attached).await?;
    losetup::detach(other).await?;
    fixture.assert_no_leak().await
}

async fn block_size_of_a_device_in_use_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let elsewhere = mount_elsewhere(attached.device, fixture)?;
    let path = attached.path.as_str().to_owned().try_into()?;
    let control = Attachment::new(&fixture.connection, path, Interaction::Forbidden).await?;
    let error = refusal(control.set_block_size(4096).await)?;
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains("another mount namespace"), "{error}");
    end(elsewhere)?;
    control.set_block_size(4096).await?;
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}
