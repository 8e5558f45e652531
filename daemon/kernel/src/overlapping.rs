//! Other block devices that show the bytes of a volume: two file systems on the same bytes destroy each
//! other.
//!
//! A file system, dm, md and swap each claim the disk that they are on, or a partition of it, and the kernel
//! knows that whatever mount namespace it is in. `O_EXCL` on the disk is such a claim: it fails while the
//! disk or a partition is claimed (`bd_may_claim`, block/bdev.c), and while it is open nobody else can claim
//! one. A loop device does not claim what it is attached to, so those are followed down to the file.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::{mounts, sysfs};
use loopd_common::text::printable;
use loopd_engine::kernel::{Device, FileIdentity, node};
use loopd_engine::mount_table::MountTable;

/// The loop driver's.
const LOOP_MAJOR: u32 = 7;
/// No more devices are stacked on each other than this.
const DEEPEST: usize = 16;
/// How long a passing user, such as mkfs, may keep a claim.
const PASSING: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(20);

type Number = (u32, u32);

/// Exclusive claims on disks: nobody else can mount or map them while this lives.
#[derive(Debug, Default)]
pub struct Claims(Vec<File>);

impl Drop for Claims {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.0);
        // Closing one may be its last close, which writes to a backing file.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !files.is_empty() => drop(runtime.spawn_blocking(move || drop(files))),
            _ => drop(files),
        }
    }
}

/// Claims every disk that shows some of these bytes of the device, other than the device itself. `others`
/// are all other loop devices; `None` stands for one whose backing file does not answer.
///
/// # Errors
/// `Busy` if one is claimed, unless neither can be written to; `Timeout` if it is not known whether that one
/// shows the same bytes.
pub fn claim(
    device: &Device,
    bytes: &Range<u64>,
    others: &[(u32, Option<Device>)],
    asked: &str,
) -> Result<Claims, Error> {
    let mut stack = Stack { loops: HashMap::new(), below: Vec::new() };
    stack.loops.insert(device.number, device);
    stack.loops.extend(others.iter().filter_map(|(number, other)| Some((*number, other.as_ref()?))));
    let own = stack.extents((LOOP_MAJOR, device.number), bytes.clone(), 0);
    let below = std::mem::take(&mut stack.below);
    let mut disks: Vec<(Number, bool)> = below.iter().map(|disk| (*disk, true)).collect();
    for (number, other) in others {
        let disk = (LOOP_MAJOR, *number);
        let shows_the_same = match other {
            Some(_) => stack
                .extents(disk, 0..size(disk), 0)
                .iter()
                .any(|one| own.iter().any(|other| one.meets(other))),
            None => true,
        };
        if shows_the_same {
            disks.push((disk, other.is_some()));
        }
    }
    disks.retain(|(disk, _)| !(device.read_only && is_read_only(*disk)));
    disks.sort_unstable();
    disks.dedup_by_key(|(disk, _)| *disk);
    let own_disk = (LOOP_MAJOR, device.number);
    let mut claims = Claims::default();
    for (disk, is_known) in disks.into_iter().filter(|(disk, _)| *disk != own_disk) {
        match claim_disk(disk, &below) {
            Ok(claimed) => claims.0.extend(claimed),
            Err(_) if !is_known => return Err(unanswered(asked, disk)),
            Err(users) => return Err(stack.busy(asked, disk, &users)),
        }
    }
    Ok(claims)
}

/// What is at the bottom of a stack of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    File(FileIdentity),
    Disk(Number),
}

/// Bytes of a base.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent {
    base: Base,
    bytes: Range<u64>,
}

impl Extent {
    fn meets(&self, other: &Self) -> bool {
        self.base == other.base && self.bytes.start < other.bytes.end && other.bytes.start < self.bytes.end
    }
}

struct Stack<'a> {
    loops: HashMap<u32, &'a Device>,
    /// The disks that were passed on the way down.
    below: Vec<Number>,
}

impl Stack<'_> {
    /// Where the bytes of a disk come from. Bytes of a dm or md device may come from anywhere on what is below.
    fn extents(&mut self, disk: Number, bytes: Range<u64>, depth: usize) -> Vec<Extent> {
        if depth > DEEPEST {
            return Vec::new();
        }
        let shown = self.loops.get(&disk.1).filter(|_| disk.0 == LOOP_MAJOR);
        if let Some(device) = shown {
            // Another program may have changed it since, which no event tells.
            let offset = sysfs::offset(device.number).unwrap_or(device.offset);
            let bytes = moved(&bytes, offset);
            return match device.backing_block_device {
                Some(below) => self.descend(below, bytes, depth),
                None => vec![Extent { base: Base::File(device.file()), bytes }],
            };
        }
        let below = entries(disk, "slaves");
        if below.is_empty() {
            return vec![Extent { base: Base::Disk(disk), bytes }];
        }
        let below: Vec<Number> = below.iter().filter_map(|name| sysfs::device_number(name)).collect();
        below.into_iter().flat_map(|one| self.descend(one, 0..size(one), depth)).collect()
    }

    /// The same for a block device that may be a partition.
    fn descend(&mut self, block: Number, bytes: Range<u64>, depth: usize) -> Vec<Extent> {
        let (disk, start) = disk_of(block);
        self.below.push(disk);
        self.extents(disk, moved(&bytes, start), depth + 1)
    }

    fn busy(&self, asked: &str, disk: Number, users: &[String]) -> Error {
        let device = self.loops.get(&disk.1).filter(|_| disk.0 == LOOP_MAJOR);
        let shown = device.map_or_else(
            || node_of(disk).display().to_string(),
            |device| format!("{} ({})", device.node(), printable(&device.backing_file)),
        );
        let (users, remedy) = if users.is_empty() {
            let hidden = "claimed by a file system that is unmounted lazily or mounted in another mount namespace, by \
                          swap, or by another program"
                .to_owned();
            (hidden, "end that first")
        } else {
            (users.join(", "), "use that one, or end it first")
        };
        Error::new(
            ErrorKind::Busy,
            format!(
                "{asked}: {shown} shows the same bytes and is {users}; two file systems on the same bytes would \
                 destroy each other; {remedy}"
            ),
        )
    }
}

fn moved(bytes: &Range<u64>, by: u64) -> Range<u64> {
    bytes.start.saturating_add(by)..bytes.end.saturating_add(by)
}

fn unanswered(asked: &str, disk: Number) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!(
            "{asked}: {} is in use, and its backing file does not answer, so that it may be the same file; try again \
             when it does",
            node(disk.1)
        ),
    )
}

/// Claims the disk; gives none if it is gone, or claimed only by what is below the volume itself. Fails with
/// who uses it, as far as that can be seen.
fn claim_disk(disk: Number, below: &[Number]) -> Result<Option<File>, Vec<String>> {
    let deadline = Instant::now() + PASSING;
    loop {
        match open_exclusively(disk) {
            Ok(file) => return Ok(Some(file)),
            Err(Errno::EBUSY) => {}
            // The sandbox lets us open no other disks than loop devices.
            Err(Errno::EPERM | Errno::EACCES) => {
                let users = users(disk);
                return if users.is_empty() { Ok(None) } else { Err(users) };
            }
            Err(_gone) => return Ok(None),
        }
        if is_claimed_by(disk, below) {
            return Ok(None);
        }
        let users = users(disk);
        if !users.is_empty() || Instant::now() >= deadline {
            return Err(users);
        }
        std::thread::sleep(RETRY);
    }
}

fn open_exclusively(disk: Number) -> Result<File, Errno> {
    let flags = OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(node_of(disk))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
    let opened = file.metadata().map(|metadata| metadata.rdev()).unwrap_or_default();
    if opened == nix::sys::stat::makedev(disk.0.into(), disk.1.into()) {
        Ok(file)
    } else {
        Err(Errno::ENODEV)
    }
}

/// Whether what holds the disk is part of the stack that the volume is on.
fn is_claimed_by(disk: Number, below: &[Number]) -> bool {
    let holders: Vec<String> = names(disk).iter().flat_map(|name| sysfs::holders(name)).collect();
    let is_below = |holder: &String| {
        let name = holder.trim_start_matches("/dev/");
        sysfs::device_number(name).is_some_and(|number| below.contains(&number))
    };
    !holders.is_empty() && holders.iter().all(is_below) && mounted(disk).is_empty()
}

fn mounted(disk: Number) -> Vec<String> {
    let mounts = mounts::read().unwrap_or_default();
    names(disk).iter().flat_map(|name| mounts_of(&mounts, name)).collect()
}

fn mounts_of(mounts: &MountTable, name: &str) -> Vec<String> {
    let number = sysfs::device_number(name).unwrap_or_default();
    let points = mounts.of(number).iter();
    points.map(|path| format!("mounted on {}", printable(path.as_os_str().as_encoded_bytes()))).collect()
}

/// Who uses a disk or its partitions, with what is stacked on them.
fn users(disk: Number) -> Vec<String> {
    let mounts = mounts::read().unwrap_or_default();
    let mut users: Vec<String> = names(disk).iter().flat_map(|name| mounts_of(&mounts, name)).collect();
    for holder in names(disk).iter().flat_map(|name| holders_above(name, 0)) {
        let points = mounts_of(&mounts, holder.trim_start_matches("/dev/"));
        let points = if points.is_empty() { String::new() } else { format!(", {}", points.join(", ")) };
        users.push(format!("held by {holder}{points}"));
    }
    users.dedup();
    users
}

fn holders_above(name: &str, depth: usize) -> Vec<String> {
    if depth > DEEPEST {
        return Vec::new();
    }
    let mut all = sysfs::holders(name);
    let above: Vec<String> =
        all.iter().flat_map(|holder| holders_above(holder.trim_start_matches("/dev/"), depth + 1)).collect();
    all.extend(above);
    all
}

fn directory(block: Number) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", block.0, block.1))
}

fn entries(disk: Number, kind: &str) -> Vec<String> {
    let found = fs::read_dir(directory(disk).join(kind)).into_iter().flatten().flatten();
    found.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn sectors(block: Number, attribute: &str) -> Option<u64> {
    let text = fs::read_to_string(directory(block).join(attribute)).ok()?;
    text.trim_ascii_end().parse::<u64>().ok()?.checked_mul(512)
}

fn size(block: Number) -> u64 {
    sectors(block, "size").unwrap_or(u64::MAX)
}

fn is_read_only(disk: Number) -> bool {
    fs::read(directory(disk).join("ro")).is_ok_and(|text| text.starts_with(b"1"))
}

/// The disk of a block device, and where on it that begins.
fn disk_of(block: Number) -> (Number, u64) {
    let Some(start) = sectors(block, "start") else { return (block, 0) };
    let parent = fs::canonicalize(directory(block)).ok().and_then(|path| {
        let text = fs::read_to_string(path.parent()?.join("dev")).ok()?;
        loopd_common::mountinfo::device_number(text.trim_ascii_end())
    });
    parent.map_or((block, 0), |disk| (disk, start))
}

fn name_of(disk: Number) -> Option<String> {
    fs::canonicalize(directory(disk)).ok()?.file_name()?.to_str().map(str::to_owned)
}

fn node_of(disk: Number) -> PathBuf {
    PathBuf::from(format!("/dev/{}", name_of(disk).unwrap_or_default().replace('!', "/")))
}

/// The disk's and its partitions' names in sysfs.
fn names(disk: Number) -> Vec<String> {
    let Some(name) = name_of(disk) else { return Vec::new() };
    let is_partition = |entry: &String| directory(disk).join(entry).join("partition").exists();
    let mut names: Vec<String> = entries(disk, "").into_iter().filter(is_partition).collect();
    names.push(name);
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(number: u32, inode: u64, offset: u64) -> Device {
        Device { number, backing_inode: inode, offset, ..Device::default() }
    }

    fn on(number: u32, below: u32, offset: u64) -> Device {
        Device { number, backing_block_device: Some((LOOP_MAJOR, below)), offset, ..Device::default() }
    }

    /// No such devices exist, so that sysfs says nothing of them.
    #[test]
    fn a_loop_on_a_loop_shows_the_bytes_of_the_file() {
        let devices = [file(9_001, 1, 1000), on(9_002, 9_001, 200), on(9_003, 9_002, 30), file(9_004, 2, 0)];
        let mut stack =
            Stack { loops: devices.iter().map(|one| (one.number, one)).collect(), below: Vec::new() };
        let top = stack.extents((LOOP_MAJOR, 9_003), 4..14, 0);
        let base = Base::File(FileIdentity { device: 0, inode: 1 });
        assert_eq!(top, [Extent { base, bytes: 1234..1244 }]);
        assert_eq!(stack.below, [(LOOP_MAJOR, 9_002), (LOOP_MAJOR, 9_001)]);
        let bottom = |bytes| Extent { base, bytes };
        assert!(top[0].meets(&bottom(1000..1235)) && top[0].meets(&bottom(1243..2000)));
        assert!(!top[0].meets(&bottom(1000..1234)) && !top[0].meets(&bottom(1244..2000)));
        let other = stack.extents((LOOP_MAJOR, 9_004), 0..5000, 0);
        assert!(!other[0].meets(&top[0]));
    }

    #[test]
    fn a_loop_on_itself_ends() {
        let devices = [on(9_001, 9_002, 0), on(9_002, 9_001, 0)];
        let mut stack =
            Stack { loops: devices.iter().map(|one| (one.number, one)).collect(), below: Vec::new() };
        assert!(stack.extents((LOOP_MAJOR, 9_001), 0..1, 0).is_empty());
    }
}
