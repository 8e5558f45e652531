//! Changes of an attachment: size, direct I/O, block size, lifetime, backing file; and free devices.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use loopd_dbus::proxy::{Attachment, Interaction};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::daemon::WITHOUT_CAPABILITIES;
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, NOBODY, Outcome, loop_ioctl};
use tokio::time::sleep;

loopd_tests::tests! {
    "change";
    Setup::None => [
        set_capacity_adopts_the_size_of_the_file,
        set_capacity_of_a_read_only_device,
        direct_io_is_switched_on_and_off,
        unsupported_direct_io_is_refused,
        block_size_is_changed,
        block_size_of_a_mounted_device_is_busy,
        invalid_block_sizes_are_refused,
        partitions_stay_after_a_change,
        attachment_bound_to_a_client_ends_with_it,
        persistent_attachment_outlives_its_client,
        set_lifetime_reverts_a_lazy_detach,
        invalid_lifetimes_are_refused,
        foreign_device_is_adopted,
        backing_file_is_replaced,
        unsuitable_backing_files_are_refused,
        changes_need_no_capability,
        read_only_and_busy_devices_need_no_capability,
        free_device_is_found,
        free_device_is_removed,
    ];
    Setup::StandIn(Answer::No) => [other_users_may_change_nothing];
    Setup::StandIn(Answer::Yes) => [owner_needs_no_authorization, replacing_the_file_needs_authorization];
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn read_only() -> AttachOptions {
    AttachOptions { read_only: true, ..persistent() }
}

fn image(fixture: &Fixture) -> anyhow::Result<Image> {
    Image::sparse(&fixture.directory, "image", 4 * MIB)
}

async fn attach(
    fixture: &Fixture,
    image: &Image,
    options: &AttachOptions,
) -> anyhow::Result<(Attached, Attachment)> {
    let attached = fixture.attach(&image.open()?, options).await?;
    let object = fixture.object(&attached.path).await?;
    Ok((attached, object))
}

fn set_length(image: &Image, bytes: u64) -> anyhow::Result<()> {
    Ok(image.open()?.set_len(bytes)?)
}

async fn set_capacity_adopts_the_size_of_the_file(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    for size in [6 * MIB, 2 * MIB, 2 * MIB + 512] {
        set_length(&image, size)?;
        object.set_capacity().await?;
        assert_eq!(fixture.volume(&attached.path).await?.size, size);
        assert_eq!(attached.device.number::<u64>("size")? * 512, size);
    }
    fixture.detach(&attached).await
}

async fn set_capacity_of_a_read_only_device(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, object) = attach(fixture, &image, &read_only()).await?;
    set_length(&image, 6 * MIB)?;
    object.set_capacity().await?;
    assert_eq!(fixture.volume(&attached.path).await?.size, 6 * MIB);
    fixture.detach(&attached).await
}

async fn direct_io_is_switched_on_and_off(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    for on in [true, true, false] {
        object.set_direct_io(on).await?;
        assert_eq!(attached.device.flag("loop/dio")?, on);
        assert_eq!(fixture.properties(&attached.path).await?.direct_io, on);
    }
    fixture.detach(&attached).await
}

async fn unsupported_direct_io_is_refused(fixture: &mut Fixture) -> Outcome {
    // A file system on a device whose sectors are larger than the initial ones of the upper device.
    let lower = Image::sparse(&fixture.directory, "lower", 32 * MIB)?;
    let (below, _) = attach(fixture, &lower, &AttachOptions { block_size: 4096, ..persistent() }).await?;
    run("mkfs.ext4", ["-q", &below.device.node()]).await?;
    let mounted = Mounted::new(below.device, &fixture.directory, "mounted").await?;
    let upper = Image::sparse(&fixture.directory.join("mounted"), "upper", MIB)?;
    let (above, object) = attach(fixture, &upper, &AttachOptions { offset: 512, ..persistent() }).await?;
    let error = refusal(object.set_direct_io(true).await)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    assert!(error.message.contains(&above.device.node()) && error.message.contains("512"), "{error}");
    assert!(!fixture.properties(&above.path).await?.direct_io);
    fixture.detach(&above).await?;
    drop(upper);
    mounted.unmount().await?;
    fixture.detach(&below).await
}

async fn block_size_is_changed(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    for size in [4096, 512, 1024] {
        object.set_block_size(size).await?;
        assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, size);
        assert_eq!(fixture.properties(&attached.path).await?.block_size, size);
    }
    fixture.detach(&attached).await
}

async fn block_size_of_a_mounted_device_is_busy(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "change", "11111111-2222-3333-4444-0000000000b1").await?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mounted").await?;
    let error = refusal(object.set_block_size(4096).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("mounted on"), "{error}");
    assert_eq!(fixture.properties(&attached.path).await?.block_size, 512);
    mounted.unmount().await?;
    fixture.detach(&attached).await
}

async fn invalid_block_sizes_are_refused(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    for size in [0, 1, 511, 1000, 131_072, u32::MAX] {
        expect_kind(&refusal(object.set_block_size(size).await)?, ErrorKind::InvalidArgs)?;
    }
    assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, 512);
    fixture.detach(&attached).await
}

async fn partitions_stay_after_a_change(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    Gpt::new(&[(2048, 43007), (43008, 120_000)]).write(&image)?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    let before = fixture.partitions(&attached).await?;
    assert_eq!(before.len(), 2);
    object.set_direct_io(true).await?;
    object.set_lifetime(Lifetime::Client).await?;
    object.set_lifetime(Lifetime::Persistent).await?;
    set_length(&image, 80 * MIB)?;
    object.set_capacity().await?;
    // After each change udev makes the kernel read the table again.
    loopd_tests::udev::settle().await?;
    eventually("the partitions are there", async || Ok(fixture.partitions(&attached).await? == before))
        .await?;
    fixture.detach(&attached).await
}

async fn attachment_bound_to_a_client_ends_with_it(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, _) = attach(fixture, &image, &persistent()).await?;
    let other = fixture.connect().await?;
    let theirs = Attachment::new(&other, attached.path.clone().into(), Interaction::Forbidden).await?;
    theirs.set_lifetime(Lifetime::Client).await?;
    let properties = fixture.properties(&attached.path).await?;
    assert_eq!(properties.lifetime, "client");
    assert_eq!(properties.client, other.unique_name().unwrap().as_str());
    assert!(properties.autoclear && attached.device.flag("loop/autoclear")?);
    drop(theirs);
    other.close().await?;
    fixture.gone(&attached).await
}

async fn persistent_attachment_outlives_its_client(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for options in [AttachOptions::default(), AttachOptions { read_only: true, ..AttachOptions::default() }] {
        let other = fixture.connect().await?;
        let manager = loopd_dbus::proxy::Manager::new(&other, Interaction::Forbidden).await?;
        let attached = Attached::new(manager.setup_loop(image.open()?.as_fd(), &options).await?)?;
        fixture.object(&attached.path).await?.set_lifetime(Lifetime::Persistent).await?;
        drop(manager);
        other.close().await?;
        loopd_tests::udev::settle().await?;
        let properties = fixture.properties(&attached.path).await?;
        assert_eq!((properties.lifetime.as_str(), properties.client.as_str()), ("persistent", ""));
        assert!(!attached.device.flag("loop/autoclear")?);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn set_lifetime_reverts_a_lazy_detach(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "change", "11111111-2222-3333-4444-0000000000b2").await?;
    let (attached, object) = attach(fixture, &image, &persistent()).await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mounted").await?;
    object.detach(DetachOptions { lazy: true }).await?;
    object.set_lifetime(Lifetime::Persistent).await?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
    mounted.unmount().await?;
    loopd_tests::udev::settle().await?;
    assert!(attached.device.bound());
    fixture.detach(&attached).await
}

async fn invalid_lifetimes_are_refused(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, _) = attach(fixture, &image, &persistent()).await?;
    for word in ["", "forever", "Client"] {
        let word = format!("s:{word}");
        let arguments = ["change", attached.path.as_str(), "SetLifetime", &word];
        fixture.probe(loopd_tests::ROOT, arguments).await?.refused(ErrorKind::InvalidArgs)?;
    }
    assert_eq!(fixture.properties(&attached.path).await?.lifetime, "persistent");
    fixture.detach(&attached).await
}

async fn foreign_device_is_adopted(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let device = losetup::attach(&[image.name()]).await?;
    let path = fixture.foreign(device).await?.path;
    let object = fixture.object(&path).await?;
    set_length(&image, 6 * MIB)?;
    object.set_capacity().await?;
    assert_eq!(fixture.volume(&path).await?.size, 6 * MIB);
    assert!(!fixture.properties(&path).await?.managed, "a change does not adopt");
    object.set_lifetime(Lifetime::Persistent).await?;
    let properties = fixture.properties(&path).await?;
    assert_eq!((properties.managed, properties.owner, properties.lifetime.as_str()), (true, 0, "persistent"));
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}

fn first_bytes(device: LoopDevice) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; 16];
    File::open(device.node())?.read_exact(&mut bytes)?;
    Ok(bytes)
}

async fn backing_file_is_replaced(fixture: &mut Fixture) -> Outcome {
    let (first, second) = (image(fixture)?, Image::sparse(&fixture.directory, "second", 4 * MIB)?);
    first.open()?.write_all_at(&[1; 16], 0)?;
    second.open()?.write_all_at(&[2; 16], 0)?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let (attached, object) = attach(fixture, &first, &AttachOptions { lifetime, ..read_only() }).await?;
        let before = fixture.properties(&attached.path).await?;
        assert_eq!(first_bytes(attached.device)?, [1; 16]);
        object.replace_backing_file(second.open()?.as_fd()).await?;
        assert_eq!(first_bytes(attached.device)?, [2; 16]);
        let after = fixture.properties(&attached.path).await?;
        assert!(after.disk_sequence > before.disk_sequence, "{after:?}");
        assert_eq!(after.disk_sequence, attached.device.number::<u64>("diskseq")?);
        assert_eq!(after.backing_file, [second.name().as_bytes(), b"\0"].concat());
        loopd_tests::udev::settle().await?;
        assert_eq!(fixture.properties(&attached.path).await?, after, "it is still the same attachment");
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn unsuitable_backing_files_are_refused(fixture: &mut Fixture) -> Outcome {
    let (first, smaller) = (image(fixture)?, Image::sparse(&fixture.directory, "smaller", 2 * MIB)?);
    let (attached, object) = attach(fixture, &first, &read_only()).await?;
    let before = fixture.properties(&attached.path).await?;
    let error = refusal(object.replace_backing_file(smaller.open()?.as_fd()).await)?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("4194304 bytes"), "{error}");
    for file in
        [File::open(&fixture.directory)?, File::open("/dev/null")?, File::open(attached.device.node())?]
    {
        let error = refusal(object.replace_backing_file(file.as_fd()).await)?;
        expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    }
    assert_eq!(fixture.properties(&attached.path).await?, before);
    fixture.detach(&attached).await?;

    let (attached, object) = attach(fixture, &first, &persistent()).await?;
    let same = Image::sparse(&fixture.directory, "same", 4 * MIB)?;
    let error = refusal(object.replace_backing_file(same.open()?.as_fd()).await)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    fixture.detach(&attached).await
}

async fn changes_need_no_capability(fixture: &mut Fixture) -> Outcome {
    fixture.restart_daemon_under(WITHOUT_CAPABILITIES).await?;
    let image = image(fixture)?;
    for options in [persistent(), read_only()] {
        set_length(&image, 4 * MIB)?;
        let (attached, object) = attach(fixture, &image, &options).await?;
        set_length(&image, 6 * MIB)?;
        object.set_capacity().await?;
        object.set_direct_io(true).await?;
        object.set_direct_io(false).await?;
        object.set_block_size(4096).await?;
        object.set_lifetime(Lifetime::Client).await?;
        object.set_lifetime(Lifetime::Persistent).await?;
        let properties = fixture.properties(&attached.path).await?;
        assert_eq!((properties.block_size, properties.lifetime.as_str()), (4096, "persistent"));
        assert_eq!(fixture.volume(&attached.path).await?.size, 6 * MIB);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn read_only_and_busy_devices_need_no_capability(fixture: &mut Fixture) -> Outcome {
    fixture.restart_daemon_under(WITHOUT_CAPABILITIES).await?;
    let image = image(fixture)?;
    let (attached, _) = attach(fixture, &image, &read_only()).await?;
    let opened = File::open(attached.device.node())?;
    expect_kind(&fixture.detach_fails(attached.device).await?, ErrorKind::Busy)?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
    drop(opened);
    loopd_tests::udev::settle().await?;
    assert!(attached.device.bound(), "nothing has changed");
    fixture.detach(&attached).await
}

async fn free_device_is_found(fixture: &mut Fixture) -> Outcome {
    let node = fixture.manager.find_free().await?;
    let device = LoopDevice::from_node(&node)?;
    assert!(!device.bound() && std::path::Path::new(&node).exists());
    Ok(())
}

async fn free_device_is_removed(fixture: &mut Fixture) -> Outcome {
    let device = LoopDevice(sysfs::all().last().map_or(0, |last| last.0) + 50);
    expect_kind(&refusal(fixture.manager.remove_device(&device.node()).await)?, ErrorKind::NotFound)?;
    loop_ioctl::add(&loop_ioctl::control()?, device)?;
    eventually("its node is there", async || Ok(std::path::Path::new(&device.node()).exists())).await?;
    let image = image(fixture)?;
    let options = AttachOptions { number: Some(device.0), ..persistent() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    let error = refusal(fixture.manager.remove_device(&device.node()).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("detach it first"), "{error}");
    fixture.detach(&attached).await?;
    for wrong in ["/dev/sda", "/dev/loop-control", "loop0", "/dev/loop4294967296"] {
        expect_kind(&refusal(fixture.manager.remove_device(wrong).await)?, ErrorKind::InvalidArgs)?;
    }
    let opened = File::open(device.node())?;
    let error = refusal(fixture.manager.remove_device(&device.node()).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("has it open"), "{error}");
    // It waits for a short time for a program that has the device open.
    let closed = async {
        sleep(Duration::from_millis(200)).await;
        drop(opened);
    };
    let node = device.node();
    let (removed, ()) = tokio::join!(fixture.manager.remove_device(&node), closed);
    removed?;
    assert!(!std::path::Path::new(&format!("/sys/block/loop{}", device.0)).exists());
    Ok(())
}

/// All changes, as arguments for the probe.
fn changes(path: &str, file: &str) -> Vec<Vec<String>> {
    let call = |arguments: &[&str]| {
        ["change", path].iter().chain(arguments).map(|word| (*word).to_owned()).collect()
    };
    vec![
        call(&["SetCapacity"]),
        call(&["SetDirectIo", "b:true"]),
        call(&["SetBlockSize", "u:4096"]),
        call(&["SetLifetime", "s:client"]),
        call(&["ReplaceBackingFile", &format!("h:{file}")]),
        call(&["RescanPartitions"]),
    ]
}

async fn other_users_may_change_nothing(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (attached, _) = attach(fixture, &image, &persistent()).await?;
    let before = fixture.properties(&attached.path).await?;
    for arguments in changes(attached.path.as_str(), image.name()) {
        fixture.probe(GAMES, &arguments).await?.refused(ErrorKind::AccessDenied)?;
    }
    fixture.probe(GAMES, ["remove", &sysfs::last_free()?.node()]).await?.refused(ErrorKind::AccessDenied)?;
    assert_eq!(fixture.properties(&attached.path).await?, before);
    fixture.detach(&attached).await
}

async fn owner_needs_no_authorization(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let arguments = ["setup", "regular", image.name(), "lifetime=s:persistent"];
    let attached = fixture.probe(NOBODY, arguments).await?.attached()?;
    let asked = fixture.stand_in()?.checks().len();
    for arguments in &changes(attached.path.as_str(), image.name())[..4] {
        fixture.probe(NOBODY, arguments).await?.ok()?;
    }
    assert_eq!(fixture.stand_in()?.checks().len(), asked);
    // The last change bound it to a connection that has ended.
    fixture.gone(&attached).await
}

async fn replacing_the_file_needs_authorization(fixture: &mut Fixture) -> Outcome {
    let (first, second) = (image(fixture)?, Image::sparse(&fixture.directory, "second", 4 * MIB)?);
    let arguments = ["setup", "rdonly", first.name(), "lifetime=s:persistent"];
    let attached = fixture.probe(NOBODY, arguments).await?.attached()?;
    let file = format!("h:{}", second.path.display());
    let arguments = ["change", attached.path.as_str(), "ReplaceBackingFile", &file];
    fixture.probe(NOBODY, arguments).await?.ok()?;
    let checks = fixture.stand_in()?.checks();
    let last = checks.last().unwrap();
    assert_eq!((last.action.as_str(), last.details["file"].as_str()), ("org.loopd1.attach", second.name()));
    fixture.stand_in()?.answer(Answer::No);
    fixture.probe(NOBODY, arguments).await?.refused(ErrorKind::AccessDenied)?;
    fixture.detach(&attached).await
}
