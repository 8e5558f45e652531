//! A volume whose boot sector also reads as a partition table is one volume.

use loopd_dbus::AttachOptions;
use loopd_tests::Outcome;
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup::Losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, needs, run};
use loopd_tests::udev::settle;

use super::{assert_none, persistent, sfdisk};

loopd_tests::tests! {
    "partitions::superfloppy";
    Setup::None => [
        a_volume_under_a_table_is_one_volume,
        a_node_of_the_same_volume_is_not_shown,
        a_formatted_image_that_is_partitioned_has_partitions,
    ];
}

/// A FAT volume with an entry that starts at sector 0 and covers the disk.
async fn superfloppy(fixture: &Fixture) -> anyhow::Result<Image> {
    needs("mkfs.vfat")?;
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    run("mkfs.vfat", ["--mbr=y", "-n", "ONE", image.name()]).await?;
    Ok(image)
}

async fn assert_one_volume(fixture: &Fixture, attached: &Attached) -> Outcome {
    assert!(fixture.partitions(attached).await?.is_empty());
    let volume = fixture.volume(&attached.path).await?;
    assert_eq!((volume.filesystem_type.as_str(), volume.filesystem_label.as_str()), ("vfat", "ONE"));
    assert_eq!(fixture.properties(&attached.path).await?.warnings, loopd_dbus::Warnings::default());
    Ok(())
}

async fn a_volume_under_a_table_is_one_volume(fixture: &mut Fixture) -> Outcome {
    let image = superfloppy(fixture).await?;
    for read_only in [false, true] {
        let options = AttachOptions { read_only, ..persistent() };
        let attached = fixture.attach(&image.open()?, &options).await?;
        assert_one_volume(fixture, &attached).await?;
        fixture.object(&attached.path).await?.rescan_partitions().await?;
        assert_one_volume(fixture, &attached).await?;
        eventually("no node is left", async || Ok(attached.device.partition_nodes().is_empty())).await?;
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}

/// As a kernel with parsers makes it, on a device where loopd deletes none.
async fn a_node_of_the_same_volume_is_not_shown(fixture: &mut Fixture) -> Outcome {
    let image = superfloppy(fixture).await?;
    let losetup = Losetup::new(&["-P"], &image).await?;
    let device = losetup.device;
    if device.partitions().is_empty() {
        // udev answers the close by losetup with BLKRRPART, which deletes the partition of a kernel without parsers.
        settle().await?;
        run("addpart", [&device.node(), "1", "0", "32768"]).await?;
    }
    let attached = fixture.foreign(device).await?;
    fixture.events_are_received().await?;
    assert_one_volume(fixture, &attached).await?;
    assert_eq!(device.partitions().len(), 1);
    Ok(())
}

async fn a_formatted_image_that_is_partitioned_has_partitions(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.vfat")?;
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    run("mkfs.vfat", [image.name()]).await?;
    sfdisk(fixture, image.name(), &[], "start=1M, size=4M\nstart=6M, size=4M\n").await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    assert_eq!(fixture.partitions(&attached).await?.keys().copied().collect::<Vec<_>>(), [1, 2]);
    fixture.detach(&attached).await
}
