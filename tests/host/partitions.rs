//! Partitions: nodes and objects match the table, at the time of the reply and later.
//!
//! If the kernel has parsers for tables, it creates the nodes, otherwise the daemon does. The result must be
//! the same, so the tests compare it with util-linux's view of the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::time::Duration;

use loopd_dbus::names::{ATTACHMENT, BUS_NAME, MANAGER, PARTITION, ROOT_PATH, VOLUME};
use loopd_dbus::properties::to_bus_path;
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup::Losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, needs, run};
use loopd_tests::sysfs::{self, Extent, LoopDevice};
use loopd_tests::table::{self, Entry, Gpt};
use loopd_tests::udev::{Listener, Uevent, settle};
use loopd_tests::{Outcome, rounds, skip};
use zbus::wire::OwnedObjectPath;

pub mod damaged;
pub mod superfloppy;
pub mod unprivileged;

loopd_tests::tests! {
    "partitions";
    Setup::None => [
        gpt_of_sfdisk,
        dos_of_sfdisk,
        gpt_of_sgdisk,
        gpt_of_parted,
        dos_of_parted,
        hybrid_iso,
        hybrid_iso_with_gpt,
        table_with_4096_byte_sectors,
        table_with_4096_byte_sectors_on_512,
        partitions_are_published_before_the_reply,
        without_wait_partitions_follow_the_reply,
        mounted_partition_keeps_the_device_busy,
        lazy_detach_with_a_mounted_partition,
        each_partition_is_added_once,
        table_changed_by_sfdisk_is_followed,
        table_changed_in_the_file_is_read_by_rescan,
        table_changed_by_dd_is_followed,
        rescan_with_a_mounted_partition_is_busy,
        rescan_without_partition_scan_is_refused,
        without_partition_scan_there_are_none,
        partitions_end_with_the_detach,
        partitions_end_with_the_client,
        foreign_partitions_are_published,
        stale_partitions_are_removed,
        partitions_survive_a_killed_daemon,
        many_rounds_leave_nothing,
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

fn two(fixture: &Fixture, name: &str) -> anyhow::Result<Image> {
    let image = Image::sparse(&fixture.directory, name, SIZE)?;
    Gpt::new(TWO).write(&image)?;
    Ok(image)
}

/// Writes the table of this script with sfdisk.
async fn sfdisk(fixture: &Fixture, target: &str, arguments: &[&str], script: &str) -> Outcome {
    needs("sfdisk")?;
    let path = fixture.directory.join("script");
    std::fs::write(&path, script)?;
    let line = format!("sfdisk -q {} {target} < {}", arguments.join(" "), path.display());
    run("sh", ["-c", &line]).await.map(drop)
}

fn path_of(attached: &Attached, number: u32) -> OwnedObjectPath {
    loopd_dbus::names::partition_path(
        loopd_dbus::names::disk_sequence_of(attached.path.as_str()).expect("an attachment's path"),
        number,
    )
    .into()
}

/// What the objects say, in the arguments of a table.
async fn shown(fixture: &Fixture, attached: &Attached) -> anyhow::Result<BTreeMap<u32, Entry>> {
    let mut shown = BTreeMap::new();
    for (number, (partition, volume)) in fixture.partitions(attached).await? {
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

/// Fails unless objects, sysfs and `/dev` have exactly these partitions.
async fn assert_there(fixture: &Fixture, attached: &Attached, expected: &BTreeMap<u32, Entry>) -> Outcome {
    assert_eq!(shown(fixture, attached).await?, *expected);
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

/// Fails if a partition of the device is left.
fn assert_none(device: LoopDevice) {
    assert_eq!((device.partitions(), device.partition_nodes()), (sysfs::Extents::new(), BTreeSet::new()));
}

/// Attaches the image in all relevant ways, and compares with util-linux.
async fn assert_as_util_linux(fixture: &Fixture, image: &Image, kind: &str, numbers: &[u32]) -> Outcome {
    let expected = table::of(image.name(), 512).await?;
    assert_eq!(expected.keys().copied().collect::<Vec<_>>(), numbers);
    assert!(expected.values().all(|entry| entry.table == kind), "{expected:?}");
    for read_only in [false, true] {
        for lifetime in [Lifetime::Client, Lifetime::Persistent] {
            let options = AttachOptions { read_only, lifetime, ..AttachOptions::default() };
            let attached = fixture.attach(&image.open()?, &options).await?;
            assert_there(fixture, &attached, &expected).await?;
            assert!(fixture.properties(&attached.path).await?.partition_scan);
            fixture.detach(&attached).await?;
            assert_none(attached.device);
        }
    }
    Ok(())
}

async fn gpt_of_sfdisk(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    let script = "label: gpt\n\
        size=8M, name=\"boot loader\"\n\
        size=16M, type=swap, name=\"données / 100%\"\n\
        type=linux\n";
    sfdisk(fixture, image.name(), &[], script).await?;
    assert_as_util_linux(fixture, &image, "gpt", &[1, 2, 3]).await
}

async fn dos_of_sfdisk(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    let script = "label: dos\nsize=4M, type=83, bootable\nsize=4M, type=82\ntype=5\nsize=4M\nsize=4M, type=c\nsize=4M\nsize=4M\nsize=4M\n";
    sfdisk(fixture, image.name(), &[], script).await?;
    assert_as_util_linux(fixture, &image, "dos", &[1, 2, 3, 5, 6, 7, 8, 9]).await
}

async fn gpt_of_sgdisk(fixture: &mut Fixture) -> Outcome {
    needs("sgdisk")?;
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    // A gap in the numbers, and numbers out of order.
    let arguments = "-n 3:2048:+4M -t 3:ef00 -c 3:EFI -n 1:0:+8M -c 1:root -n 7:0:0 -t 7:8302 -c 7:home";
    run("sgdisk", arguments.split(' ').chain([image.name()])).await?;
    assert_as_util_linux(fixture, &image, "gpt", &[1, 3, 7]).await
}

async fn parted(image: &Image, arguments: &str) -> Outcome {
    needs("parted")?;
    run("parted", ["-s", image.name()].into_iter().chain(arguments.split(' '))).await.map(drop)
}

async fn gpt_of_parted(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    parted(&image, "mklabel gpt mkpart first ext4 1MiB 9MiB mkpart second fat32 9MiB 20MiB set 2 esp on")
        .await?;
    assert_as_util_linux(fixture, &image, "gpt", &[1, 2]).await
}

async fn dos_of_parted(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    let arguments = "mklabel msdos mkpart primary ext4 1MiB 9MiB mkpart extended 9MiB 60MiB \
        mkpart logical ext4 10MiB 20MiB mkpart logical ext4 21MiB 30MiB";
    parted(&image, arguments).await?;
    assert_as_util_linux(fixture, &image, "dos", &[1, 2, 5, 6]).await
}

async fn iso(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<Image> {
    needs("xorriso")?;
    let tree = fixture.directory.join("tree");
    std::fs::create_dir(&tree)?;
    std::fs::write(tree.join("file"), "on the disk")?;
    let second = Image::ext4_sized(&fixture.directory, "second", "second", UUID, 2 * MIB).await?;
    let image = Image { path: fixture.directory.join("image.iso") };
    let start = ["-as", "mkisofs", "-quiet", "-V", "HYBRID", "-o", image.name(), "-partition_offset", "16"];
    let append = ["-append_partition", "2", "0x83", second.name()];
    run("xorriso", [&start[..], &append, arguments, &[tree.to_str().unwrap()]].concat()).await?;
    Ok(image)
}

/// The file systems of an attached ISO image: of the whole disk, and of its partitions.
async fn assert_iso(fixture: &Fixture, image: &Image) -> Outcome {
    let attached = fixture.attach(&image.open_read_only()?, &persistent()).await?;
    let whole = fixture.volume(&attached.path).await?;
    assert_eq!((whole.filesystem_type.as_str(), whole.filesystem_label.as_str()), ("iso9660", "HYBRID"));
    let second = fixture.volume(&path_of(&attached, 2)).await?;
    assert_eq!((second.filesystem_type.as_str(), second.filesystem_label.as_str()), ("ext4", "second"));
    fixture.detach(&attached).await
}

async fn hybrid_iso(fixture: &mut Fixture) -> Outcome {
    let image = iso(fixture, &[]).await?;
    assert_as_util_linux(fixture, &image, "dos", &[1, 2]).await?;
    assert_iso(fixture, &image).await
}

async fn hybrid_iso_with_gpt(fixture: &mut Fixture) -> Outcome {
    let image = iso(fixture, &["-appended_part_as_gpt"]).await?;
    assert_as_util_linux(fixture, &image, "gpt", &[1, 2, 3]).await?;
    assert_iso(fixture, &image).await
}

/// An image that was partitioned while it had sectors of 4096 bytes.
async fn large_sectors(fixture: &Fixture) -> anyhow::Result<Image> {
    let image = Image::sparse(&fixture.directory, "image", 64 * MIB)?;
    let losetup = Losetup::new(&["-b", "4096"], &image).await?;
    let script = "label: gpt\nsize=8M, name=first\nsize=16M, name=second\n";
    sfdisk(fixture, &losetup.device.node(), &["--no-reread", "--no-tell-kernel"], script).await?;
    settle().await?;
    Ok(image)
}

async fn table_with_4096_byte_sectors(fixture: &mut Fixture) -> Outcome {
    let image = large_sectors(fixture).await?;
    for read_only in [false, true] {
        for block_size in [0, 4096] {
            let options = AttachOptions { read_only, block_size, ..persistent() };
            let attached = fixture.attach(&image.open()?, &options).await?;
            assert_eq!(attached.device.number::<u32>("queue/logical_block_size")?, 4096);
            assert_eq!(fixture.properties(&attached.path).await?.block_size, 4096);
            let expected = table::of(&attached.device.node(), 4096).await?;
            assert_eq!(expected.len(), 2);
            assert_eq!(expected[&2].size, 16 * MIB);
            assert_there(fixture, &attached, &expected).await?;
            fixture.detach(&attached).await?;
            assert_none(attached.device);
        }
    }
    Ok(())
}

async fn table_with_4096_byte_sectors_on_512(fixture: &mut Fixture) -> Outcome {
    let image = large_sectors(fixture).await?;
    let options = AttachOptions { block_size: 512, ..persistent() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    assert_eq!(fixture.properties(&attached.path).await?.block_size, 512);
    assert_eq!(attached.device.partitions(), table::by_kernel(&image)?, "what the kernel shows, at most");
    let shown = shown(fixture, &attached).await?;
    assert!(shown.values().all(|entry| entry.kind == "0xee"), "{shown:?}");
    assert_warned(fixture, "the right block size is 4096");
    fixture.detach(&attached).await
}

/// Fails unless the daemon's log has a warning with this text.
fn assert_warned(fixture: &Fixture, text: &str) {
    let log = fixture.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains(text)), "no {text:?} in the log");
}

async fn partitions_are_published_before_the_reply(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let expected = table::of(image.name(), 512).await?;
    let signals = fixture.signals().await?;
    for read_only in [false, true, false, true] {
        let file = image.open()?;
        let options = AttachOptions { read_only, ..persistent() };
        let body = (zbus::Fd::from(file.as_fd()), options.encode());
        let reply = fixture
            .connection
            .call_method(Some(BUS_NAME), ROOT_PATH, Some(MANAGER), "SetupLoop", &body)
            .await?;
        // Without waiting: a program that continues at once must find all of this.
        let body = reply.body();
        let attached = Attached::new(body.deserialize::<(OwnedObjectPath, String)>()?)?;
        let (device, path) = (attached.device, path_of(&attached, 2));
        let links = [1, 2].map(|number| format!("/dev/disk/by-partuuid/{}", expected[&number].uuid));
        let targets = links.map(std::fs::canonicalize);
        let volume = fixture.volume(&path).await?;
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
        assert_there(fixture, &attached, &expected).await?;
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn without_wait_partitions_follow_the_reply(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let expected = table::of(image.name(), 512).await?;
    for read_only in [false, true, false, true] {
        let options = AttachOptions { wait: false, read_only, ..persistent() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        eventually("the partitions are all there", async || {
            let volume = fixture.volume(&path_of(&attached, 2)).await;
            let known = volume.is_ok_and(|volume| volume.filesystem_label == "second");
            Ok(known && shown(fixture, &attached).await? == expected)
        })
        .await?;
        settle().await?;
        assert_there(fixture, &attached, &expected).await?;
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// Waits for a signal with exactly these mount points, and compares the property.
async fn mounted_on(
    fixture: &Fixture,
    signals: &loopd_tests::signals::Signals,
    path: &OwnedObjectPath,
    directories: &[&str],
) -> Outcome {
    let wanted: Vec<_> = directories.iter().map(|directory| to_bus_path(directory.as_bytes())).collect();
    let fits = |value: &zbus::OwnedVariant| {
        value.try_clone().ok().and_then(|value| Vec::<Vec<u8>>::try_from(value).ok()).as_ref()
            == Some(&wanted)
    };
    signals.changed(path, "MountPoints", fits).await?;
    assert_eq!(fixture.volume(path).await?.mount_points, wanted);
    Ok(())
}

async fn mounted_partition_keeps_the_device_busy(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        let (node, path) = (attached.device.partition_node(2), path_of(&attached, 2));
        run("mkfs.ext4", ["-q", "-F", "-L", lifetime.as_str(), &node]).await?;
        eventually("udev has reported the new file system", async || {
            Ok(fixture.volume(&path).await?.filesystem_label == lifetime.as_str())
        })
        .await?;

        let signals = fixture.signals().await?;
        let mounted = Mounted::node(&node, &fixture.directory, "mount point").await?;
        let directory = mounted.directory.to_str().unwrap().to_owned();
        mounted_on(fixture, &signals, &path, &[&directory]).await?;
        assert!(fixture.volume(&attached.path).await?.mount_points.is_empty(), "the disk is not mounted");
        assert!(fixture.volume(&path_of(&attached, 1)).await?.mount_points.is_empty());
        std::fs::write(mounted.directory.join("file"), lifetime.as_str())?;

        let error = fixture.detach_fails(attached.device).await?;
        expect_kind(&error, ErrorKind::Busy)?;
        assert!(error.message.contains(&directory), "{error}");
        assert_there(fixture, &attached, &table::of(image.name(), 512).await?).await?;
        assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
        assert_eq!(std::fs::read(mounted.directory.join("file"))?, lifetime.as_str().as_bytes());

        let signals = fixture.signals().await?;
        mounted.unmount().await?;
        mounted_on(fixture, &signals, &path, &[]).await?;
        // An open partition keeps the device busy, too.
        let opener = File::open(&node)?;
        expect_kind(&fixture.detach_fails(attached.device).await?, ErrorKind::Busy)?;
        drop(opener);
        fixture.detach(&attached).await?;
        assert_none(attached.device);

        let attached = fixture.attach(&image.open_read_only()?, &options).await?;
        assert_eq!(fixture.volume(&path_of(&attached, 2)).await?.filesystem_label, lifetime.as_str());
        let mounted =
            Mounted::node(&attached.device.partition_node(2), &fixture.directory, "mount point").await?;
        assert_eq!(std::fs::read(mounted.directory.join("file"))?, lifetime.as_str().as_bytes());
        mounted.unmount().await?;
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

async fn lazy_detach_with_a_mounted_partition(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        let mounted =
            Mounted::node(&attached.device.partition_node(2), &fixture.directory, "mount point").await?;
        fixture.object(&attached.path).await?.detach(DetachOptions { lazy: true }).await?;
        assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.directory.join("file"), "still there")?;
        run("sync", ["-f".as_ref(), mounted.directory.as_os_str()]).await?;
        mounted.unmount().await?;
        fixture.gone(&attached).await?;
        assert!(fixture.partitions(&attached).await?.is_empty());
        eventually("the nodes are gone", async || Ok(attached.device.partition_nodes().is_empty())).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// The events of both partitions of a device: each has one of the kernel and one of udev.
struct PartitionEvents {
    listener: Listener,
    device: LoopDevice,
    /// How many events belong to earlier rounds.
    earlier: usize,
}

impl PartitionEvents {
    fn of_this_round(&self) -> anyhow::Result<Vec<Uevent>> {
        Ok(self.listener.about_partitions(self.device)?.split_off(self.earlier))
    }

    /// The numbers of events with this action: of the kernel and of udev, for each partition.
    fn count(&self, events: &[Uevent], action: &str) -> [[usize; 2]; 2] {
        [1, 2].map(|number| {
            let name = format!("loop{}p{number}", self.device.0);
            ["KERNEL", "UDEV"].map(|source| {
                let is_same = |event: &&Uevent| {
                    event.device == name && event.source == source && event.action == action
                };
                events.iter().filter(is_same).count()
            })
        })
    }

    /// Waits for all four events with this action. The listener reads those of the kernel and those of udev
    /// from two sockets: either can come first.
    async fn wait_for(&self, action: &str) -> anyhow::Result<Vec<Uevent>> {
        let mut events = Vec::new();
        eventually(&format!("the kernel and udev report {action} of both partitions"), async || {
            events = self.of_this_round()?;
            Ok(self.count(&events, action).as_flattened().iter().all(|count| *count > 0))
        })
        .await?;
        Ok(events)
    }
}

async fn each_partition_is_added_once(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    let device = sysfs::last_free()?;
    let listener = Listener::start(&fixture.directory).await?;
    let mut recorded = PartitionEvents { listener, device, earlier: 0 };
    for round in 0..20 {
        let options = AttachOptions { number: Some(device.0), read_only: round % 2 == 1, ..persistent() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        recorded.wait_for("add").await?;
        settle().await?;
        // If udev has noticed a close of a writable descriptor, the partitions disappear and return by then.
        tokio::time::sleep(Duration::from_millis(50)).await;
        settle().await?;
        let events = recorded.of_this_round()?;
        assert_eq!(recorded.count(&events, "add"), [[1; 2]; 2], "round {round}: {events:#?}");
        assert_eq!(recorded.count(&events, "remove"), [[0; 2]; 2], "round {round}: {events:#?}");
        fixture.detach(&attached).await?;
        settle().await?;
        recorded.earlier += recorded.wait_for("remove").await?.len();
    }
    recorded.listener.stop().await
}

/// Three partitions, of which the first is that of [`TWO`], and the second is not.
const THREE: &str =
    "label: gpt\nstart=2048, size=8192\nstart=12288, size=8192, name=moved\nsize=4096, name=new\n";
const ONE: &str = "label: gpt\nstart=2048, size=8192, name=alone\n";

/// Waits until everything matches util-linux, and stays so.
async fn assert_followed(fixture: &Fixture, attached: &Attached, numbers: &[u32]) -> Outcome {
    let node = attached.device.node();
    let expected = table::of(&node, 512).await?;
    assert_eq!(expected.keys().copied().collect::<Vec<_>>(), numbers);
    let extents =
        |(number, entry): (&u32, &Entry)| (*number, Extent { start: entry.offset, size: entry.size });
    let extents: sysfs::Extents = expected.iter().map(extents).collect();
    let mut found = (BTreeMap::new(), sysfs::Extents::new());
    let follows = eventually("objects and nodes are what the new table says", async || {
        found = (shown(fixture, attached).await?, attached.device.partitions());
        Ok(found.0 == expected && found.1 == extents)
    });
    follows.await.map_err(|error| anyhow::anyhow!("{error}: {found:#?} is not {expected:#?}"))?;
    fixture.events_are_received().await?;
    // Longer than loopd waits before it scans again.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_there(fixture, attached, &expected).await
}

async fn table_changed_by_sfdisk_is_followed(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    for arguments in [&[][..], &["--no-reread"]] {
        let attached = fixture.attach(&image.open()?, &persistent()).await?;
        for (script, numbers) in [(THREE, &[1, 2, 3][..]), (ONE, &[1]), (THREE, &[1, 2, 3])] {
            let signals = fixture.signals().await?;
            let before = fixture.partitions(&attached).await?;
            sfdisk(fixture, &attached.device.node(), arguments, script).await?;
            assert_followed(fixture, &attached, numbers).await?;
            for number in numbers.iter().filter(|number| !before.contains_key(number)) {
                signals.added(&path_of(&attached, *number), PARTITION).await?;
            }
            for number in before.keys().filter(|number| !numbers.contains(number)) {
                signals.removed(&path_of(&attached, *number), PARTITION).await?;
            }
        }
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// Rescans; everything must match when the reply comes.
async fn rescan(fixture: &Fixture, attached: &Attached) -> Outcome {
    fixture.object(&attached.path).await?.rescan_partitions().await?;
    // loopd reads what the file has now. sfdisk reads the cache of the device.
    run("blockdev", ["--flushbufs", &attached.device.node()]).await?;
    let expected = table::of(&attached.device.node(), 512).await?;
    assert_there(fixture, attached, &expected).await
}

async fn table_changed_in_the_file_is_read_by_rescan(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        // While it is open, the cache of the device keeps the table of that time.
        let mut open = File::open(attached.device.node())?;
        for (script, numbers) in [(THREE, &[1, 2, 3][..]), (ONE, &[1]), (THREE, &[1, 2, 3])] {
            open.rewind()?;
            open.read_exact(&mut [0; 64 << 10])?;
            // Into the file: neither the kernel nor udev notices.
            sfdisk(fixture, image.name(), &[], script).await?;
            rescan(fixture, &attached).await?;
            assert_followed(fixture, &attached, numbers).await?;
            // Again, without a change.
            rescan(fixture, &attached).await?;
            rescan(fixture, &attached).await?;
        }
        drop(open);
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

async fn table_changed_by_dd_is_followed(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    for (name, script, numbers) in [("three", THREE, &[1, 2, 3][..]), ("one", ONE, &[1])] {
        let other = Image::sparse(&fixture.directory, name, SIZE)?;
        sfdisk(fixture, other.name(), &[], script).await?;
        let arguments = [
            format!("if={}", other.name()),
            format!("of={}", attached.device.node()),
            "conv=fsync".to_owned(),
        ];
        run("dd", arguments.iter().map(String::as_str).chain(["bs=1M", "status=none"])).await?;
        // udev answers dd's close at the same time.
        fixture.object(&attached.path).await?.rescan_partitions().await?;
        assert_followed(fixture, &attached, numbers).await?;
        rescan(fixture, &attached).await?;
    }
    // A disk without a table has no partitions.
    let node = attached.device.node();
    run("wipefs", ["-q", "-a", &node]).await?;
    fixture.object(&attached.path).await?.rescan_partitions().await?;
    eventually("all are gone", async || {
        Ok(fixture.partitions(&attached).await?.is_empty() && attached.device.partitions().is_empty())
    })
    .await?;
    settle().await?;
    assert_none(attached.device);
    fixture.detach(&attached).await
}

async fn rescan_with_a_mounted_partition_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let before = fixture.partitions(&attached).await?;
    let mounted =
        Mounted::node(&attached.device.partition_node(2), &fixture.directory, "mount point").await?;
    File::open(attached.device.node())?.read_exact(&mut [0; 64 << 10])?;
    sfdisk(fixture, image.name(), &[], ONE).await?;
    let object = fixture.object(&attached.path).await?;
    let error = refusal(object.rescan_partitions().await)?;
    expect_kind(&error, ErrorKind::Busy)?;
    for named in [attached.device.node(), mounted.directory.display().to_string()] {
        assert!(error.message.contains(&named), "{named} is not named: {}", error.message);
    }
    // The kernel then keeps all partitions.
    assert_eq!(attached.device.partitions().keys().collect::<Vec<_>>(), [&1, &2]);
    assert_eq!(
        fixture.partitions(&attached).await?.keys().collect::<Vec<_>>(),
        before.keys().collect::<Vec<_>>()
    );
    mounted.unmount().await?;
    settle().await?;
    rescan(fixture, &attached).await?;
    assert_followed(fixture, &attached, &[1]).await?;
    fixture.detach(&attached).await
}

async fn rescan_without_partition_scan_is_refused(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    let options = AttachOptions { partition_scan: false, ..persistent() };
    // The second time the daemon knows more of the kernel.
    for _ in 0..2 {
        let attached = fixture.attach(&image.open()?, &options).await?;
        let result = fixture.object(&attached.path).await?.rescan_partitions().await;
        let nodes = attached.device.partitions();
        // New partitions would outlive the device.
        run("partx", ["-d", &attached.device.node()]).await.ok();
        assert_eq!(nodes, sysfs::Extents::new(), "nodes that were not asked for ({result:?})");
        expect_kind(&refusal(result)?, ErrorKind::NotSupported)?;
        fixture.detach(&attached).await?;
        let attached = fixture.attach(&image.open()?, &persistent()).await?;
        assert_eq!(fixture.partitions(&attached).await?.len(), 2);
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn without_partition_scan_there_are_none(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    for read_only in [false, true] {
        let options = AttachOptions { partition_scan: false, read_only, ..persistent() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        let assert_no_partitions = async || {
            assert_none(attached.device);
            assert!(fixture.partitions(&attached).await?.is_empty());
            anyhow::Ok(())
        };
        assert_no_partitions().await?;
        // An event does not add them either.
        if !read_only {
            drop(File::options().write(true).open(attached.device.node())?);
        }
        run("udevadm", ["trigger", "--settle", &attached.device.node()]).await?;
        fixture.events_are_received().await?;
        assert_no_partitions().await?;
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn partitions_end_with_the_detach(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    let blank = Image::sparse(&fixture.directory, "blank", SIZE)?;
    let number = Some(sysfs::last_free()?.0);
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        for wait in [true, false] {
            let options = AttachOptions { number, lifetime, wait, ..AttachOptions::default() };
            let signals = fixture.signals().await?;
            let attached = fixture.attach(&image.open()?, &options).await?;
            eventually("both are there", async || Ok(fixture.partitions(&attached).await?.len() == 2))
                .await?;
            fixture.detach(&attached).await?;
            assert_none(attached.device);
            assert!(fixture.partitions(&attached).await?.is_empty());
            for partition in [1, 2] {
                for interface in [PARTITION, VOLUME] {
                    signals.removed(&path_of(&attached, partition), interface).await?;
                }
            }
            signals.removed(&attached.path, ATTACHMENT).await?;
            let attached = fixture.attach(&blank.open()?, &options).await?;
            settle().await?;
            assert_none(attached.device);
            assert!(fixture.partitions(&attached).await?.is_empty());
            fixture.detach(&attached).await?;
        }
    }
    Ok(())
}

async fn partitions_end_with_the_client(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    for _ in 0..10 {
        let mut probe =
            fixture.probe_hold(loopd_tests::ROOT, ["--hold", "setup", "regular", image.name()])?;
        let attached = probe.reply().await?.attached()?;
        assert_eq!(fixture.partitions(&attached).await?.len(), 2);
        probe.kill().await?;
        fixture.gone(&attached).await?;
        assert!(fixture.partitions(&attached).await?.is_empty());
        eventually("the nodes are gone", async || Ok(attached.device.partition_nodes().is_empty())).await?;
    }
    Ok(())
}

async fn foreign_partitions_are_published(fixture: &mut Fixture) -> Outcome {
    let image = two(fixture, "image")?;
    image.add_ext4(SECOND, "second", UUID).await?;
    let losetup = Losetup::new(&["-P"], &image).await?;
    let device = losetup.device;
    let attached = fixture.foreign(device).await?;
    let by_kernel = device.partitions();
    if by_kernel.is_empty() {
        settle().await?;
        assert!(device.partitions().is_empty(), "a foreign device's partitions are not ours to make");
        run("partx", ["--add", &device.node()]).await?;
    }
    assert_followed(fixture, &attached, &[1, 2]).await?;
    eventually("udev has reported it", async || {
        Ok(fixture.volume(&path_of(&attached, 2)).await?.filesystem_label == "second")
    })
    .await?;
    run("partx", ["--delete", "--nr", "1", &device.node()]).await?;
    eventually("the first is gone", async || {
        Ok(fixture.partitions(&attached).await?.keys().eq([&2]) && device.partitions().keys().eq([&2]))
    })
    .await?;
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    std::mem::forget(losetup);
    assert_none(device);
    Ok(())
}

/// Leaves partitions on a free device, as a killed program may.
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

async fn stale_partitions_are_removed(fixture: &mut Fixture) -> Outcome {
    let other = Image::sparse(&fixture.directory, "other", SIZE)?;
    let blank = Image::sparse(&fixture.directory, "blank", SIZE)?;
    let image = two(fixture, "image")?;
    let expected = table::of(image.name(), 512).await?;
    let device = sysfs::last_free()?;
    for partition_scan in [true, false] {
        for (file, expected) in [(&blank, None), (&image, Some(&expected))] {
            leave_stale(&other, device).await?;
            let options = AttachOptions { number: Some(device.0), partition_scan, ..persistent() };
            let attached = fixture.attach(&file.open()?, &options).await?;
            let none = BTreeMap::new();
            let expected = if partition_scan { expected.unwrap_or(&none) } else { &none };
            assert_there(fixture, &attached, expected).await?;
            fixture.detach(&attached).await?;
            assert_none(device);
        }
    }
    assert_warned(fixture, "that an earlier attach has left");
    Ok(())
}

async fn partitions_survive_a_killed_daemon(fixture: &mut Fixture) -> Outcome {
    let mut random = rounds::random("partitions::partitions_survive_a_killed_daemon");
    let image = two(fixture, "image")?;
    for round in 0..20 {
        // A daemon that knows the kernel already, and one that does not.
        if round % 2 == 1 {
            let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
            fixture.detach(&attached).await?;
        }
        let (manager, file) = (fixture.manager.clone(), image.open()?);
        let options =
            AttachOptions { read_only: random.bool(), wait: random.bool(), ..AttachOptions::default() };
        let call = tokio::spawn(async move { manager.setup_loop(file.as_fd(), &options).await.map(drop) });
        tokio::time::sleep(Duration::from_micros(random.u64(0..30_000))).await;
        let mut daemon = fixture.take_daemon().unwrap();
        daemon.kill().await?;
        drop(daemon);
        // Either it was done, or it was not.
        let _either = call.await?;
        let directory = fixture.directory.clone();
        eventually(&format!("nothing is attached after round {round}"), async || {
            Ok(sysfs::bound_by_tests(&directory).is_empty())
        })
        .await?;
        eventually(&format!("no partition is left after round {round}"), async || {
            Ok(sysfs::stale_partitions().is_empty())
        })
        .await?;
        fixture.restart_daemon(&[]).await?;
    }
    Ok(())
}

async fn many_rounds_leave_nothing(fixture: &mut Fixture) -> Outcome {
    let (_, rounds) = rounds::of("partitions::many_rounds_leave_nothing", 100);
    let image = two(fixture, "image")?;
    let expected = table::of(image.name(), 512).await?;
    for round in 0..rounds {
        let lifetime = if round % 2 == 0 { Lifetime::Client } else { Lifetime::Persistent };
        let options = AttachOptions { lifetime, read_only: round / 2 % 2 == 1, ..AttachOptions::default() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        let at_reply = (attached.device.partitions(), attached.device.partition_nodes());
        assert_eq!(at_reply.1, BTreeSet::from([1, 2]), "round {round}");
        assert_eq!(at_reply.0[&2], SECOND, "round {round}");
        assert_eq!(shown(fixture, &attached).await?, expected, "round {round}");
        fixture.detach(&attached).await?;
        let left = (attached.device.partitions(), attached.device.partition_nodes());
        assert_eq!(left, (sysfs::Extents::new(), BTreeSet::new()), "round {round}: left after the detach");
    }
    Ok(())
}
