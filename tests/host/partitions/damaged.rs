//! Damaged tables: the attach succeeds without delay, valid partitions exist, and the log names the others.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{needs, run};
use loopd_tests::sysfs::Extents;
use loopd_tests::table::{self, Gpt, Mbr};
use loopd_tests::{Outcome, rounds};

use super::{assert_none, assert_warned, persistent, shown};

loopd_tests::tests! {
    "partitions::damaged";
    Setup::None => [
        overlapping_partitions_are_left_out,
        partition_past_the_end_is_left_out,
        partition_that_ends_before_its_start_is_left_out,
        maximum_number_of_partitions,
        damaged_primary_header,
        damaged_primary_entries,
        damage_to_both_copies,
        truncated_gpt,
        truncated_dos,
        empty_dos_entries_are_skipped,
        circular_logical_partitions,
        logical_partitions_past_the_end,
        fat_boot_sector_is_not_a_table,
        empty_image_has_no_partitions,
        random_bytes_in_a_table,
    ];
}

/// With partitions, waiting for udev.
const SOON: Duration = Duration::from_secs(5);

/// Attaches the image; `ours` are the expected partitions if loopd reads the table.
async fn assert_found(
    fixture: &Fixture,
    image: &Image,
    ours: &[(u32, u64, u64)],
    warnings: &[&str],
) -> Outcome {
    let expected = if table::kernel_reads()? { table::by_kernel(image)? } else { table::extents(ours) };
    for read_only in [false, true] {
        let options = loopd_dbus::AttachOptions { read_only, ..persistent() };
        let start = Instant::now();
        let attached = fixture.attach(&image.open()?, &options).await?;
        let took = start.elapsed();
        assert!(took < SOON, "it took {took:?}");
        assert_eq!(attached.device.partitions(), expected);
        let objects: Extents = shown(fixture, &attached)
            .await?
            .into_iter()
            .map(|(number, entry)| {
                (number, loopd_tests::sysfs::Extent { start: entry.offset, size: entry.size })
            })
            .collect();
        assert_eq!(objects, expected);
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    for warning in warnings {
        assert_warned(fixture, warning);
    }
    Ok(())
}

fn gpt(fixture: &Fixture, entries: &[(u64, u64)]) -> anyhow::Result<Image> {
    let image = Image::sparse(&fixture.directory, "image", 32 * MIB)?;
    Gpt::new(entries).write(&image)?;
    Ok(image)
}

/// Changes one byte.
fn corrupt(image: &Image, offset: u64) -> Outcome {
    let file = image.open()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(file.write_all_at(&[byte[0] ^ 0x10], offset)?)
}

async fn overlapping_partitions_are_left_out(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (3072, 5119), (8192, 10239)])?;
    assert_found(fixture, &image, &[(1, 2048, 2048), (3, 8192, 2048)], &["partition 2 overlaps partition 1"])
        .await
}

async fn partition_past_the_end_is_left_out(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (60_000, 70_000), (1 << 40, 1 << 41), (8192, 10239)])?;
    let warnings = ["partition 2 is left out: it lies past the end", "partition 3 is left out"];
    assert_found(fixture, &image, &[(1, 2048, 2048), (4, 8192, 2048)], &warnings).await
}

async fn partition_that_ends_before_its_start_is_left_out(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (6144, 6143), (7000, 6500), (8192, 10239)])?;
    if table::kernel_reads()? {
        return loopd_tests::skip("the kernel makes nodes of absurd sizes of these");
    }
    let warnings = ["partition 2 is left out: it ends before", "partition 3 is left out: it ends before"];
    assert_found(fixture, &image, &[(1, 2048, 2048), (4, 8192, 2048)], &warnings).await
}

async fn maximum_number_of_partitions(fixture: &mut Fixture) -> Outcome {
    let entries: Vec<_> = (0..128).map(|index| (2048 + 8 * index, 2048 + 8 * index + 7)).collect();
    let sectors: Vec<_> = (1..).zip(&entries).map(|(number, (first, _))| (number, *first, 8)).collect();
    let image = gpt(fixture, &entries)?;
    assert_found(fixture, &image, &sectors, &[]).await
}

async fn damaged_primary_header(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (8192, 10239)])?;
    corrupt(&image, Gpt::HEADER + 60)?;
    let warnings = ["primary GPT cannot be used: its header's checksum is wrong"];
    assert_found(fixture, &image, &[(1, 2048, 2048), (2, 8192, 2048)], &warnings).await
}

async fn damaged_primary_entries(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (8192, 10239)])?;
    // The first sector of the first partition.
    corrupt(&image, Gpt::ENTRIES + 33)?;
    let warnings = ["primary GPT cannot be used: its entries' checksum is wrong"];
    assert_found(fixture, &image, &[(1, 2048, 2048), (2, 8192, 2048)], &warnings).await
}

async fn damage_to_both_copies(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095)])?;
    corrupt(&image, Gpt::HEADER + 60)?;
    corrupt(&image, 32 * MIB - 512 + 60)?;
    assert_found(fixture, &image, &[], &["the primary GPT cannot be used", "the backup GPT cannot be used"])
        .await
}

/// The kernel rejects a header with more sectors than the device has.
async fn truncated_gpt(fixture: &mut Fixture) -> Outcome {
    let image = gpt(fixture, &[(2048, 4095), (40_000, 50_000)])?;
    image.open()?.set_len(16 * MIB)?;
    assert_found(fixture, &image, &[], &["the primary GPT cannot be used", "the backup GPT cannot be used"])
        .await
}

async fn truncated_dos(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    Mbr::new(&[(0x83, 2048, 2048), (0x83, 30_000, 8192), (0x83, 50_000, 8)]).write(&image, 0)?;
    let warnings = ["partition 2 is cut off", "partition 3 is left out"];
    assert_found(fixture, &image, &[(1, 2048, 2048), (2, 30_000, 2768)], &warnings).await
}

async fn empty_dos_entries_are_skipped(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    Mbr::new(&[(0x83, 2048, 0), (0, 4096, 2048), (0x83, 8192, 8), (5, 9000, 0)]).write(&image, 0)?;
    // An entry of type 0 with a size is a partition to the kernel.
    assert_found(fixture, &image, &[(2, 4096, 2048), (3, 8192, 8)], &[]).await
}

async fn circular_logical_partitions(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 32 * MIB)?;
    Mbr::new(&[(0x83, 2048, 2048), (5, 8192, 40_960)]).write(&image, 0)?;
    Mbr::new(&[(0x83, 64, 1000), (5, 2048, 2048)]).write(&image, 8192)?;
    // From the second link to the first.
    Mbr::new(&[(0x83, 64, 1000), (5, 0, 2048)]).write(&image, 10_240)?;
    let ours = [(1, 2048, 2048), (2, 8192, 2), (5, 8256, 1000), (6, 10_304, 1000)];
    assert_found(fixture, &image, &ours, &["runs in a circle"]).await
}

async fn logical_partitions_past_the_end(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 32 * MIB)?;
    Mbr::new(&[(0x83, 2048, 2048), (5, 8192, 40_960)]).write(&image, 0)?;
    // The first logical partition is valid, the next link is past the end of the image.
    Mbr::new(&[(0x83, 64, 1000), (5, 4_000_000_000, 2048)]).write(&image, 8192)?;
    let ours = [(1, 2048, 2048), (2, 8192, 2), (5, 8256, 1000)];
    assert_found(fixture, &image, &ours, &["the chain of logical partitions is broken"]).await
}

async fn fat_boot_sector_is_not_a_table(fixture: &mut Fixture) -> Outcome {
    needs("mkfs.vfat")?;
    let image = Image::sparse(&fixture.directory, "image", 16 * MIB)?;
    run("mkfs.vfat", ["-n", "NO TABLE", image.name()]).await?;
    assert_found(fixture, &image, &[], &[]).await
}

async fn empty_image_has_no_partitions(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 512)?;
    assert_found(fixture, &image, &[], &[]).await?;
    Mbr::new(&[(0xee, 1, u32::MAX), (5, 1, 1)]).write(&image, 0)?;
    assert_found(fixture, &image, &[], &[]).await
}

/// Valid tables with random bytes in them.
async fn random_bytes_in_a_table(fixture: &mut Fixture) -> Outcome {
    let mut random = rounds::random("partitions::damaged::random_bytes_in_a_table");
    for round in 0..30 {
        let image = Image::sparse(&fixture.directory, format!("image-{round}"), 4 * MIB)?;
        if random.bool() {
            Gpt::new(&[(2048, 3000), (3072, 4095)]).write(&image)?;
        } else {
            Mbr::new(&[(0x83, 64, 1000), (5, 2048, 4096)]).write(&image, 0)?;
            Mbr::new(&[(0x83, 64, 500), (5, 2048, 2048)]).write(&image, 2048)?;
            Mbr::new(&[(0x83, 64, 500)]).write(&image, 4096)?;
        }
        for _ in 0..random.u32(1..40) {
            let sector = *random.choice([0, 0, 1, 2, 2048, 4096].iter()).unwrap();
            image.open()?.write_all_at(&[random.u8(..)], sector * 512 + random.u64(440..510))?;
        }
        let start = Instant::now();
        let attached = fixture.attach(&image.open()?, &persistent()).await?;
        assert!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
        for (number, extent) in attached.device.partitions() {
            let fits = extent.start + extent.size <= 4 * MIB;
            assert!(fits || table::kernel_reads()?, "p{number} is at {extent:?}");
        }
        assert_eq!(fixture.partitions(&attached).await?.len(), attached.device.partitions().len());
        fixture.detach(&attached).await?;
        assert_none(attached.device);
    }
    Ok(())
}
