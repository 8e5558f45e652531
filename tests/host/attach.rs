//! The result of `SetupLoop` matches the request and the kernel.

use std::collections::HashSet;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::time::{Duration, SystemTime};

use loopd_dbus::names::attachment_path;
use loopd_dbus::properties::{from_bus_path, to_bus_path};
use loopd_dbus::{
    AttachOptions, AttachmentProperties, DetachOptions, ErrorKind, Lifetime, ListOptions, VolumeProperties,
};
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::{Outcome, loop_ioctl, skip, sysfs};
use rustix::fs::{AtFlags, StatxFlags};

loopd_tests::tests! {
    "attach";
    Setup::None => [
        object_path_contains_the_disk_sequence,
        properties_match_the_kernel,
        list_returns_the_same_properties,
        list_filters_by_file_and_offset,
        list_by_a_file_that_cannot_be_examined_fails,
        offset_and_size_limit_are_applied,
        offset_is_any_number_of_bytes,
        odd_sizes_are_rounded_down_to_sectors,
        option_makes_the_device_read_only,
        read_only_descriptor_makes_the_device_read_only,
        block_sizes_are_applied,
        reference_is_shown_by_losetup,
        requested_number_is_used,
        missing_number_is_created,
        direct_io_is_applied_or_refused,
        direct_io_follows_the_sectors_of_the_disk,
        direct_io_is_chosen_for_large_images_that_are_written_to,
        partition_scan_is_applied,
        client_lifetime_is_autoclear,
        persistent_lifetime_is_not_autoclear,
        with_wait_the_reply_follows_udev,
        without_wait_udev_follows_the_reply,
        block_device_is_attached,
        same_file_is_attached_twice,
        version_is_published,
    ];
}

/// `persistent`, without waiting for udev.
fn plain() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, wait: false, ..AttachOptions::default() }
}

async fn object_path_contains_the_disk_sequence(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let sequence: u64 = attached.device.number("diskseq")?;
    assert_eq!(attached.path.as_ref(), attachment_path(sequence).as_ref());
    fixture.detach(&attached).await
}

async fn properties_match_the_kernel(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let before = SystemTime::now();
    let options = AttachOptions {
        offset: 4096,
        size_limit: 65536,
        reference: "a reference".to_owned(),
        block_size: 1024,
        ..AttachOptions::default()
    };
    let attached = fixture.attach(&image.open()?, &options).await?;
    let device = attached.device;
    let metadata = std::fs::metadata(&image.path)?;
    let found = fixture.properties(&attached.path).await?;
    let expected = AttachmentProperties {
        device: device.node(),
        number: device.0,
        disk_sequence: device.number("diskseq")?,
        backing_file: to_bus_path(&device.backing_file().unwrap()),
        backing_device: metadata.dev(),
        backing_inode: metadata.ino(),
        offset: device.number("loop/offset")?,
        size_limit: device.number("loop/sizelimit")?,
        reference: loop_ioctl::reference(device)?,
        read_only: device.flag("ro")?,
        direct_io: device.flag("loop/dio")?,
        block_size: device.number("queue/logical_block_size")?,
        partition_scan: device.flag("loop/partscan")?,
        autoclear: device.flag("loop/autoclear")?,
        lifetime: "client".to_owned(),
        managed: true,
        owner: 0,
        client: fixture.connection.unique_name().unwrap().to_string(),
        since: found.since,
        state: "attached".to_owned(),
        warnings: loopd_dbus::Warnings::default(),
    };
    assert_eq!(found, expected);
    assert_eq!(
        (found.offset, found.size_limit, found.reference.as_str(), found.block_size),
        (4096, 65536, "a reference", 1024)
    );
    assert_eq!(from_bus_path(&found.backing_file), image.path.as_os_str().as_bytes());
    let since = SystemTime::UNIX_EPOCH + Duration::from_micros(found.since);
    assert!(before <= since && since <= SystemTime::now(), "{since:?}");

    let volume = fixture.volume(&attached.path).await?;
    assert_eq!(volume.device, device.node());
    assert_eq!(volume.size, device.number::<u64>("size")? * 512);
    assert_eq!(volume.size, 65536);
    assert!(volume.mount_points.is_empty());
    fixture.detach(&attached).await
}

async fn list_returns_the_same_properties(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "listed", "11111111-2222-3333-4444-000000000001").await?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let listed = fixture.list(false).await?;
    assert_eq!(listed.len(), 1);
    let (path, properties) = &listed[0];
    assert_eq!(*path, attached.path);
    assert_eq!(AttachmentProperties::from_dict(properties)?, fixture.properties(path).await?);
    assert_eq!(VolumeProperties::from_dict(properties)?, fixture.volume(path).await?);
    fixture.detach(&attached).await?;
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}

async fn list_filters_by_file_and_offset(fixture: &mut Fixture) -> Outcome {
    let first = Image::sparse(&fixture.directory, "first", MIB)?;
    let second = Image::sparse(&fixture.directory, "second", MIB)?;
    let at_offset = AttachOptions { offset: 512, ..plain() };
    let a = fixture.attach(&first.open()?, &plain()).await?;
    let b = fixture.attach(&first.open()?, &at_offset).await?;
    let c = fixture.attach(&second.open()?, &at_offset).await?;
    // A hard link is the same file.
    let link = fixture.directory.join("link");
    std::fs::hard_link(&first.path, &link)?;
    let found = async |file: Option<&std::path::Path>, offset| {
        let file = file.map(std::fs::File::open).transpose()?.map(Into::into);
        let listed = fixture.manager.list(&ListOptions { file, offset, all: false }).await?;
        anyhow::Ok(listed.into_iter().map(|(path, _)| path).collect::<HashSet<_>>())
    };
    let of = |attached: &[&Attached]| {
        attached.iter().map(|attached| attached.path.clone()).collect::<HashSet<_>>()
    };
    assert_eq!(found(None, None).await?, of(&[&a, &b, &c]));
    assert_eq!(found(Some(&link), None).await?, of(&[&a, &b]));
    assert_eq!(found(Some(&link), Some(512)).await?, of(&[&b]));
    assert_eq!(found(None, Some(512)).await?, of(&[&b, &c]));
    assert_eq!(found(None, Some(0)).await?, of(&[&a]));
    for attached in [a, b, c] {
        fixture.detach(&attached).await?;
    }
    Ok(())
}

/// A list without its filter has every attachment in it, and `loopctl detach FILE` detaches what is listed.
async fn list_by_a_file_that_cannot_be_examined_fails(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &plain()).await?;
    let directory = std::fs::File::open(&fixture.directory)?;
    let listed = ListOptions { file: Some(directory.into()), ..ListOptions::default() };
    expect_kind(&refusal(fixture.manager.list(&listed).await)?, ErrorKind::InvalidBackingFile)?;
    fixture.detach(&attached).await
}

async fn offset_and_size_limit_are_applied(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    let options = AttachOptions { offset: MIB, size_limit: MIB / 2, ..plain() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    assert_eq!(attached.device.number::<u64>("size")? * 512, MIB / 2);

    let mut device = std::fs::File::options().write(true).open(attached.device.node())?;
    device.seek(SeekFrom::Start(8192))?;
    device.write_all(b"through the device")?;
    device.sync_all()?;
    drop(device);
    fixture.detach(&attached).await?;

    let mut file = image.open_read_only()?;
    file.seek(SeekFrom::Start(MIB + 8192))?;
    let mut bytes = [0; 18];
    file.read_exact(&mut bytes)?;
    assert_eq!(&bytes, b"through the device");
    Ok(())
}

/// A file system after a program or a header: AppImage, SIF, firmware.
async fn offset_is_any_number_of_bytes(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let bytes: Vec<u8> = (0..MIB).map(|index| (index * index / 7).to_le_bytes()[0]).collect();
    std::fs::write(&image.path, &bytes)?;
    for (offset, block_size) in [(188_392, 0), (1, 0), (511, 512), (MIB - 524_388, 4096), (MIB - 513, 0)] {
        let options = AttachOptions { offset, block_size, ..plain() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        assert_eq!(attached.device.number::<u64>("size")?, (MIB - offset) / 512);
        let shown = std::fs::read(attached.device.node())?;
        let first = usize::try_from(offset)?;
        assert!(bytes[first..].starts_with(&shown) && bytes.len() - first - shown.len() < 512, "{offset}");
        fixture.detach(&attached).await?;
        let options = AttachOptions { direct_io: Some(true), ..options };
        let error = fixture.attach_fails(&image.open()?, &options).await?;
        expect_kind(&error, ErrorKind::InvalidArgs)?;
        assert!(error.message.contains("leave direct-io out"), "{error}");
        let direct =
            std::fs::File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&image.path)?;
        let error = fixture.attach_fails(&direct, &AttachOptions { direct_io: None, ..options }).await?;
        expect_kind(&error, ErrorKind::InvalidArgs)?;
        assert!(error.message.contains("O_DIRECT"), "{error}");
    }
    Ok(())
}

async fn odd_sizes_are_rounded_down_to_sectors(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 10 * 512 + 100)?;
    let attached = fixture.attach(&image.open()?, &plain()).await?;
    assert_eq!(attached.device.number::<u64>("size")?, 10);
    assert_eq!(fixture.volume(&attached.path).await?.size, 5120);
    fixture.detach(&attached).await
}

async fn option_makes_the_device_read_only(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    assert_read_only(fixture, &image.open()?, &AttachOptions { read_only: true, ..plain() }).await
}

async fn read_only_descriptor_makes_the_device_read_only(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    assert_read_only(fixture, &image.open_read_only()?, &plain()).await
}

async fn assert_read_only(fixture: &Fixture, file: &std::fs::File, options: &AttachOptions) -> Outcome {
    let attached = fixture.attach(file, options).await?;
    assert!(attached.device.flag("ro")?);
    assert!(fixture.properties(&attached.path).await?.read_only);
    fixture.detach(&attached).await
}

async fn block_sizes_are_applied(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    for block_size in [512, 1024, 2048, 4096] {
        let attached = fixture.attach(&image.open()?, &AttachOptions { block_size, ..plain() }).await?;
        assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, block_size);
        assert_eq!(fixture.properties(&attached.path).await?.block_size, block_size);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn reference_is_shown_by_losetup(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let reference = "r".repeat(63);
    let attached =
        fixture.attach(&image.open()?, &AttachOptions { reference: reference.clone(), ..plain() }).await?;
    assert_eq!(loop_ioctl::reference(attached.device)?, reference);
    assert_eq!(fixture.properties(&attached.path).await?.reference, reference);
    // util-linux has the column since 2.39.
    if let Ok(shown) = run("losetup", ["-nO", "REF", &attached.device.node()]).await {
        assert_eq!(shown.trim(), reference);
    }
    fixture.detach(&attached).await
}

async fn requested_number_is_used(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let wanted = sysfs::last_free()?;
    let attached =
        fixture.attach(&image.open()?, &AttachOptions { number: Some(wanted.0), ..plain() }).await?;
    assert_eq!(attached.device, wanted);
    fixture.detach(&attached).await
}

async fn missing_number_is_created(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let wanted = LoopDevice(sysfs::all().last().map_or(0, |last| last.0 + 7));
    let attached =
        fixture.attach(&image.open()?, &AttachOptions { number: Some(wanted.0), ..plain() }).await?;
    assert_eq!(attached.device, wanted);
    fixture.detach(&attached).await?;
    // The daemon may remove a number that it created; udev may still have it open.
    let control = loop_ioctl::control()?;
    eventually("the new device is gone", async || {
        Ok(!sysfs::all().contains(&wanted) || loop_ioctl::remove(&control, wanted).is_ok())
    })
    .await
}

async fn direct_io_is_applied_or_refused(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    if std::fs::File::options().read(true).custom_flags(direct).open(&image.path).is_err() {
        return skip(format!("{} takes no O_DIRECT", image.path.display()));
    }
    let options = AttachOptions { direct_io: Some(true), block_size: 4096, ..plain() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    assert!(attached.device.flag("loop/dio")?);
    assert!(fixture.properties(&attached.path).await?.direct_io);
    fixture.detach(&attached).await?;

    let attached = fixture.attach(&image.open()?, &plain()).await?;
    assert!(!attached.device.flag("loop/dio")?);
    assert!(!fixture.properties(&attached.path).await?.direct_io);
    fixture.detach(&attached).await
}

async fn direct_io_is_chosen_for_large_images_that_are_written_to(fixture: &mut Fixture) -> Outcome {
    const GIB: u64 = 1 << 30;
    let large = Image::sparse(&fixture.directory, "large", GIB)?;
    let reported = rustix::fs::statx(large.open()?, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if reported.stx_dio_offset_align != 512 {
        return skip(format!(
            "no direct I/O in sectors of 512 bytes is reported for {}",
            large.path.display()
        ));
    }
    let small = Image::sparse(&fixture.directory, "small", GIB - 512)?;
    let shared_memory = tempfile::tempdir_in("/dev/shm")?;
    let in_memory = Image::sparse(shared_memory.path(), "in-memory", GIB)?;
    let read_only = AttachOptions { read_only: true, ..plain() };
    let buffered = AttachOptions { direct_io: Some(false), ..plain() };
    let unaligned = AttachOptions { offset: 7, ..plain() };
    for (image, options, expected) in [
        (&large, plain(), true),
        (&small, plain(), false),
        (&in_memory, plain(), false),
        (&large, read_only, false),
        (&large, buffered, false),
        (&large, unaligned, false),
    ] {
        let attached = fixture.attach(&image.open()?, &options).await?;
        let found = fixture.properties(&attached.path).await?;
        assert_eq!(found.direct_io, expected, "{}: {options:?}", image.path.display());
        assert_eq!(found.block_size, 512);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

/// Sectors of 4096 bytes below the file system.
async fn direct_io_follows_the_sectors_of_the_disk(fixture: &mut Fixture) -> Outcome {
    let lower = Image::sparse(&fixture.directory, "lower", 32 * MIB)?;
    let below = fixture.attach(&lower.open()?, &AttachOptions { block_size: 4096, ..plain() }).await?;
    run("mkfs.ext4", ["-q", &below.device.node()]).await?;
    let mounted = Mounted::new(below.device, &fixture.directory, "mounted").await?;
    let image = Image::sparse(&mounted.directory, "image", MIB)?;
    let options = AttachOptions { direct_io: Some(true), ..plain() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    let found = fixture.properties(&attached.path).await?;
    assert!(found.direct_io);
    assert_eq!(found.block_size, 4096);
    fixture.detach(&attached).await?;
    for (options, text) in [
        (AttachOptions { block_size: 512, ..options.clone() }, "use a block size of 4096"),
        (AttachOptions { offset: 512, ..options.clone() }, "the offset 512 is no multiple of that"),
    ] {
        let error = fixture.attach_fails(&image.open()?, &options).await?;
        expect_kind(&error, ErrorKind::NotSupported)?;
        assert!(error.message.contains("sectors of 4096 bytes") && error.message.contains(text), "{error}");
    }
    drop(image);
    mounted.unmount().await?;
    fixture.detach(&below).await
}

async fn partition_scan_is_applied(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for partition_scan in [true, false] {
        let attached = fixture.attach(&image.open()?, &AttachOptions { partition_scan, ..plain() }).await?;
        assert_eq!(attached.device.flag("loop/partscan")?, partition_scan);
        assert_eq!(fixture.properties(&attached.path).await?.partition_scan, partition_scan);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn client_lifetime_is_autoclear(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    assert!(attached.device.flag("loop/autoclear")?);
    let properties = fixture.properties(&attached.path).await?;
    assert!(properties.autoclear);
    assert_eq!(properties.lifetime, "client");
    fixture.detach(&attached).await
}

async fn persistent_lifetime_is_not_autoclear(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &plain()).await?;
    assert!(!attached.device.flag("loop/autoclear")?);
    let properties = fixture.properties(&attached.path).await?;
    assert!(!properties.autoclear);
    assert_eq!((properties.lifetime.as_str(), properties.client.as_str()), ("persistent", ""));
    fixture.detach(&attached).await
}

async fn with_wait_the_reply_follows_udev(fixture: &mut Fixture) -> Outcome {
    // Several rounds on the same number, each with another label: the properties must be those of this disk.
    for round in 0..5 {
        let label = format!("round-{round}");
        let uuid = format!("11111111-2222-3333-4444-00000000000{round}");
        let image = Image::ext4(&fixture.directory, &label, &label, &uuid).await?;
        let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
        let volume = fixture.volume(&attached.path).await?;
        assert_eq!(
            (volume.usage.as_str(), volume.filesystem_type.as_str(), volume.filesystem_version.as_str()),
            ("filesystem", "ext4", "1.0")
        );
        assert_eq!((volume.filesystem_label.as_str(), volume.filesystem_uuid.as_str()), (&*label, &*uuid));
        let known = run("udevadm", ["info", "--query=property", &attached.device.node()]).await?;
        assert!(known.lines().any(|line| line == format!("ID_FS_LABEL={label}")), "{known}");
        let link = std::fs::canonicalize(format!("/dev/disk/by-uuid/{uuid}"))?;
        assert_eq!(link.to_str(), Some(attached.device.node().as_str()));
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn without_wait_udev_follows_the_reply(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "follows", "11111111-2222-3333-4444-00000000000a").await?;
    let attached = fixture.attach(&image.open()?, &plain()).await?;
    assert!(attached.device.bound());
    eventually("the daemon knows the file system", async || {
        Ok(fixture.volume(&attached.path).await?.filesystem_label == "follows")
    })
    .await?;
    fixture.detach(&attached).await
}

async fn block_device_is_attached(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let lower = fixture.attach(&image.open()?, &plain()).await?;
    let node = std::fs::File::options().read(true).write(true).open(lower.device.node())?;
    let upper = fixture.attach(&node, &plain()).await?;
    drop(node);
    assert_eq!(upper.device.backing_file().unwrap(), lower.device.node().as_bytes());
    assert_eq!(upper.device.number::<u64>("size")?, MIB / 512);
    fixture.detach(&upper).await?;
    fixture.detach(&lower).await
}

async fn same_file_is_attached_twice(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let first = fixture.attach(&image.open()?, &plain()).await?;
    let second = fixture.attach(&image.open()?, &plain()).await?;
    assert_ne!(first.device, second.device);
    assert_ne!(first.path, second.path);
    // Now with the method of the object.
    for attached in [first, second] {
        fixture.object(&attached.path).await?.detach(DetachOptions::default()).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn version_is_published(fixture: &mut Fixture) -> Outcome {
    assert_eq!(fixture.manager.version().await?, env!("CARGO_PKG_VERSION"));
    Ok(())
}
