//! Backing files: their ends, their formats, their names.

use anyhow::ensure;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::process::needs;
use loopd_tests::{Outcome, skip};

use crate::row::{attached, file, loopctl, other, rows, warns};

rows! {
    "any byte offset":
        "a squashfs after 188,392 bytes, as in an AppImage" => squashfs_after_a_program,
        "an odd offset" => odd_offset,
        "an unaligned offset with direct I/O" => unaligned_direct_io,
        "an offset past the end" => offset_past_the_end,
        "an odd offset and an odd size limit" => odd_offset_and_limit;
    "the end of the file":
        "a file of 1,000,001 bytes" => tail,
        "an unpadded squashfs" => unpadded_squashfs,
        "a file of 511 bytes" => less_than_a_sector,
        "a file of 4097 bytes with blocks of 4096" => large_blocks,
        "a size limit of 1000 bytes" => odd_limit;
    "not a raw image":
        "a .gz" => gzip, "a .xz" => xz, "a .zst" => zstd, "a .bz2" => bzip2,
        "a qcow2" => qcow2, "a VMDK" => vmdk, "a VHDX" => vhdx, "a dynamic VHD" => vhd, "a VDI" => vdi,
        "an Android sparse image" => android_sparse,
        "CD sectors of 2352 bytes" => cd_sectors,
        "a DMG with its trailer" => dmg,
        "an unknown program as an image" => program_is_raw;
    "files that were deleted, replaced or renamed":
        "the image is deleted while it is attached" => deleted,
        "the image is rebuilt under the same name" => replaced,
        "a file that is really called `x (deleted)`" => really_called_deleted,
        "the image is renamed" => renamed,
        "a directory has the name of the deleted image" => replaced_by_a_directory,
        "the image is attached twice and deleted" => deleted_twice_attached;
}

async fn squashfs_after_a_program(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "app", 188_392 + MIB, &[(0, b"\x7fELF"), (188_392, b"hsqs")])?;
    attached(fixture, &["-r", "-o", "188392", image.name()], async |device, printed| {
        printed.is_silent()?;
        ensure!(device.number::<u64>("loop/offset")? == 188_392, "another offset");
        let start = other("head", &["-c", "4", &device.node()]).await?;
        ensure!(start == "hsqs", "it starts with {start:?}");
        Ok(())
    })
    .await
}

async fn odd_offset(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB + 1, &[(1, b"here")])?;
    attached(fixture, &["-o", "1", image.name()], async |device, printed| {
        printed.is_silent()?;
        ensure!(other("head", &["-c", "4", &device.node()]).await? == "here", "other bytes");
        Ok(())
    })
    .await
}

async fn unaligned_direct_io(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    loopctl(fixture, &["attach", "--direct-io", "-o", "100", image.name()]).await?.fails_with("direct I/O")
}

async fn offset_past_the_end(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    loopctl(fixture, &["attach", "-o", "2M", image.name()]).await?.fails_with("offset")
}

async fn tail(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 1_000_001, &[])?;
    warns(fixture, &[image.name()], "the last 65 bytes cannot be reached").await
}

async fn unpadded_squashfs(fixture: &mut Fixture) -> Outcome {
    let size = 188_393_u64.to_le_bytes();
    let contents: &[(u64, &[u8])] = &[(0, b"hsqs"), (28, b"\x04\0"), (40, &size)];
    let image = file(fixture, "image", 188_393, contents)?;
    warns(fixture, &["-r", image.name()], "the last 489 bytes cannot be reached").await
}

async fn less_than_a_sector(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 511, &[])?;
    loopctl(fixture, &["attach", image.name()]).await?.fails_with("511")
}

async fn compressed(fixture: &Fixture, tool: &str, suffix: &str) -> Outcome {
    if needs(tool).is_err() {
        return skip(format!("{tool} is not installed"));
    }
    let mut random = fastrand::Rng::with_seed(1);
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(64 << 10).collect();
    let image = file(fixture, "image", MIB, &[(0, &bytes)])?;
    other(tool, &["-q", "-k", image.name()]).await?;
    let name = format!("{}.{suffix}", image.name());
    attached(fixture, &[&name], async |_, printed| {
        printed.warns_of("-compressed file")?;
        printed.warns_of("decompress it first")
    })
    .await
}

async fn gzip(fixture: &mut Fixture) -> Outcome {
    compressed(fixture, "gzip", "gz").await
}

async fn xz(fixture: &mut Fixture) -> Outcome {
    compressed(fixture, "xz", "xz").await
}

async fn zstd(fixture: &mut Fixture) -> Outcome {
    compressed(fixture, "zstd", "zst").await
}

async fn bzip2(fixture: &mut Fixture) -> Outcome {
    compressed(fixture, "bzip2", "bz2").await
}

async fn signature(fixture: &Fixture, offset: u64, bytes: &[u8], name: &str) -> Outcome {
    let image = file(fixture, "image", MIB, &[(offset, bytes)])?;
    warns(fixture, &[image.name()], name).await
}

async fn qcow2(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"QFI\xfb\0\0\0\x03", "a qcow2 image").await
}

async fn vmdk(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"KDMV\x01\0\0\0", "a VMDK image").await
}

async fn vhdx(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"vhdxfile", "a VHDX image").await
}

async fn vhd(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"conectix", "a dynamic VHD image").await
}

async fn vdi(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 64, b"\x7f\x10\xda\xbe", "a VDI image").await
}

async fn android_sparse(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"\x3a\xff\x26\xed\x01\0\0\0", "an Android sparse image").await
}

async fn cd_sectors(fixture: &mut Fixture) -> Outcome {
    signature(fixture, 0, b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\x02\0\x01", "CD sectors").await
}

async fn dmg(fixture: &mut Fixture) -> Outcome {
    signature(fixture, MIB - 512, b"koly\0\0\0\x04\0\0\x02\0", "an Apple DMG image").await
}

async fn program_is_raw(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[(0, b"\x7fELF")])?;
    attached(fixture, &[image.name()], async |_, printed| printed.is_silent()).await
}

async fn deleted(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "x", MIB, &[])?;
    loopctl(fixture, &["attach", image.name()]).await?.device()?;
    std::fs::remove_file(&image.path)?;
    let listed = loopctl(fixture, &["list", "-o", "device,filestate,file"]).await?;
    ensure!(listed.output.contains("deleted") && !listed.output.contains("(deleted)"), "{}", listed.output);
    loopctl(fixture, &["detach", image.name()]).await?.is_silent()
}

async fn replaced(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "x", MIB, &[])?;
    loopctl(fixture, &["attach", image.name()]).await?.device()?;
    std::fs::remove_file(&image.path)?;
    Image::sparse(&fixture.directory, "x", 2 * MIB)?;
    let listed = loopctl(fixture, &["list", "-o", "device,filestate,file"]).await?;
    ensure!(listed.output.contains("replaced"), "{}", listed.output);
    loopctl(fixture, &["detach", image.name()]).await?.is_silent()
}

async fn really_called_deleted(fixture: &mut Fixture) -> Outcome {
    let other = file(fixture, "x (deleted)", MIB, &[])?;
    let device = loopctl(fixture, &["attach", other.name()]).await?.device()?;
    let name = fixture.directory.join("x");
    let name = name.to_str().unwrap();
    loopctl(fixture, &["detach", name]).await?.fails_with("does not exist")?;
    ensure!(device.bound(), "the other file was detached");
    loopctl(fixture, &["detach", other.name()]).await?.is_silent()
}

async fn renamed(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "x", MIB, &[])?;
    loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let moved = fixture.directory.join("y");
    std::fs::rename(&image.path, &moved)?;
    let listed = loopctl(fixture, &["list"]).await?;
    ensure!(listed.output.contains("/y"), "{}", listed.output);
    loopctl(fixture, &["detach", moved.to_str().unwrap()]).await?.is_silent()
}

async fn odd_offset_and_limit(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[(7, b"here")])?;
    attached(fixture, &["-o", "7", "--size-limit", "5121", image.name()], async |device, printed| {
        printed.warns_of("the last byte cannot be reached")?;
        ensure!(other("head", &["-c", "4", &device.node()]).await? == "here", "other bytes");
        Ok(())
    })
    .await
}

async fn large_blocks(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", 4097, &[])?;
    warns(fixture, &["-b", "4096", image.name()], "the last byte cannot be reached").await
}

async fn odd_limit(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "image", MIB, &[])?;
    warns(fixture, &["--size-limit", "1000", image.name()], "the last 488 bytes cannot be reached").await
}

async fn replaced_by_a_directory(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "x", MIB, &[])?;
    loopctl(fixture, &["attach", image.name()]).await?.device()?;
    std::fs::remove_file(&image.path)?;
    std::fs::create_dir(&image.path)?;
    let listed = loopctl(fixture, &["list", "-o", "device,filestate,file"]).await?;
    ensure!(listed.output.contains("replaced"), "{}", listed.output);
    loopctl(fixture, &["detach", image.name()]).await?.is_silent()
}

async fn deleted_twice_attached(fixture: &mut Fixture) -> Outcome {
    let image = file(fixture, "x", MIB, &[])?;
    let first = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    let second = loopctl(fixture, &["attach", image.name()]).await?.device()?;
    std::fs::remove_file(&image.path)?;
    let printed = loopctl(fixture, &["detach", image.name()]).await?;
    printed.fails_with(&first.node())?;
    printed.fails_with(&second.node())?;
    loopctl(fixture, &["detach", &first.node(), &second.node()]).await?.is_silent()
}
