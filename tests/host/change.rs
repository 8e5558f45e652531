//! Changes of what is attached: size, direct I/O, block size, lifetime, backing file; and devices
//! found and removed.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use loopd_dbus::proxy::{Attachment, Interaction};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::table::Gpt;
use loopd_tests::world::{Attached, World, expect_kind, refusal};
use loopd_tests::{GAMES, NOBODY, Outcome, loop_ioctl};
use tokio::time::sleep;

loopd_tests::tests! {
    "change";
    Setup::None => [
        the_size_follows_the_file,
        the_size_of_a_read_only_one,
        direct_io_on_and_off,
        direct_io_where_it_cannot_be,
        block_size,
        block_size_of_a_mounted_one,
        block_size_that_is_none,
        partitions_stay_after_a_change,
        a_client_takes_what_it_bound,
        persistent_outlives_its_client,
        a_lazy_detach_is_taken_back,
        lifetimes_that_are_none,
        a_foreign_one_is_adopted,
        another_file_of_the_same_size,
        another_file_that_cannot_be,
        without_capabilities,
        read_only_and_busy_without_capabilities,
        a_free_device,
        a_device_is_removed,
    ];
    Setup::StandIn(Answer::No) => [others_may_change_nothing];
    Setup::StandIn(Answer::Yes) => [an_owner_is_not_asked, another_file_is_asked_about];
}

/// uid 0 with no capability, as the shipped unit starts the daemon.
const WITHOUT_CAPABILITIES: &[&str] =
    &["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"];

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn read_only() -> AttachOptions {
    AttachOptions { read_only: true, ..persistent() }
}

fn image(world: &World) -> anyhow::Result<Image> {
    Image::sparse(&world.folder, "image", 4 * MIB)
}

async fn attach(
    world: &World,
    image: &Image,
    options: &AttachOptions,
) -> anyhow::Result<(Attached, Attachment)> {
    let attached = world.attach(&image.open()?, options).await?;
    let object = world.object(&attached.path).await?;
    Ok((attached, object))
}

fn set_length(image: &Image, bytes: u64) -> anyhow::Result<()> {
    Ok(image.open()?.set_len(bytes)?)
}

async fn the_size_follows_the_file(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    for size in [6 * MIB, 2 * MIB, 2 * MIB + 512] {
        set_length(&image, size)?;
        object.set_capacity().await?;
        assert_eq!(world.volume(&attached.path).await?.size, size);
        assert_eq!(attached.device.number::<u64>("size")? * 512, size);
    }
    world.detach(&attached).await
}

async fn the_size_of_a_read_only_one(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, object) = attach(world, &image, &read_only()).await?;
    set_length(&image, 6 * MIB)?;
    object.set_capacity().await?;
    assert_eq!(world.volume(&attached.path).await?.size, 6 * MIB);
    world.detach(&attached).await
}

async fn direct_io_on_and_off(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    for on in [true, true, false] {
        object.set_direct_io(on).await?;
        assert_eq!(attached.device.flag("loop/dio")?, on);
        assert_eq!(world.properties(&attached.path).await?.direct_io, on);
    }
    world.detach(&attached).await
}

async fn direct_io_where_it_cannot_be(world: &mut World) -> Outcome {
    // A file system whose device has larger sectors than the upper device begins with.
    let lower = Image::sparse(&world.folder, "lower", 32 * MIB)?;
    let (below, _) = attach(world, &lower, &AttachOptions { block_size: 4096, ..persistent() }).await?;
    run("mkfs.ext4", ["-q", &below.device.node()]).await?;
    let mounted = Mounted::new(below.device, &world.folder, "mounted").await?;
    let upper = Image::sparse(&world.folder.join("mounted"), "upper", MIB)?;
    let (above, object) = attach(world, &upper, &AttachOptions { offset: 512, ..persistent() }).await?;
    let error = refusal(object.set_direct_io(true).await)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    assert!(error.message.contains(&above.device.node()) && error.message.contains("512"), "{error}");
    assert!(!world.properties(&above.path).await?.direct_io);
    world.detach(&above).await?;
    drop(upper);
    mounted.unmount().await?;
    world.detach(&below).await
}

async fn block_size(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    for size in [4096, 512, 1024] {
        object.set_block_size(size).await?;
        assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, size);
        assert_eq!(world.properties(&attached.path).await?.block_size, size);
    }
    world.detach(&attached).await
}

async fn block_size_of_a_mounted_one(world: &mut World) -> Outcome {
    let image = Image::ext4(&world.folder, "image", "change", "11111111-2222-3333-4444-0000000000b1").await?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    let mounted = Mounted::new(attached.device, &world.folder, "mounted").await?;
    let error = refusal(object.set_block_size(4096).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("mounted on"), "{error}");
    assert_eq!(world.properties(&attached.path).await?.block_size, 512);
    mounted.unmount().await?;
    world.detach(&attached).await
}

async fn block_size_that_is_none(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    for size in [0, 1, 511, 1000, 131_072, u32::MAX] {
        expect_kind(&refusal(object.set_block_size(size).await)?, ErrorKind::InvalidArgs)?;
    }
    assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, 512);
    world.detach(&attached).await
}

async fn partitions_stay_after_a_change(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    Gpt::new(&[(2048, 43007), (43008, 120_000)]).write(&image)?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    let before = world.partitions(&attached).await?;
    assert_eq!(before.len(), 2);
    object.set_direct_io(true).await?;
    object.set_lifetime(Lifetime::Client).await?;
    object.set_lifetime(Lifetime::Persistent).await?;
    set_length(&image, 80 * MIB)?;
    object.set_capacity().await?;
    // udev has the table read anew after each of them.
    loopd_tests::udev::settle().await?;
    eventually("the partitions are there", async || Ok(world.partitions(&attached).await? == before)).await?;
    world.detach(&attached).await
}

async fn a_client_takes_what_it_bound(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, _) = attach(world, &image, &persistent()).await?;
    let other = world.connect().await?;
    let theirs = Attachment::new(&other, attached.path.clone().into(), Interaction::Forbidden).await?;
    theirs.set_lifetime(Lifetime::Client).await?;
    let properties = world.properties(&attached.path).await?;
    assert_eq!(properties.lifetime, "client");
    assert_eq!(properties.client, other.unique_name().unwrap().as_str());
    assert!(properties.autoclear && attached.device.flag("loop/autoclear")?);
    drop(theirs);
    other.close().await?;
    world.gone(&attached).await
}

async fn persistent_outlives_its_client(world: &mut World) -> Outcome {
    let image = image(world)?;
    for options in [AttachOptions::default(), AttachOptions { read_only: true, ..AttachOptions::default() }] {
        let other = world.connect().await?;
        let manager = loopd_dbus::proxy::Manager::new(&other, Interaction::Forbidden).await?;
        let attached = Attached::new(manager.setup_loop(image.open()?.as_fd(), &options).await?)?;
        world.object(&attached.path).await?.set_lifetime(Lifetime::Persistent).await?;
        drop(manager);
        other.close().await?;
        loopd_tests::udev::settle().await?;
        let properties = world.properties(&attached.path).await?;
        assert_eq!((properties.lifetime.as_str(), properties.client.as_str()), ("persistent", ""));
        assert!(!attached.device.flag("loop/autoclear")?);
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn a_lazy_detach_is_taken_back(world: &mut World) -> Outcome {
    let image = Image::ext4(&world.folder, "image", "change", "11111111-2222-3333-4444-0000000000b2").await?;
    let (attached, object) = attach(world, &image, &persistent()).await?;
    let mounted = Mounted::new(attached.device, &world.folder, "mounted").await?;
    object.detach(DetachOptions { lazy: true }).await?;
    object.set_lifetime(Lifetime::Persistent).await?;
    assert_eq!(world.properties(&attached.path).await?.state, "attached");
    mounted.unmount().await?;
    loopd_tests::udev::settle().await?;
    assert!(attached.device.bound());
    world.detach(&attached).await
}

async fn lifetimes_that_are_none(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, _) = attach(world, &image, &persistent()).await?;
    for word in ["", "forever", "Client"] {
        let word = format!("s:{word}");
        let words = ["change", attached.path.as_str(), "SetLifetime", &word];
        world.probe(loopd_tests::ROOT, words).await?.refused(ErrorKind::InvalidArgs)?;
    }
    assert_eq!(world.properties(&attached.path).await?.lifetime, "persistent");
    world.detach(&attached).await
}

async fn a_foreign_one_is_adopted(world: &mut World) -> Outcome {
    let image = image(world)?;
    let node = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    eventually("it is seen", async || Ok(world.object_of(device).await?.is_some())).await?;
    let path = world.object_of(device).await?.unwrap();
    let object = world.object(&path).await?;
    set_length(&image, 6 * MIB)?;
    object.set_capacity().await?;
    assert_eq!(world.volume(&path).await?.size, 6 * MIB);
    assert!(!world.properties(&path).await?.managed, "a change does not adopt");
    object.set_lifetime(Lifetime::Persistent).await?;
    let properties = world.properties(&path).await?;
    assert_eq!((properties.managed, properties.owner, properties.lifetime.as_str()), (true, 0, "persistent"));
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}

fn first_bytes(device: LoopDevice) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; 16];
    File::open(device.node())?.read_exact(&mut bytes)?;
    Ok(bytes)
}

async fn another_file_of_the_same_size(world: &mut World) -> Outcome {
    let (first, second) = (image(world)?, Image::sparse(&world.folder, "second", 4 * MIB)?);
    first.open()?.write_all_at(&[1; 16], 0)?;
    second.open()?.write_all_at(&[2; 16], 0)?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let (attached, object) = attach(world, &first, &AttachOptions { lifetime, ..read_only() }).await?;
        let before = world.properties(&attached.path).await?;
        assert_eq!(first_bytes(attached.device)?, [1; 16]);
        object.replace_backing_file(second.open()?.as_fd()).await?;
        assert_eq!(first_bytes(attached.device)?, [2; 16]);
        let after = world.properties(&attached.path).await?;
        assert!(after.disk_sequence > before.disk_sequence, "{after:?}");
        assert_eq!(after.disk_sequence, attached.device.number::<u64>("diskseq")?);
        assert_eq!(after.backing_file, [second.path.to_str().unwrap().as_bytes(), b"\0"].concat());
        loopd_tests::udev::settle().await?;
        assert_eq!(world.properties(&attached.path).await?, after, "it is still the same attachment");
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn another_file_that_cannot_be(world: &mut World) -> Outcome {
    let (first, smaller) = (image(world)?, Image::sparse(&world.folder, "smaller", 2 * MIB)?);
    let (attached, object) = attach(world, &first, &read_only()).await?;
    let before = world.properties(&attached.path).await?;
    let error = refusal(object.replace_backing_file(smaller.open()?.as_fd()).await)?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("4194304 bytes"), "{error}");
    for file in [File::open(&world.folder)?, File::open("/dev/null")?, File::open(attached.device.node())?] {
        let error = refusal(object.replace_backing_file(file.as_fd()).await)?;
        expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    }
    assert_eq!(world.properties(&attached.path).await?, before);
    world.detach(&attached).await?;

    let (attached, object) = attach(world, &first, &persistent()).await?;
    let same = Image::sparse(&world.folder, "same", 4 * MIB)?;
    let error = refusal(object.replace_backing_file(same.open()?.as_fd()).await)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    world.detach(&attached).await
}

async fn without_capabilities(world: &mut World) -> Outcome {
    world.restart_daemon_under(WITHOUT_CAPABILITIES).await?;
    let image = image(world)?;
    for options in [persistent(), read_only()] {
        set_length(&image, 4 * MIB)?;
        let (attached, object) = attach(world, &image, &options).await?;
        set_length(&image, 6 * MIB)?;
        object.set_capacity().await?;
        object.set_direct_io(true).await?;
        object.set_direct_io(false).await?;
        object.set_block_size(4096).await?;
        object.set_lifetime(Lifetime::Client).await?;
        object.set_lifetime(Lifetime::Persistent).await?;
        let properties = world.properties(&attached.path).await?;
        assert_eq!((properties.block_size, properties.lifetime.as_str()), (4096, "persistent"));
        assert_eq!(world.volume(&attached.path).await?.size, 6 * MIB);
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn read_only_and_busy_without_capabilities(world: &mut World) -> Outcome {
    world.restart_daemon_under(WITHOUT_CAPABILITIES).await?;
    let image = image(world)?;
    let (attached, _) = attach(world, &image, &read_only()).await?;
    let opened = File::open(attached.device.node())?;
    expect_kind(&world.detach_fails(attached.device).await?, ErrorKind::Busy)?;
    assert_eq!(world.properties(&attached.path).await?.state, "attached");
    drop(opened);
    loopd_tests::udev::settle().await?;
    assert!(attached.device.bound(), "nothing has changed");
    world.detach(&attached).await
}

async fn a_free_device(world: &mut World) -> Outcome {
    let node = world.manager.find_free().await?;
    let device = LoopDevice::from_node(&node)?;
    assert!(!device.bound() && std::path::Path::new(&node).exists());
    Ok(())
}

async fn a_device_is_removed(world: &mut World) -> Outcome {
    let device = LoopDevice(sysfs::all().last().map_or(0, |last| last.0) + 50);
    expect_kind(&refusal(world.manager.remove_device(&device.node()).await)?, ErrorKind::NotFound)?;
    loop_ioctl::add(&loop_ioctl::control()?, device)?;
    eventually("its node is there", async || Ok(std::path::Path::new(&device.node()).exists())).await?;
    let image = image(world)?;
    let options = AttachOptions { number: Some(device.0), ..persistent() };
    let attached = world.attach(&image.open()?, &options).await?;
    let error = refusal(world.manager.remove_device(&device.node()).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("detach it first"), "{error}");
    world.detach(&attached).await?;
    for wrong in ["/dev/sda", "/dev/loop-control", "loop0", "/dev/loop4294967296"] {
        expect_kind(&refusal(world.manager.remove_device(wrong).await)?, ErrorKind::InvalidArgs)?;
    }
    let opened = File::open(device.node())?;
    let error = refusal(world.manager.remove_device(&device.node()).await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains("has it open"), "{error}");
    // One that goes is waited for.
    let closed = async {
        sleep(Duration::from_millis(200)).await;
        drop(opened);
    };
    let node = device.node();
    let (removed, ()) = tokio::join!(world.manager.remove_device(&node), closed);
    removed?;
    assert!(!std::path::Path::new(&format!("/sys/block/loop{}", device.0)).exists());
    Ok(())
}

/// Every change, as words for the probe.
fn changes(path: &str, file: &str) -> Vec<Vec<String>> {
    let call = |words: &[&str]| ["change", path].iter().chain(words).map(|word| (*word).to_owned()).collect();
    vec![
        call(&["SetCapacity"]),
        call(&["SetDirectIo", "b:true"]),
        call(&["SetBlockSize", "u:4096"]),
        call(&["SetLifetime", "s:client"]),
        call(&["ReplaceBackingFile", &format!("h:{file}")]),
        call(&["RescanPartitions"]),
    ]
}

async fn others_may_change_nothing(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (attached, _) = attach(world, &image, &persistent()).await?;
    let before = world.properties(&attached.path).await?;
    for words in changes(attached.path.as_str(), image.path.to_str().unwrap()) {
        world.probe(GAMES, &words).await?.refused(ErrorKind::AccessDenied)?;
    }
    world.probe(GAMES, ["remove", &sysfs::last_free()?.node()]).await?.refused(ErrorKind::AccessDenied)?;
    assert_eq!(world.properties(&attached.path).await?, before);
    world.detach(&attached).await
}

async fn an_owner_is_not_asked(world: &mut World) -> Outcome {
    let image = image(world)?;
    let words = ["setup", "regular", image.path.to_str().unwrap(), "lifetime=s:persistent"];
    let attached = world.probe(NOBODY, words).await?.attached()?;
    let asked = world.stand_in()?.checks().len();
    for words in &changes(attached.path.as_str(), image.path.to_str().unwrap())[..4] {
        world.probe(NOBODY, words).await?.ok()?;
    }
    assert_eq!(world.stand_in()?.checks().len(), asked);
    // The last of them bound it to a connection that has gone since.
    world.gone(&attached).await
}

async fn another_file_is_asked_about(world: &mut World) -> Outcome {
    let (first, second) = (image(world)?, Image::sparse(&world.folder, "second", 4 * MIB)?);
    let words = ["setup", "rdonly", first.path.to_str().unwrap(), "lifetime=s:persistent"];
    let attached = world.probe(NOBODY, words).await?.attached()?;
    let file = format!("h:{}", second.path.display());
    let words = ["change", attached.path.as_str(), "ReplaceBackingFile", &file];
    world.probe(NOBODY, words).await?.ok()?;
    let checks = world.stand_in()?.checks();
    let last = checks.last().unwrap();
    assert_eq!(
        (last.action.as_str(), last.details["file"].as_str()),
        ("org.loopd1.attach", second.path.to_str().unwrap())
    );
    world.stand_in()?.answer(Answer::No);
    world.probe(NOBODY, words).await?.refused(ErrorKind::AccessDenied)?;
    world.detach(&attached).await
}
