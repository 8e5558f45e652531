//! Partitions: their nodes and objects are what the table says, when the reply comes and later.
//!
//! Where the kernel has parsers for tables it makes the nodes, elsewhere the daemon does. Both must
//! give the same, so the tests compare with what util-linux says of the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::time::Duration;

use loopd_dbus::names::{ATTACHMENT, BUS_NAME, MANAGER, PARTITION, ROOT_PATH, VOLUME};
use loopd_dbus::properties::to_bus_path;
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, needs, run};
use loopd_tests::sysfs::{self, Extent, LoopDevice};
use loopd_tests::table::{self, Entry, Gpt, Losetup};
use loopd_tests::udev::{Listener, settle};
use loopd_tests::world::{Attached, World, expect_kind, refusal};
use loopd_tests::{Outcome, rounds, skip};
use zbus::wire::OwnedObjectPath;

pub mod damaged;
pub mod unprivileged;

loopd_tests::tests! {
    "partitions";
    Setup::None => [
        gpt_by_sfdisk,
        dos_by_sfdisk,
        gpt_by_sgdisk,
        gpt_by_parted,
        dos_by_parted,
        hybrid_iso,
        hybrid_iso_with_gpt,
        blocks_of_4096,
        blocks_of_4096_as_512,
        known_before_the_reply,
        without_wait_they_follow,
        file_system_in_a_partition,
        lazy_while_mounted,
        one_add_each,
        new_table_by_sfdisk,
        new_table_without_a_word,
        new_table_by_dd,
        rescan_while_mounted,
        rescan_without_partition_scan,
        not_asked_for,
        gone_after_detach,
        gone_with_the_client,
        foreign_ones_are_shown,
        stale_ones_are_swept,
        killed_daemon,
        many_rounds,
    ];
}

/// Two partitions: the first and last sectors of each, for an image of [`SIZE`].
const TWO: &[(u64, u64)] = &[(2048, 10239), (10240, 30719)];
const SECOND: Extent = Extent { start: 10240 * 512, size: 20480 * 512 };
const SIZE: u64 = 32 * MIB;
const UUID: &str = "11111111-2222-3333-4444-000000000020";

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn two(world: &World, name: &str) -> anyhow::Result<Image> {
    let image = Image::sparse(&world.folder, name, SIZE)?;
    Gpt::new(TWO).write(&image)?;
    Ok(image)
}

/// Has sfdisk write this script's table.
async fn sfdisk(world: &World, target: &str, words: &[&str], script: &str) -> Outcome {
    needs("sfdisk")?;
    let path = world.folder.join("script");
    std::fs::write(&path, script)?;
    let line = format!("sfdisk -q {} {target} < {}", words.join(" "), path.display());
    run("sh", ["-c", &line]).await.map(drop)
}

fn path_of(attached: &Attached, number: u32) -> OwnedObjectPath {
    loopd_dbus::names::partition_path(
        loopd_dbus::names::disk_sequence_of(attached.path.as_str()).expect("an attachment's path"),
        number,
    )
    .into()
}

/// What the objects say, in the words of a table.
async fn shown(world: &World, attached: &Attached) -> anyhow::Result<BTreeMap<u32, Entry>> {
    let mut shown = BTreeMap::new();
    for (number, (partition, volume)) in world.partitions(attached).await? {
        assert_eq!(partition.number, number);
        assert_eq!(partition.attachment, attached.path);
        assert_eq!(volume.device, attached.device.partition_node(number));
        assert_eq!(volume.size, partition.size);
        let entry = Entry {
            offset: partition.offset,
            size: partition.size,
            table: partition.table,
            kind: partition.kind,
            uuid: partition.uuid,
            label: partition.label,
        };
        shown.insert(number, entry);
    }
    Ok(shown)
}

/// Fails unless objects, sysfs and `/dev` have these partitions and no others.
async fn assert_there(world: &World, attached: &Attached, expected: &BTreeMap<u32, Entry>) -> Outcome {
    assert_eq!(shown(world, attached).await?, *expected);
    let extents = expected
        .iter()
        .map(|(number, entry)| (*number, Extent { start: entry.offset, size: entry.size }))
        .collect::<sysfs::Extents>();
    let device = attached.device;
    assert_eq!(device.partitions(), extents);
    assert_eq!(device.partition_nodes(), expected.keys().copied().collect());
    for number in expected.keys() {
        let metadata = std::fs::metadata(device.partition_node(*number))?;
        assert!(metadata.file_type().is_block_device());
        let of_kernel = device.attribute(&format!("loop{}p{number}/dev", device.0)).unwrap();
        let (major, minor) =
            (metadata.rdev() >> 8 & 0xfff, metadata.rdev() & 0xff | metadata.rdev() >> 12 & 0xfff00);
        assert_eq!(format!("{major}:{minor}").as_bytes(), of_kernel);
    }
    Ok(())
}

/// Fails unless nothing of the device's partitions is left.
fn assert_none(device: LoopDevice) {
    assert_eq!((device.partitions(), device.partition_nodes()), (sysfs::Extents::new(), BTreeSet::new()));
}

/// Attaches the image in all ways that matter, and compares with what util-linux says of it.
async fn assert_as_util_linux(world: &World, image: &Image, kind: &str, numbers: &[u32]) -> Outcome {
    let expected = table::of(image.name(), 512).await?;
    assert_eq!(expected.keys().copied().collect::<Vec<_>>(), numbers);
    assert!(expected.values().all(|entry| entry.table == kind), "{expected:?}");
    for read_only in [false, true] {
        for lifetime in [Lifetime::Client, Lifetime::Persistent] {
            let options = AttachOptions { read_only, lifetime, ..AttachOptions::default() };
            let attached = world.attach(&image.open()?, &options).await?;
            assert_there(world, &attached, &expected).await?;
            assert!(world.properties(&attached.path).await?.partition_scan);
            world.detach(&attached).await?;
            assert_none(attached.device);
        }
    }
    Ok(())
}

async fn gpt_by_sfdisk(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    let script = "label: gpt\n\
        size=8M, name=\"boot loader\"\n\
        size=16M, type=swap, name=\"données / 100%\"\n\
        type=linux\n";
    sfdisk(world, image.name(), &[], script).await?;
    assert_as_util_linux(world, &image, "gpt", &[1, 2, 3]).await
}

async fn dos_by_sfdisk(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    let script = "label: dos\nsize=4M, type=83, bootable\nsize=4M, type=82\ntype=5\nsize=4M\nsize=4M, type=c\nsize=4M\nsize=4M\nsize=4M\n";
    sfdisk(world, image.name(), &[], script).await?;
    assert_as_util_linux(world, &image, "dos", &[1, 2, 3, 5, 6, 7, 8, 9]).await
}

async fn gpt_by_sgdisk(world: &mut World) -> Outcome {
    needs("sgdisk")?;
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    // A gap in the numbers, and numbers out of order.
    let words = "-n 3:2048:+4M -t 3:ef00 -c 3:EFI -n 1:0:+8M -c 1:root -n 7:0:0 -t 7:8302 -c 7:home";
    run("sgdisk", words.split(' ').chain([image.name()])).await?;
    assert_as_util_linux(world, &image, "gpt", &[1, 3, 7]).await
}

async fn parted(image: &Image, words: &str) -> Outcome {
    needs("parted")?;
    run("parted", ["-s", image.name()].into_iter().chain(words.split(' '))).await.map(drop)
}

async fn gpt_by_parted(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    parted(&image, "mklabel gpt mkpart first ext4 1MiB 9MiB mkpart second fat32 9MiB 20MiB set 2 esp on")
        .await?;
    assert_as_util_linux(world, &image, "gpt", &[1, 2]).await
}

async fn dos_by_parted(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    let words = "mklabel msdos mkpart primary ext4 1MiB 9MiB mkpart extended 9MiB 60MiB \
        mkpart logical ext4 10MiB 20MiB mkpart logical ext4 21MiB 30MiB";
    parted(&image, words).await?;
    assert_as_util_linux(world, &image, "dos", &[1, 2, 5, 6]).await
}

async fn iso(world: &World, words: &[&str]) -> anyhow::Result<Image> {
    needs("xorriso")?;
    let tree = world.folder.join("tree");
    std::fs::create_dir(&tree)?;
    std::fs::write(tree.join("file"), "on the disk")?;
    let second = Image::ext4_sized(&world.folder, "second", "second", UUID, 2 * MIB).await?;
    let image = Image { path: world.folder.join("image.iso") };
    let start = ["-as", "mkisofs", "-quiet", "-V", "HYBRID", "-o", image.name(), "-partition_offset", "16"];
    let append = ["-append_partition", "2", "0x83", second.name()];
    run("xorriso", [&start[..], &append, words, &[tree.to_str().unwrap()]].concat()).await?;
    Ok(image)
}

/// The file systems of an attached ISO image: of the whole disk, and of its partitions.
async fn assert_iso(world: &World, image: &Image) -> Outcome {
    let attached = world.attach(&image.open_read_only()?, &persistent()).await?;
    let whole = world.volume(&attached.path).await?;
    assert_eq!((whole.filesystem_type.as_str(), whole.filesystem_label.as_str()), ("iso9660", "HYBRID"));
    let second = world.volume(&path_of(&attached, 2)).await?;
    assert_eq!((second.filesystem_type.as_str(), second.filesystem_label.as_str()), ("ext4", "second"));
    world.detach(&attached).await
}

async fn hybrid_iso(world: &mut World) -> Outcome {
    let image = iso(world, &[]).await?;
    assert_as_util_linux(world, &image, "dos", &[1, 2]).await?;
    assert_iso(world, &image).await
}

async fn hybrid_iso_with_gpt(world: &mut World) -> Outcome {
    let image = iso(world, &["-appended_part_as_gpt"]).await?;
    assert_as_util_linux(world, &image, "gpt", &[1, 2, 3]).await?;
    assert_iso(world, &image).await
}

/// An image that was partitioned while it had sectors of 4096 bytes.
async fn large_sectors(world: &World) -> anyhow::Result<Image> {
    let image = Image::sparse(&world.folder, "image", 64 * MIB)?;
    let losetup = Losetup::new(&["-f", "-b", "4096"], &image).await?;
    let script = "label: gpt\nsize=8M, name=first\nsize=16M, name=second\n";
    sfdisk(world, &losetup.device.node(), &["--no-reread", "--no-tell-kernel"], script).await?;
    settle().await?;
    Ok(image)
}

async fn blocks_of_4096(world: &mut World) -> Outcome {
    let image = large_sectors(world).await?;
    for read_only in [false, true] {
        for block_size in [0, 4096] {
            let options = AttachOptions { read_only, block_size, ..persistent() };
            let attached = world.attach(&image.open()?, &options).await?;
            assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, 4096);
            assert_eq!(world.properties(&attached.path).await?.block_size, 4096);
            let expected = table::of(&attached.device.node(), 4096).await?;
            assert_eq!(expected.len(), 2);
            assert_eq!(expected[&2].size, 16 * MIB);
            assert_there(world, &attached, &expected).await?;
            world.detach(&attached).await?;
            assert_none(attached.device);
        }
    }
    Ok(())
}

async fn blocks_of_4096_as_512(world: &mut World) -> Outcome {
    let image = large_sectors(world).await?;
    let options = AttachOptions { block_size: 512, ..persistent() };
    let attached = world.attach(&image.open()?, &options).await?;
    assert_eq!(world.properties(&attached.path).await?.block_size, 512);
    assert_eq!(attached.device.partitions(), table::by_kernel(&image)?, "what the kernel shows, at most");
    let shown = shown(world, &attached).await?;
    assert!(shown.values().all(|entry| entry.kind == "0xee"), "{shown:?}");
    assert_warned(world, "attach with a block size of 4096");
    world.detach(&attached).await
}

/// Fails unless the daemon's log has a warning with these words.
fn assert_warned(world: &World, words: &str) {
    let log = world.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains(words)), "no {words:?} in the log");
}

async fn known_before_the_reply(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let expected = table::of(image.name(), 512).await?;
    let signals = world.signals().await?;
    for read_only in [false, true, false, true] {
        let file = image.open()?;
        let options = AttachOptions { read_only, ..persistent() };
        let body = (zbus::Fd::from(file.as_fd()), options.encode());
        let reply = world
            .connection
            .call_method(Some(BUS_NAME), ROOT_PATH, Some(MANAGER), "SetupLoop", &body)
            .await?;
        // Nothing that is asked for here takes time: it is what a program sees that goes on at once.
        let body = reply.body();
        let attached = Attached::new(body.deserialize::<(OwnedObjectPath, String)>()?)?;
        let (device, path) = (attached.device, path_of(&attached, 2));
        let links = [1, 2].map(|number| format!("/dev/disk/by-partuuid/{}", expected[&number].uuid));
        let targets = links.map(std::fs::canonicalize);
        let volume = world.volume(&path).await?;
        assert_eq!(volume.filesystem_type, "ext4");
        assert_eq!((&*volume.filesystem_label, &*volume.filesystem_uuid), ("second", UUID));
        for (number, target) in [1, 2].into_iter().zip(targets) {
            let node = device.partition_node(number);
            assert_eq!(target?.to_str(), Some(&*node));
            let known = run("udevadm", ["info", "--query=property", &node]).await?;
            let has =
                |line: String| assert!(known.lines().any(|known| known == line), "no {line} in {known}");
            has(format!("ID_PART_ENTRY_NUMBER={number}"));
            has(format!("ID_PART_ENTRY_UUID={}", expected[&number].uuid));
            has(format!("DISKSEQ={}", device.number::<u64>("diskseq")?));
        }
        let link = std::fs::canonicalize(format!("/dev/disk/by-uuid/{UUID}"))?;
        assert_eq!(link.to_str(), Some(&*device.partition_node(2)));
        for number in [1, 2] {
            for interface in [PARTITION, VOLUME] {
                let added = signals.added(&path_of(&attached, number), interface).await?;
                assert!(added < reply.recv_position(), "p{number}: {interface} came after the reply");
            }
        }
        assert_there(world, &attached, &expected).await?;
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn without_wait_they_follow(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let expected = table::of(image.name(), 512).await?;
    for read_only in [false, true, false, true] {
        let options = AttachOptions { wait: false, read_only, ..persistent() };
        let attached = world.attach(&image.open()?, &options).await?;
        eventually("the partitions are all there", async || {
            let volume = world.volume(&path_of(&attached, 2)).await;
            let known = volume.is_ok_and(|volume| volume.filesystem_label == "second");
            Ok(known && shown(world, &attached).await? == expected)
        })
        .await?;
        settle().await?;
        assert_there(world, &attached, &expected).await?;
        world.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// Waits for a signal that the object is mounted on just these folders, and looks again.
async fn mounted_on(
    world: &World,
    signals: &loopd_tests::signals::Signals,
    path: &OwnedObjectPath,
    folders: &[&str],
) -> Outcome {
    let wanted: Vec<_> = folders.iter().map(|folder| to_bus_path(folder.as_bytes())).collect();
    let fits = |value: &zbus::OwnedVariant| {
        value.try_clone().ok().and_then(|value| Vec::<Vec<u8>>::try_from(value).ok()).as_ref()
            == Some(&wanted)
    };
    signals.changed(path, "MountPoints", fits).await?;
    assert_eq!(world.volume(path).await?.mount_points, wanted);
    Ok(())
}

async fn file_system_in_a_partition(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = world.attach(&image.open()?, &options).await?;
        let (node, path) = (attached.device.partition_node(2), path_of(&attached, 2));
        run("mkfs.ext4", ["-q", "-F", "-L", lifetime.as_str(), &node]).await?;
        eventually("udev's word of the new file system has come", async || {
            Ok(world.volume(&path).await?.filesystem_label == lifetime.as_str())
        })
        .await?;

        let signals = world.signals().await?;
        let mounted = Mounted::node(&node, &world.folder, "mount point").await?;
        let folder = mounted.folder.to_str().unwrap().to_owned();
        mounted_on(world, &signals, &path, &[&folder]).await?;
        assert!(world.volume(&attached.path).await?.mount_points.is_empty(), "the disk is not mounted");
        assert!(world.volume(&path_of(&attached, 1)).await?.mount_points.is_empty());
        std::fs::write(mounted.folder.join("file"), lifetime.as_str())?;

        let error = world.detach_fails(attached.device).await?;
        expect_kind(&error, ErrorKind::Busy)?;
        assert!(error.message.contains(&folder), "{error}");
        assert_there(world, &attached, &table::of(image.name(), 512).await?).await?;
        assert_eq!(world.properties(&attached.path).await?.state, "attached");
        assert_eq!(std::fs::read(mounted.folder.join("file"))?, lifetime.as_str().as_bytes());

        let signals = world.signals().await?;
        mounted.unmount().await?;
        mounted_on(world, &signals, &path, &[]).await?;
        // An opener of a partition alone holds the device, too.
        let opener = File::open(&node)?;
        expect_kind(&world.detach_fails(attached.device).await?, ErrorKind::Busy)?;
        drop(opener);
        world.detach(&attached).await?;
        assert_none(attached.device);

        let attached = world.attach(&image.open_read_only()?, &options).await?;
        assert_eq!(world.volume(&path_of(&attached, 2)).await?.filesystem_label, lifetime.as_str());
        let mounted = Mounted::node(&attached.device.partition_node(2), &world.folder, "mount point").await?;
        assert_eq!(std::fs::read(mounted.folder.join("file"))?, lifetime.as_str().as_bytes());
        mounted.unmount().await?;
        world.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

async fn lazy_while_mounted(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = world.attach(&image.open()?, &options).await?;
        let mounted = Mounted::node(&attached.device.partition_node(2), &world.folder, "mount point").await?;
        world.object(&attached.path).await?.detach(DetachOptions { lazy: true }).await?;
        assert_eq!(world.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.folder.join("file"), "still there")?;
        run("sync", ["-f".as_ref(), mounted.folder.as_os_str()]).await?;
        mounted.unmount().await?;
        world.gone(&attached).await?;
        assert!(world.partitions(&attached).await?.is_empty());
        eventually("the nodes are gone", async || Ok(attached.device.partition_nodes().is_empty())).await?;
        assert_none(attached.device);
    }
    Ok(())
}

async fn one_add_each(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    let device = sysfs::last_free()?;
    let listener = Listener::start(&world.folder).await?;
    let mut known = 0;
    for round in 0..20 {
        let options = AttachOptions { number: Some(device.0), read_only: round % 2 == 1, ..persistent() };
        let attached = world.attach(&image.open()?, &options).await?;
        // Whatever udev does after the reply belongs to it.
        settle().await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        settle().await?;
        let count = |events: &[loopd_tests::udev::Uevent], source: &str, action: &str, number: u32| {
            let name = format!("loop{}p{number}", device.0);
            let same = |event: &&loopd_tests::udev::Uevent| {
                (event.source.as_str(), event.action.as_str()) == (source, action) && event.device == name
            };
            events.iter().filter(same).count()
        };
        eventually("the adds are heard", async || {
            let events = &listener.about_partitions(device)?[known..];
            Ok([1, 2].iter().all(|number| count(events, "UDEV", "add", *number) > 0))
        })
        .await?;
        let heard = listener.about_partitions(device)?;
        let events = &heard[known..];
        for number in [1, 2] {
            for source in ["KERNEL", "UDEV"] {
                let found = ["add", "remove"].map(|action| count(events, source, action, number));
                assert_eq!(found, [1, 0], "round {round}, {source}, p{number}: {events:#?}");
            }
        }
        world.detach(&attached).await?;
        settle().await?;
        eventually("the removes are heard", async || {
            let events = &listener.about_partitions(device)?[known..];
            Ok([1, 2].iter().all(|number| count(events, "UDEV", "remove", *number) > 0))
        })
        .await?;
        known = listener.about_partitions(device)?.len();
    }
    listener.stop().await
}

/// Three partitions, of which the first is that of [`TWO`], and the second is not.
const THREE: &str =
    "label: gpt\nstart=2048, size=8192\nstart=12288, size=8192, name=moved\nsize=4096, name=new\n";
const ONE: &str = "label: gpt\nstart=2048, size=8192, name=alone\n";

/// Waits until all is as util-linux says, and stays so.
async fn assert_followed(world: &World, attached: &Attached, numbers: &[u32]) -> Outcome {
    let node = attached.device.node();
    let expected = table::of(&node, 512).await?;
    assert_eq!(expected.keys().copied().collect::<Vec<_>>(), numbers);
    let extents =
        |(number, entry): (&u32, &Entry)| (*number, Extent { start: entry.offset, size: entry.size });
    let extents: sysfs::Extents = expected.iter().map(extents).collect();
    let mut found = (BTreeMap::new(), sysfs::Extents::new());
    let follows = eventually("objects and nodes are what the new table says", async || {
        found = (shown(world, attached).await?, attached.device.partitions());
        Ok(found.0 == expected && found.1 == extents)
    });
    follows.await.map_err(|error| anyhow::anyhow!("{error}: {found:#?} is not {expected:#?}"))?;
    settle().await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_there(world, attached, &expected).await
}

async fn new_table_by_sfdisk(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    for words in [&[][..], &["--no-reread"]] {
        let attached = world.attach(&image.open()?, &persistent()).await?;
        for (script, numbers) in [(THREE, &[1, 2, 3][..]), (ONE, &[1]), (THREE, &[1, 2, 3])] {
            let signals = world.signals().await?;
            let before = world.partitions(&attached).await?;
            sfdisk(world, &attached.device.node(), words, script).await?;
            assert_followed(world, &attached, numbers).await?;
            for number in numbers.iter().filter(|number| !before.contains_key(number)) {
                signals.added(&path_of(&attached, *number), PARTITION).await?;
            }
            for number in before.keys().filter(|number| !numbers.contains(number)) {
                signals.removed(&path_of(&attached, *number), PARTITION).await?;
            }
        }
        world.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// Has the table read again; all must be true when the reply comes.
async fn rescan(world: &World, attached: &Attached) -> Outcome {
    let expected = table::of(&attached.device.node(), 512).await?;
    world.object(&attached.path).await?.rescan_partitions().await?;
    assert_there(world, attached, &expected).await
}

async fn new_table_without_a_word(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = world.attach(&image.open()?, &options).await?;
        for (script, numbers) in [(THREE, &[1, 2, 3][..]), (ONE, &[1]), (THREE, &[1, 2, 3])] {
            // Into the file: neither the kernel nor udev sees it.
            sfdisk(world, image.name(), &[], script).await?;
            run("blockdev", ["--flushbufs", &attached.device.node()]).await?;
            rescan(world, &attached).await?;
            assert_followed(world, &attached, numbers).await?;
            // And again, with nothing new.
            rescan(world, &attached).await?;
            rescan(world, &attached).await?;
        }
        world.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

async fn new_table_by_dd(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    for (name, script, numbers) in [("three", THREE, &[1, 2, 3][..]), ("one", ONE, &[1])] {
        let other = Image::sparse(&world.folder, name, SIZE)?;
        sfdisk(world, other.name(), &[], script).await?;
        let words = [
            format!("if={}", other.name()),
            format!("of={}", attached.device.node()),
            "conv=fsync".to_owned(),
        ];
        run("dd", words.iter().map(String::as_str).chain(["bs=1M", "status=none"])).await?;
        // udev answers dd's close at the same time.
        world.object(&attached.path).await?.rescan_partitions().await?;
        assert_followed(world, &attached, numbers).await?;
        rescan(world, &attached).await?;
    }
    // A disk without a table has none.
    let node = attached.device.node();
    run("wipefs", ["-q", "-a", &node]).await?;
    world.object(&attached.path).await?.rescan_partitions().await?;
    eventually("all are gone", async || {
        Ok(world.partitions(&attached).await?.is_empty() && attached.device.partitions().is_empty())
    })
    .await?;
    settle().await?;
    assert_none(attached.device);
    world.detach(&attached).await
}

async fn rescan_while_mounted(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let attached = world.attach(&image.open()?, &persistent()).await?;
    let before = world.partitions(&attached).await?;
    let mounted = Mounted::node(&attached.device.partition_node(2), &world.folder, "mount point").await?;
    sfdisk(world, image.name(), &[], ONE).await?;
    run("blockdev", ["--flushbufs", &attached.device.node()]).await?;
    let object = world.object(&attached.path).await?;
    let error = refusal(object.rescan_partitions().await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    for named in [attached.device.node(), mounted.folder.display().to_string()] {
        assert!(error.message.contains(&named), "{named} is not named: {}", error.message);
    }
    // The kernel keeps all then.
    assert_eq!(attached.device.partitions().keys().collect::<Vec<_>>(), [&1, &2]);
    assert_eq!(
        world.partitions(&attached).await?.keys().collect::<Vec<_>>(),
        before.keys().collect::<Vec<_>>()
    );
    mounted.unmount().await?;
    settle().await?;
    run("blockdev", ["--flushbufs", &attached.device.node()]).await?;
    rescan(world, &attached).await?;
    assert_followed(world, &attached, &[1]).await?;
    world.detach(&attached).await
}

async fn rescan_without_partition_scan(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    let options = AttachOptions { partition_scan: false, ..persistent() };
    // The second time the daemon knows more of the kernel.
    for _ in 0..2 {
        let attached = world.attach(&image.open()?, &options).await?;
        let result = world.object(&attached.path).await?.rescan_partitions().await;
        let nodes = attached.device.partitions();
        // Whatever was made would outlive the device.
        run("partx", ["-d", &attached.device.node()]).await.ok();
        assert_eq!(nodes, sysfs::Extents::new(), "nodes that were not asked for ({result:?})");
        expect_kind(&refusal(result)?, ErrorKind::NotSupported)?;
        world.detach(&attached).await?;
        let attached = world.attach(&image.open()?, &persistent()).await?;
        assert_eq!(world.partitions(&attached).await?.len(), 2);
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn not_asked_for(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    for read_only in [false, true] {
        let options = AttachOptions { partition_scan: false, read_only, ..persistent() };
        let attached = world.attach(&image.open()?, &options).await?;
        let assert_no_partitions = async || {
            assert_none(attached.device);
            assert!(world.partitions(&attached).await?.is_empty());
            anyhow::Ok(())
        };
        assert_no_partitions().await?;
        // Nor does an event bring them.
        if !read_only {
            drop(File::options().write(true).open(attached.device.node())?);
        }
        settle().await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_no_partitions().await?;
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn gone_after_detach(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    let blank = Image::sparse(&world.folder, "blank", SIZE)?;
    let number = Some(sysfs::last_free()?.0);
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        for wait in [true, false] {
            let options = AttachOptions { number, lifetime, wait, ..AttachOptions::default() };
            let signals = world.signals().await?;
            let attached = world.attach(&image.open()?, &options).await?;
            eventually("both are there", async || Ok(world.partitions(&attached).await?.len() == 2)).await?;
            world.detach(&attached).await?;
            assert_none(attached.device);
            assert!(world.partitions(&attached).await?.is_empty());
            for partition in [1, 2] {
                for interface in [PARTITION, VOLUME] {
                    signals.removed(&path_of(&attached, partition), interface).await?;
                }
            }
            signals.removed(&attached.path, ATTACHMENT).await?;
            let attached = world.attach(&blank.open()?, &options).await?;
            settle().await?;
            assert_none(attached.device);
            assert!(world.partitions(&attached).await?.is_empty());
            world.detach(&attached).await?;
        }
    }
    Ok(())
}

async fn gone_with_the_client(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    for _ in 0..10 {
        let mut probe = world.probe_hold(loopd_tests::ROOT, ["--hold", "setup", "regular", image.name()])?;
        let attached = probe.reply().await?.attached()?;
        assert_eq!(world.partitions(&attached).await?.len(), 2);
        probe.kill().await?;
        world.gone(&attached).await?;
        assert!(world.partitions(&attached).await?.is_empty());
        eventually("the nodes are gone", async || Ok(attached.device.partition_nodes().is_empty())).await?;
    }
    Ok(())
}

async fn foreign_ones_are_shown(world: &mut World) -> Outcome {
    let image = two(world, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let losetup = Losetup::new(&["-f", "-P"], &image).await?;
    let device = losetup.device;
    let mut object = None;
    eventually("the device is seen", async || {
        object = world.object_of(device).await?;
        Ok(object.is_some())
    })
    .await?;
    let attached = Attached { path: object.unwrap(), device };
    let by_kernel = device.partitions();
    if by_kernel.is_empty() {
        settle().await?;
        assert!(device.partitions().is_empty(), "a foreign device's partitions are not ours to make");
        run("partx", ["--add", &device.node()]).await?;
    }
    assert_followed(world, &attached, &[1, 2]).await?;
    eventually("udev's word has come", async || {
        Ok(world.volume(&path_of(&attached, 2)).await?.filesystem_label == "second")
    })
    .await?;
    run("partx", ["--delete", "--nr", "1", &device.node()]).await?;
    eventually("the first is gone", async || {
        Ok(world.partitions(&attached).await?.keys().eq([&2]) && device.partitions().keys().eq([&2]))
    })
    .await?;
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    std::mem::forget(losetup);
    assert_none(device);
    Ok(())
}

/// Leaves partitions on a free device, as a program that has died may.
async fn leave_stale(image: &Image, device: LoopDevice) -> Outcome {
    run("losetup", [&device.node(), image.name()]).await?;
    for [number, start, sectors] in [["1", "4096", "1024"], ["9", "8192", "2048"]] {
        run("addpart", [&device.node(), number, start, sectors]).await?;
    }
    settle().await?;
    run("losetup", ["-d", &device.node()]).await?;
    eventually("it is free", async || Ok(!device.bound())).await?;
    if device.partitions().is_empty() {
        return skip("this kernel leaves no partitions on a free device");
    }
    Ok(())
}

async fn stale_ones_are_swept(world: &mut World) -> Outcome {
    let other = Image::sparse(&world.folder, "other", SIZE)?;
    let blank = Image::sparse(&world.folder, "blank", SIZE)?;
    let image = two(world, "image")?;
    let expected = table::of(image.name(), 512).await?;
    let device = sysfs::last_free()?;
    for partition_scan in [true, false] {
        for (file, expected) in [(&blank, None), (&image, Some(&expected))] {
            leave_stale(&other, device).await?;
            let options = AttachOptions { number: Some(device.0), partition_scan, ..persistent() };
            let attached = world.attach(&file.open()?, &options).await?;
            let none = BTreeMap::new();
            let expected = if partition_scan { expected.unwrap_or(&none) } else { &none };
            assert_there(world, &attached, expected).await?;
            world.detach(&attached).await?;
            assert_none(device);
        }
    }
    assert_warned(world, "that an earlier attach has left");
    Ok(())
}

async fn killed_daemon(world: &mut World) -> Outcome {
    let mut random = rounds::random("partitions::killed_daemon");
    let image = two(world, "image")?;
    for round in 0..20 {
        // A daemon that knows the kernel already, and one that does not.
        if round % 2 == 1 {
            let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
            world.detach(&attached).await?;
        }
        let (manager, file) = (world.manager.clone(), image.open()?);
        let options =
            AttachOptions { read_only: random.bool(), wait: random.bool(), ..AttachOptions::default() };
        let call = tokio::spawn(async move { manager.setup_loop(file.as_fd(), &options).await.map(drop) });
        tokio::time::sleep(Duration::from_micros(random.u64(0..30_000))).await;
        let mut daemon = world.take_daemon().unwrap();
        daemon.kill().await?;
        drop(daemon);
        // It was done, or it was not.
        let _either = call.await?;
        let folder = world.folder.clone();
        eventually(&format!("nothing is attached after round {round}"), async || {
            Ok(sysfs::bound_by_tests(&folder).is_empty())
        })
        .await?;
        eventually(&format!("no partition is left after round {round}"), async || {
            Ok(sysfs::stale_partitions().is_empty())
        })
        .await?;
        world.restart_daemon(&[]).await?;
    }
    Ok(())
}

async fn many_rounds(world: &mut World) -> Outcome {
    let (_, rounds) = rounds::of("partitions::many_rounds", 100);
    let image = two(world, "image")?;
    let expected = table::of(image.name(), 512).await?;
    for round in 0..rounds {
        let lifetime = if round % 2 == 0 { Lifetime::Client } else { Lifetime::Persistent };
        let options = AttachOptions { lifetime, read_only: round / 2 % 2 == 1, ..AttachOptions::default() };
        let attached = world.attach(&image.open()?, &options).await?;
        let at_reply = (attached.device.partitions(), attached.device.partition_nodes());
        assert_eq!(at_reply.1, BTreeSet::from([1, 2]), "round {round}");
        assert_eq!(at_reply.0[&2], SECOND, "round {round}");
        assert_eq!(shown(world, &attached).await?, expected, "round {round}");
        world.detach(&attached).await?;
        let left = (attached.device.partitions(), attached.device.partition_nodes());
        assert_eq!(left, (sysfs::Extents::new(), BTreeSet::new()), "round {round}: left after the detach");
    }
    Ok(())
}
