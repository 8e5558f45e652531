//! Reads and writes of a device.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use loopd_tests::image::{Image, Mounted};
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

/// Of a request of a sequential run.
const CHUNK: usize = 1 << 20;
/// Of a request at a random place.
const PAGE: usize = 4096;
/// Requests at random places.
const REQUESTS: usize = 300;
/// Of a file in a built image.
const FILE: usize = 256 << 10;

/// Writes a file of this size that no file system compresses.
pub fn make_iso(image: &Image, bytes: usize) -> Result<()> {
    let mut file = File::create_new(&image.path)?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut chunk = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK {
        random.fill(&mut chunk);
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

/// Removes the file from the page cache, if it is not in a tmpfs.
pub fn drop_from_cache(image: &Image) -> Result<()> {
    let file = image.open_read_only()?;
    file.sync_all()?;
    Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// Bytes in the page cache: of files, and of devices.
fn cached() -> Result<f64> {
    let all = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<f64> {
        let line = all.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
    };
    Ok(field("Cached:")? + field("Buffers:")?)
}

/// Reads the whole device; returns the duration, and the growth of the page cache in bytes.
pub fn read_all(device: LoopDevice) -> Result<(Duration, f64)> {
    let mut chunk = vec![0; CHUNK];
    let before = cached()?;
    let start = Instant::now();
    let mut file = File::open(device.node())?;
    while file.read(&mut chunk)? > 0 {}
    let time = start.elapsed();
    // With its last close a device loses its page cache; loopd's hold would keep it open.
    let growth = cached()? - before;
    drop(file);
    Ok((time, growth))
}

/// Writes the first bytes of the device, until they are on disk.
pub fn write_all(device: LoopDevice, bytes: usize) -> Result<Duration> {
    let mut chunk = vec![0; CHUNK];
    fastrand::Rng::with_seed(2).fill(&mut chunk);
    let start = Instant::now();
    let mut file = File::options().write(true).open(device.node())?;
    for _ in 0..bytes / CHUNK {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(start.elapsed())
}

/// The duration of each of some reads of 4 KiB within the first bytes, past the page cache of the device.
pub fn read_at_random(device: LoopDevice, bytes: usize) -> Result<Vec<Duration>> {
    let file = File::options().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(device.node())?;
    at_random(bytes, |page, place| Ok(file.read_exact_at(page, place)?))
}

/// The duration of each of some writes of 4 KiB within the first bytes, past the page cache of the device.
pub fn write_at_random(device: LoopDevice, bytes: usize) -> Result<Vec<Duration>> {
    let file = File::options().write(true).custom_flags(OFlag::O_DIRECT.bits()).open(device.node())?;
    at_random(bytes, |page, place| Ok(file.write_all_at(page, place)?))
}

fn at_random(bytes: usize, mut request: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<Vec<Duration>> {
    let mut random = fastrand::Rng::with_seed(3);
    let mut buffer = vec![0; 2 * PAGE];
    // Direct I/O needs an aligned address.
    let offset = buffer.as_ptr().align_offset(PAGE);
    let page = &mut buffer[offset..offset + PAGE];
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let place = (random.usize(..bytes / PAGE) * PAGE) as u64;
        let start = Instant::now();
        request(page, place)?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// Makes an ext4, fills it with files of this size together, and unmounts it; until the image is on disk.
pub async fn build(device: LoopDevice, image: &Image, parent: &Path, bytes: usize) -> Result<Duration> {
    let mut content = vec![0; FILE];
    fastrand::Rng::with_seed(4).fill(&mut content);
    let start = Instant::now();
    run("mkfs.ext4", ["-q", &device.node()]).await?;
    let mount = Mounted::new(device, parent, "built").await?;
    for number in 0..bytes / FILE {
        std::fs::write(mount.directory.join(number.to_string()), &content)?;
    }
    mount.unmount().await?;
    image.open_read_only()?.sync_all()?;
    Ok(start.elapsed())
}
