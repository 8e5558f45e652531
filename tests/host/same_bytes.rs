//! No two file systems are mounted on the same bytes, whoever has mounted the other one.

use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command, Stdio};

use loopd_dbus::proxy::{Attachment, Interaction, Volume};
use loopd_dbus::{AttachOptions, Error, ErrorKind, Lifetime, MountOptions, UnmountOptions};
use loopd_tests::Outcome;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::{Extent, LoopDevice};
use loopd_tests::units::Units;
use loopd_tests::world::{Attached, World, refusal};

loopd_tests::tests! {
    "same_bytes";
    Setup::None => [
        mounted_by_another_program,
        mounted_out_of_sight,
        at_another_offset,
        through_another_loop_device,
        read_only_twice,
        replaced_by_a_file_that_is_mounted,
        block_size_out_of_sight,
    ];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e1";

async fn image(world: &World) -> anyhow::Result<Image> {
    Image::ext4(&world.folder, "image", "data", UUID).await
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

/// Attaches without loopd.
async fn losetup(words: &[&str]) -> anyhow::Result<LoopDevice> {
    LoopDevice::from_node(run("losetup", [&["-f", "--show"], words].concat()).await?.trim())
}

async fn let_go(device: LoopDevice) -> anyhow::Result<()> {
    run("losetup", ["-d", &device.node()]).await?;
    eventually("it is free", async || Ok(!device.bound())).await
}

async fn volume(world: &World, attached: &Attached) -> anyhow::Result<Volume> {
    let path = attached.path.as_str().to_owned().try_into()?;
    Ok(Volume::new(&world.connection, path, Interaction::Forbidden).await?)
}

async fn refused(world: &World, attached: &Attached, other: LoopDevice) -> anyhow::Result<Error> {
    for read_only in [false, true] {
        let wanted = MountOptions { read_only, filesystem: "ext4".to_owned(), ..MountOptions::default() };
        let error = refusal(volume(world, attached).await?.mount(&wanted).await)?;
        assert_eq!(error.kind, ErrorKind::Busy, "{error}");
        assert!(error.message.contains(&format!("{} (", other.node())), "{error}");
        if read_only {
            return Ok(error);
        }
    }
    unreachable!()
}

/// It can be mounted now, and is unmounted and detached again.
async fn there_and_back(world: &World, attached: &Attached) -> anyhow::Result<()> {
    let volume = volume(world, attached).await?;
    let wanted = MountOptions { filesystem: "ext4".to_owned(), ..MountOptions::default() };
    volume.mount(&wanted).await?;
    volume.unmount(UnmountOptions::default()).await?;
    world.detach(attached).await
}

async fn mounted_by_another_program(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let other = losetup(&[image.name()]).await?;
    let mounted = Mounted::new(other, &world.folder, "other").await?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    let error = refused(world, &attached, other).await?;
    assert!(error.message.contains(mounted.folder.to_str().unwrap()), "{error}");
    mounted.unmount().await?;
    there_and_back(world, &attached).await?;
    let_go(other).await?;
    run("e2fsck", ["-fn", image.name()]).await?;
    world.assert_no_leak().await
}

/// Holds a mount in a mount namespace of its own.
fn mount_elsewhere(device: LoopDevice, world: &World) -> anyhow::Result<Child> {
    let folder = world.folder.join("elsewhere");
    std::fs::create_dir_all(&folder)?;
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount \"$0\" \"$1\" && echo ready && read -r _"])
        .arg(device.node())
        .arg(folder)
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

async fn mounted_out_of_sight(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let other = losetup(&[image.name()]).await?;
    let attached = world.attach(&image.open()?, &persistent()).await?;

    let elsewhere = mount_elsewhere(other, world)?;
    let error = refused(world, &attached, other).await?;
    assert!(error.message.contains("another mount namespace"), "{error}");
    end(elsewhere)?;

    let mounted = Mounted::new(other, &world.folder, "other").await?;
    let in_use = std::fs::File::create(mounted.folder.join("file"))?;
    run("umount", ["--lazy", mounted.folder.to_str().unwrap()]).await?;
    std::mem::forget(mounted);
    let error = refused(world, &attached, other).await?;
    assert!(error.message.contains("unmounted lazily"), "{error}");
    drop(in_use);

    there_and_back(world, &attached).await?;
    let_go(other).await?;
    run("e2fsck", ["-fn", image.name()]).await?;
    world.assert_no_leak().await
}

async fn at_another_offset(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = Image::sparse(&world.folder, "image", 16 * MIB)?;
    for start in [0, 8 * MIB] {
        image.add_ext4(Extent { start, size: 8 * MIB }, "data", UUID).await?;
    }
    let other = losetup(&["-o", "8M", image.name()]).await?;
    let mounted = Mounted::new(other, &world.folder, "other").await?;
    let whole = world.attach(&image.open()?, &persistent()).await?;
    refused(world, &whole, other).await?;
    let half = AttachOptions { size_limit: 8 * MIB, ..persistent() };
    let first = world.attach(&image.open()?, &half).await?;
    there_and_back(world, &first).await?;
    mounted.unmount().await?;
    there_and_back(world, &whole).await?;
    let_go(other).await?;
    world.assert_no_leak().await
}

async fn through_another_loop_device(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    // On ours, and on one beside it.
    let beside = losetup(&[image.name()]).await?;
    for below in [attached.device, beside] {
        let above = losetup(&[&below.node()]).await?;
        let mounted = Mounted::new(above, &world.folder, "above").await?;
        refused(world, &attached, above).await?;
        mounted.unmount().await?;
        let_go(above).await?;
    }
    let_go(beside).await?;
    // The other way round: what is below ours is mounted.
    let above = world
        .attach(&std::fs::File::options().read(true).write(true).open(attached.device.node())?, &persistent())
        .await?;
    let mounted = Mounted::new(attached.device, &world.folder, "below").await?;
    refused(world, &above, attached.device).await?;
    mounted.unmount().await?;
    there_and_back(world, &above).await?;
    there_and_back(world, &attached).await?;
    world.assert_no_leak().await
}

async fn read_only_twice(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let other = losetup(&["-r", image.name()]).await?;
    let mounted = Mounted::new(other, &world.folder, "other").await?;
    let writable = world.attach(&image.open()?, &persistent()).await?;
    refused(world, &writable, other).await?;
    world.detach(&writable).await?;
    let read_only = AttachOptions { read_only: true, ..persistent() };
    let attached = world.attach(&image.open()?, &read_only).await?;
    there_and_back(world, &attached).await?;
    mounted.unmount().await?;
    let_go(other).await?;
    world.assert_no_leak().await
}

async fn replaced_by_a_file_that_is_mounted(world: &mut World) -> Outcome {
    let image = image(world).await?;
    let first = Image::sparse(&world.folder, "first", image.open()?.metadata()?.len())?;
    let read_only = AttachOptions { read_only: true, ..persistent() };
    let attached = world.attach(&first.open()?, &read_only).await?;
    let object =
        Attachment::new(&world.connection, attached.path.clone().into(), Interaction::Forbidden).await?;
    let other = losetup(&[image.name()]).await?;
    let mounted = Mounted::new(other, &world.folder, "other").await?;
    let error = refusal(object.replace_backing_file(image.open()?.as_fd()).await)?;
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains(mounted.folder.to_str().unwrap()), "{error}");
    assert_eq!(world.properties(&attached.path).await?.backing_inode, first.open()?.metadata()?.ino());
    mounted.unmount().await?;
    object.replace_backing_file(image.open()?.as_fd()).await?;
    world.detach(&attached).await?;
    let_go(other).await?;
    world.assert_no_leak().await
}

async fn block_size_out_of_sight(world: &mut World) -> Outcome {
    let image = image(world).await?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    let elsewhere = mount_elsewhere(attached.device, world)?;
    let path = attached.path.as_str().to_owned().try_into()?;
    let control = Attachment::new(&world.connection, path, Interaction::Forbidden).await?;
    let error = refusal(control.set_block_size(4096).await)?;
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains("another mount namespace"), "{error}");
    end(elsewhere)?;
    control.set_block_size(4096).await?;
    world.detach(&attached).await?;
    world.assert_no_leak().await
}
