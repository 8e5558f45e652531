//! Unusual contents that are valid, and contents that change while the file is attached.

use std::os::unix::fs::FileExt as _;

use anyhow::ensure;
use loopd_tests::Outcome;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::process::{needs, needs_file_system};
use loopd_tests::sysfs::Extent;
use loopd_tests::table::Gpt;
use loopd_tests::units::Units;

use crate::row::{file, has_ext4, loopctl, other, rows};

rows! {
    "changed in the file while it is attached":
        "mkfs on the file after it was attached, then mount" => made_behind,
        "another file system made over the first one" => made_over,
        "mkfs in a partition after the attach, then mount" => made_in_a_partition,
        "a table written to the file after the attach, then rescan" => table_made_behind;
    "unusual but valid":
        "one half of a mirror with its metadata at the end" => half_of_a_mirror,
        "the signatures of several file systems" => ambivalent,
        "a copy of an xfs that is mounted" => copied_xfs,
        "an ext4 with a dirty journal, read-only" => dirty_journal,
        "a btrfs with a log, read-only" => btrfs_log;
    "file systems over several devices":
        "a btrfs over two images" => btrfs_over_two,
        "a btrfs over three images" => btrfs_over_three,
        "a btrfs of which one image is not attached" => btrfs_without_one;
}

async fn made_behind(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    loopctl(fixture, &["mount", image.name()]).await?.fails_with("there is no file system in it")?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    has_ext4(loopctl(fixture, &["mount", image.name()]).await?.output.trim_end())?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn made_over(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    other("mkfs.ext2", &["-q", "-F", image.name()]).await?;
    has_ext4(loopctl(fixture, &["mount", image.name()]).await?.output.trim_end())?;
    let listed = loopctl(fixture, &["list", "-o", "device,type"]).await?;
    ensure!(listed.output.contains("ext2"), "{}", listed.output);
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn half_of_a_mirror(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    image.open()?.set_len(17 * MIB)?;
    image.add_mirror_superblock()?;
    loopctl(fixture, &["mount", "-r", image.name()]).await?.fails_with("one half of a mirror")?;
    let mounted = loopctl(fixture, &["mount", "-r", "-t", "ext4", image.name()]).await?;
    has_ext4(mounted.output.trim_end())?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()
}

async fn ambivalent(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", image.name()]).await?;
    image.open()?.write_all_at(b"EXFAT   ", 3)?;
    loopctl(fixture, &["mount", image.name()]).await?.fails_with("several file systems (exfat, ext4)")?;
    has_ext4(loopctl(fixture, &["mount", "-t", "ext4", image.name()]).await?.output.trim_end())?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()
}

async fn copied_xfs(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.xfs")?;
    needs_file_system("xfs")?;
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 320 * MIB, &[])?;
    other("mkfs.xfs", &["-q", image.name()]).await?;
    let copy = format!("{}-copy", image.name());
    other("cp", &["--sparse=always", image.name(), &copy]).await?;
    loopctl(fixture, &["mount", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["mount", &copy]).await?.fails_with("nouuid")?;
    loopctl(fixture, &["mount", "--options", "nouuid", &copy]).await?.is_silent()?;
    loopctl(fixture, &["unmount", &copy]).await?.is_silent()?;
    let view = loopctl(fixture, &["mount", "--throwaway", "--yes", image.name()]).await?;
    ensure!(view.status == Some(0), "{}", view.messages);
    loopctl(fixture, &["unmount", view.output.trim_end()]).await?.is_silent()?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()
}

async fn dirty_journal(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 16 * MIB, &[])?;
    other("mkfs.ext4", &["-q", "-F", "-O", "^metadata_csum", image.name()]).await?;
    // The feature needs_recovery, as after a power cut.
    let mut features = [0; 1];
    image.open()?.read_exact_at(&mut features, 1024 + 0x60)?;
    image.open()?.write_all_at(&[features[0] | 4], 1024 + 0x60)?;
    let mounted = loopctl(fixture, &["mount", "-r", image.name()]).await?;
    mounted.fails_with("norecovery")?;
    loopctl(fixture, &["mount", "-r", "--options", "norecovery", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()
}

async fn made_in_a_partition(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 24 * MIB, &[])?;
    Gpt::new(&[(2048, 40_959)]).write(&image)?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    image.add_ext4(Extent { start: MIB, size: 18 * MIB }, "new", UUID).await?;
    has_ext4(loopctl(fixture, &["mount", "-p", "1", image.name()]).await?.output.trim_end())?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

const UUID: &str = "11111111-2222-3333-4444-0000000000f2";

async fn table_made_behind(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 24 * MIB, &[])?;
    let device = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    Gpt::new(&[(2048, 4095), (4096, 8191)]).write(&image)?;
    loopctl(fixture, &["rescan", &device.node()]).await?.is_silent()?;
    ensure!(device.partition_nodes() == [1, 2].into(), "{:?}", device.partition_nodes());
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

async fn btrfs_over_two(fixture: &mut Fixture) -> Outcome {
    btrfs_over(fixture, &["first", "second"]).await
}

async fn btrfs_over_three(fixture: &mut Fixture) -> Outcome {
    btrfs_over(fixture, &["first", "second", "third"]).await
}

async fn btrfs(fixture: &Fixture, names: &[&str]) -> anyhow::Result<Vec<Image>> {
    needs("mkfs.btrfs")?;
    needs_file_system("btrfs")?;
    let images: Vec<Image> =
        names.iter().map(|name| file(fixture, name, 128 * MIB, &[])).collect::<anyhow::Result<_>>()?;
    let paths: Vec<&str> = images.iter().map(Image::name).collect();
    other("mkfs.btrfs", &[&["-q", "-d", "raid1", "-m", "raid1"], &paths[..]].concat()).await?;
    Ok(images)
}

async fn btrfs_over(fixture: &Fixture, names: &[&str]) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let images = btrfs(fixture, names).await?;
    for image in &images {
        loopctl(fixture, &["attach", image.name()]).await?.device()?;
    }
    let point = loopctl(fixture, &["mount", images[0].name()]).await?.output;
    let listed = loopctl(fixture, &["list", "-o", "device,mountpoints"]).await?;
    ensure!(listed.output.matches(point.trim_end()).count() == names.len(), "{}", listed.output);
    for image in &images {
        loopctl(fixture, &["detach", image.name()]).await?.fails_with(point.trim_end())?;
    }
    loopctl(fixture, &["unmount", images[1].name()]).await?.is_silent()?;
    for image in &images {
        loopctl(fixture, &["detach", image.name()]).await?.is_silent()?;
    }
    Ok(())
}

async fn btrfs_without_one(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let images = btrfs(fixture, &["first", "second"]).await?;
    let device = loopctl(fixture, &["attach", images[0].name()]).await?.device()?;
    loopctl(fixture, &["mount", &device.node()])
        .await?
        .fails_with("a btrfs over 2 devices, and 1 of them can be found")?;
    loopctl(fixture, &["detach", &device.node()]).await?.is_silent()
}

/// The copy of a mounted btrfs after an fsync, as after a power cut.
async fn btrfs_log(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.btrfs")?;
    needs_file_system("btrfs")?;
    let _units = Units::start(fixture.bus()).await?;
    let image = file(fixture, "image", 128 * MIB, &[])?;
    other("mkfs.btrfs", &["-q", image.name()]).await?;
    let point = loopctl(fixture, &["mount", image.name()]).await?.output;
    let written = std::fs::File::create(std::path::Path::new(point.trim_end()).join("file"))?;
    written.write_all_at(b"the last change", 0)?;
    written.sync_all()?;
    drop(written);
    let copy = format!("{}-copy", image.name());
    other("cp", &["--sparse=always", image.name(), &copy]).await?;
    loopctl(fixture, &["unmount", image.name()]).await?.is_silent()?;
    loopctl(fixture, &["mount", "-r", &copy]).await?.fails_with("norecovery")?;
    loopctl(fixture, &["mount", "-r", "--options", "norecovery", &copy]).await?.is_silent()?;
    loopctl(fixture, &["unmount", &copy]).await?.is_silent()
}
