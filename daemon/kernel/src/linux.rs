//! The real kernel. Every call that may touch a backing file, or wait for a lock of the loop
//! driver, runs on a thread of the blocking pool.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use linux_raw_sys::loop_device::_bindgen_ty_1 as LoFlags;
use linux_raw_sys::loop_device::loop_info64;
use loopd_common::CallerFile;
use loopd_common::{Error, ErrorKind, Lifetime};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::inotify::AddWatchFlags;
use tracing::{debug, warn};

use super::backing_file::{self, Examined};
use super::descriptor_store::DescriptorStore;
use super::node_watch::{NodeWatch, NodeWatches};
use super::untrusted::Expected;
use super::untrusted::Untrusted;
use super::{change, inotify, ioctl, mounts, overlapping, partitions, sysfs, udev};
use loopd_common::text::printable;
use loopd_engine::AttachRequest;
use loopd_engine::kernel::{
    Attached, Binding, BtrfsDevices, Change, Device, DiskSequence, FileFacts, Kernel, PartitionNode,
    Partitioning, ProbeResult, ScanReason, Users, node,
};
use loopd_engine::mount_table::MountTable;

/// How often a number taken by another process is answered with a new choice.
const ATTEMPTS: usize = 64;
/// Block sizes up to this one are taken by every kernel.
const SMALLEST_PAGE: u32 = 4096;
/// The block size where nothing asks for another.
const SECTOR: u32 = 512;

/// How long a passing user, such as a probe of udev, may keep a device that is to be removed or claimed.
pub const PASSING: Duration = Duration::from_secs(1);
/// Much longer than the kernel takes from the news of a close to the release of the device.
pub const RELEASE: Duration = Duration::from_millis(1);

/// Where a mark lies in `lo_file_name`: behind the NUL, where the kernel keeps what it is given and
/// nobody else looks.
const MARK: Range<usize> = 55..63;

/// The loop driver.
pub struct Linux {
    shared: Arc<Shared>,
}

/// A read-only descriptor of a loop device; another daemon may take up the copy in the vault.
pub struct Hold {
    descriptor: OwnedFd,
    disk_sequence: DiskSequence,
}

pub struct Shared {
    control: OwnedFd,
    /// Numbers that an attach of this process is working on. Held for the choice of a number only,
    /// never while the kernel looks at a file: that may hang, and must not stop anyone else.
    claims: Mutex<HashMap<u32, Work>>,
    /// Signalled when a node was removed.
    removed: Condvar,
    /// The largest block size that this kernel was not seen to refuse.
    largest_block: AtomicU32,
    /// Whether the kernel reads partition tables, once that was seen.
    scans: OnceLock<bool>,
    node_watches: NodeWatches,
    vault: Box<dyn DescriptorStore>,
    untrusted: Untrusted,
}

/// What this process is doing to a number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Attach,
    Remove,
}

/// A number that no other attach of this process will choose.
pub struct Claim {
    shared: Arc<Shared>,
    number: u32,
    node_made: bool,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.claims().remove(&self.number);
    }
}

impl Shared {
    fn claims(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Work>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the kernel reads partition tables, where that was seen already.
    pub fn scans_itself(&self) -> Option<bool> {
        self.scans.get().copied()
    }

    /// Whether the kernel reads partition tables: so it does where it was `seen` to, else it is
    /// given a sample.
    pub fn kernel_scans(self: &Arc<Self>, seen: bool) -> bool {
        *self.scans.get_or_init(|| {
            let scans = seen || try_sample(self).unwrap_or(false);
            let how = if scans { "reads" } else { "does not read" };
            debug!("this kernel {how} partition tables");
            scans
        })
    }
}

/// Attaches an image with one partition for a moment and looks whether its node appears.
fn try_sample(shared: &Arc<Shared>) -> Option<bool> {
    let request = AttachRequest { read_only: true, wait: false, ..AttachRequest::default() };
    let sample = partitions::sample_image().ok()?;
    let (attached, _no_writer) = bind(shared, &sample, &request).ok()?;
    Some(!sysfs::partitions(attached.device.number).is_empty())
}

impl Linux {
    /// Opens `/dev/loop-control`, which loads the loop module where it is one.
    ///
    /// # Errors
    /// The kernel has no loop driver, or is older than 5.15.
    pub fn open(vault: Box<dyn DescriptorStore>, untrusted: Untrusted) -> Result<Self, Error> {
        require_disk_sequences()?;
        let control = File::options().read(true).write(true).open("/dev/loop-control").map_err(|error| {
            Error::new(
                ErrorKind::NotSupported,
                format!("cannot open /dev/loop-control: {error}; is the loop module there (modprobe loop), and are we root?"),
            )
        })?;
        Ok(Self {
            shared: Arc::new(Shared {
                control: control.into(),
                claims: Mutex::default(),
                removed: Condvar::new(),
                largest_block: AtomicU32::new(65536),
                scans: OnceLock::new(),
                node_watches: NodeWatches::new(),
                vault,
                untrusted,
            }),
        })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Shared>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Kernel, "a worker thread of loopd failed")))
    }
}

/// Refuses kernels without disk sequence numbers.
fn require_disk_sequences() -> Result<(), Error> {
    let name =
        nix::sys::utsname::uname().map_err(|errno| failed("tell the kernel's version", "uname", errno))?;
    check_release(&name.release().to_string_lossy())
}

fn check_release(release: &str) -> Result<(), Error> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 15) {
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!("Linux {release} has no disk sequence numbers; loopd needs Linux 5.15 or newer"),
        ));
    }
    Ok(())
}

impl Kernel for Linux {
    type File = CallerFile;
    type Hold = Hold;
    type Claim = Claim;
    type Claims = overlapping::Claims;

    async fn examine(&self, file: &CallerFile) -> Result<FileFacts, Error> {
        let file = file.clone();
        self.blocking(move |_| Ok(backing_file::examine(file)?.facts)).await
    }

    async fn attach(&self, file: CallerFile, request: &AttachRequest) -> Result<Attached<Linux>, Error> {
        let request = request.clone();
        self.blocking(move |shared| attach(shared, &file, &request)).await
    }

    async fn release(&self, hold: Hold) {
        // First, so that the service manager does not make the last close.
        self.shared.vault.withdraw(hold.disk_sequence).await;
        // The last close takes the device down, which writes to the backing file.
        let _closed = self
            .blocking(move |_| {
                drop(hold);
                Ok(())
            })
            .await;
    }

    async fn hold(&self, number: u32, disk_sequence: DiskSequence) -> Result<Option<Hold>, Error> {
        self.blocking(move |shared| {
            let Some(descriptor) = open_attached(number, disk_sequence)? else { return Ok(None) };
            shared.vault.deposit(disk_sequence, descriptor.as_fd());
            Ok(Some(Hold { descriptor, disk_sequence }))
        })
        .await
    }

    fn has_stored_hold(&self, disk_sequence: DiskSequence) -> bool {
        self.shared.vault.has_stored_hold(disk_sequence)
    }

    async fn release_unadopted(&self, except: &HashSet<DiskSequence>) {
        let except = except.clone();
        let _done = self
            .blocking(move |shared| {
                shared.vault.clear_out(&except);
                Ok(())
            })
            .await;
    }

    async fn clear(&self, number: u32, disk_sequence: DiskSequence) -> Result<(), Error> {
        // A copy that an earlier daemon has left would keep the device.
        self.shared.vault.withdraw(disk_sequence).await;
        self.blocking(move |_| {
            let Some(device) = open_attached(number, disk_sequence)? else { return Ok(()) };
            match ioctl::clear(&device) {
                Ok(()) | Err(Errno::ENXIO) => Ok(()),
                Err(errno) => Err(failed(&format!("detach {}", node(number)), "LOOP_CLR_FD", errno)),
            }
        })
        .await
    }

    async fn change(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        wanted: Change,
    ) -> Result<Option<Device>, Error> {
        self.blocking(move |_| change::apply(number, disk_sequence, wanted)).await
    }

    async fn replace(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        file: CallerFile,
        untrusted: bool,
    ) -> Result<Option<Device>, Error> {
        self.blocking(move |shared| replace(shared, number, disk_sequence, &file, untrusted)).await
    }

    fn mark_untrusted(&self, disk_sequence: DiskSequence) -> Result<(), Error> {
        self.shared.untrusted.mark(disk_sequence).map_err(|error| unmarked(&error))
    }

    async fn free_number(&self) -> Result<u32, Error> {
        self.blocking(|shared| free_number(shared, &shared.claims(), "find a free loop device")).await
    }

    async fn remove_device(&self, number: u32) -> Result<(), Error> {
        self.blocking(move |shared| remove_device(shared, number)).await
    }

    async fn status(&self, number: u32) -> Result<Option<Device>, Error> {
        self.blocking(move |_| status(number)).await
    }

    fn stored(&self, number: u32, partition: Option<u32>) -> Option<ProbeResult> {
        udev::stored(number, partition)
    }

    async fn stored_of(&self, number: u32, partitions: Vec<Option<u32>>) -> Vec<(Option<u32>, ProbeResult)> {
        let stored = move |partition| Some((partition, udev::stored(number, partition)?));
        let all = self.blocking(move |_| Ok(partitions.into_iter().filter_map(stored).collect())).await;
        all.unwrap_or_default()
    }

    async fn users(&self, number: u32) -> Result<Users, Error> {
        self.blocking(move |_| {
            sysfs::users(number).map_err(|error| {
                Error::new(ErrorKind::Kernel, format!("cannot tell who uses {}: {error}", node(number)))
            })
        })
        .await
    }

    async fn read(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, Error> {
        self.blocking(move |_| read(number, disk_sequence, offset, length)).await
    }

    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error> {
        super::udisks::set_up_for(number)
    }

    async fn btrfs(&self, uuid: &str) -> Result<BtrfsDevices, Error> {
        let uuid = uuid.to_owned();
        self.blocking(move |_| {
            let present = udev::with_uuid(&uuid).map_err(|error| {
                let why = format!("cannot tell which devices have the UUID {uuid}: {error}");
                Error::new(ErrorKind::Kernel, why)
            })?;
            Ok(BtrfsDevices { mounted: sysfs::mounted_btrfs(&uuid), present })
        })
        .await
    }

    async fn claim_overlapping(
        &self,
        device: &Device,
        bytes: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        asked: String,
    ) -> Result<overlapping::Claims, Error> {
        let device = device.clone();
        self.blocking(move |_| overlapping::claim(&device, &bytes, &others, &asked)).await
    }

    fn mounts(&self) -> Option<MountTable> {
        mounts::read().ok()
    }

    async fn await_rundown(&self, number: u32) {
        let _opened = self.blocking(move |_| Ok(open(number, OFlag::O_RDONLY).is_ok())).await;
    }

    async fn remove(&self, number: u32) {
        let _done = self
            .blocking(move |shared| {
                remove(shared, number);
                Ok(())
            })
            .await;
    }

    async fn partition(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        reason: ScanReason,
    ) -> Result<Partitioning, Error> {
        self.blocking(move |shared| partitions::settle(shared, number, disk_sequence, reason)).await
    }

    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode> {
        sysfs::partitions(number)
    }

    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode> {
        sysfs::partition(number, partition)
    }

    fn scans_itself(&self) -> bool {
        self.shared.scans_itself() == Some(true)
    }

    fn bound_numbers(&self) -> Vec<u32> {
        sysfs::bound_numbers()
    }

    fn peek(&self, number: u32) -> Binding {
        let claimed = self.shared.claims().contains_key(&number);
        let bound = sysfs::disk_sequence(number).filter(|_| sysfs::is_bound(number));
        Binding { bound, claimed }
    }

    fn udev_runs(&self) -> bool {
        udev::runs()
    }

    fn udev_is_idle(&self) -> bool {
        udev::is_idle()
    }
}

/// An errno that has no name of its own in the contract.
pub fn failed(asked: &str, call: &str, errno: Errno) -> Error {
    Error::new(ErrorKind::Kernel, format!("cannot {asked}: {call} failed with {errno:?} ({})", errno.desc()))
}

/// Opens the node of a loop device: `O_RDONLY` or `O_RDWR`, and `O_EXCL` if it is to be claimed.
pub fn open(number: u32, access: OFlag) -> nix::Result<OwnedFd> {
    let claim = access & OFlag::O_EXCL;
    let file = OpenOptions::new()
        .read(true)
        .write(access & OFlag::O_ACCMODE == OFlag::O_RDWR)
        .custom_flags((claim | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(node(number))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
    let is_block_device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_block_device { Ok(file.into()) } else { Err(Errno::ENOTBLK) }
}

/// Opens the device for reading where it still is the one of this attach.
pub fn open_attached(number: u32, disk_sequence: DiskSequence) -> Result<Option<OwnedFd>, Error> {
    open_attached_for(number, disk_sequence, OFlag::O_RDONLY)
}

/// Whether the device was attached with PARTSCAN.
pub fn wants_partitions(device: &OwnedFd) -> bool {
    ioctl::status(device).is_ok_and(|info| info.lo_flags & LoFlags::LO_FLAGS_PARTSCAN as u32 != 0)
}

/// Opens the device only where it still is the one of this attach; `None` where that is over.
pub fn open_attached_for(
    number: u32,
    disk_sequence: DiskSequence,
    access: OFlag,
) -> Result<Option<OwnedFd>, Error> {
    let device = match open(number, access) {
        Ok(device) => device,
        Err(Errno::ENXIO | Errno::ENOENT | Errno::ENODEV) => return Ok(None),
        // Built without BLK_DEV_WRITE_MOUNTED.
        Err(Errno::EBUSY) => {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "cannot open {} for writing: this kernel refuses that while it is mounted",
                    node(number)
                ),
            ));
        }
        Err(errno) => return Err(failed(&format!("open {}", node(number)), "open", errno)),
    };
    Ok(is_of(&device, number, disk_sequence).then_some(device))
}

/// Whether an open device is the one of this attach.
pub fn is_of(device: &OwnedFd, number: u32, disk_sequence: DiskSequence) -> bool {
    // LOOP_GET_STATUS64 would ask the backing file's file system (`loop_get_status`), which may hang.
    ioctl::disk_sequence(device) == Ok(disk_sequence.0) && sysfs::is_bound(number)
}

fn attach(shared: &Arc<Shared>, file: &OwnedFd, request: &AttachRequest) -> Result<Attached<Linux>, Error> {
    let (mut attached, writer) = bind(shared, file, request)?;
    if request.partition_scan {
        attached.partitioning = partitions::first_look(shared, file, &attached.device);
    }
    if let Some(hold) = &attached.hold {
        shared.vault.deposit(hold.disk_sequence, hold.descriptor.as_fd());
    }
    if let Some(writer) = writer {
        writer.close();
    }
    Ok(attached)
}

fn bind<'a>(
    shared: &'a Arc<Shared>,
    file: &OwnedFd,
    request: &AttachRequest,
) -> Result<(Attached<Linux>, Option<Writer<'a>>), Error> {
    let examined = backing_file::examine(file)?;
    backing_file::check_fit(&examined, request)?;
    let block_size = match request.block_size {
        0 => choose_block_size(file, &examined, request),
        wanted => wanted,
    };
    let request = &AttachRequest { block_size, ..request.clone() };
    let largest = shared.largest_block.load(Ordering::Relaxed);
    if request.block_size > largest {
        return Err(block_size_refused(&examined, request, largest));
    }
    // Numbers that turned out to be taken stay claimed until the end, so that none is tried twice.
    let mut claims = Vec::new();
    while claims.len() < ATTEMPTS {
        let claim = claim(shared, request.number, &examined)?;
        if !partitions::sweep(claim.number) && request.number.is_none() {
            claims.push(claim);
            continue;
        }
        let expected = match expect(shared, request.untrusted, claim.number) {
            Ok(expected) => expected,
            Err(error) => {
                give_up(shared, claim);
                return Err(error);
            }
        };
        match configure(shared, &claim, file, &examined, request) {
            Ok((device, hold, writer)) => {
                if let Err(error) = commit(expected, &device) {
                    drop((hold, writer));
                    give_up(shared, claim);
                    return Err(error);
                }
                let (partitioning, node_made) = (Partitioning::default(), claim.node_made);
                return Ok((Attached { device, hold, partitioning, claim, node_made }, writer));
            }
            Err(Errno::EBUSY | Errno::ENXIO | Errno::ENOENT | Errno::ENODEV) if request.number.is_none() => {
                claims.push(claim);
            }
            Err(Errno::EACCES) if request.number.is_none() && is_closed_to_us(claim.number) => {
                warn!("{}", closed_to_us(claim.number));
                claims.push(claim);
            }
            Err(errno) => {
                let error = refusal(shared, &claim, file, &examined, request, errno);
                // In this order: the next claim of the number makes a mark of its own.
                drop(expected);
                give_up(shared, claim);
                return Err(error);
            }
        }
    }
    Err(Error::new(
        ErrorKind::NoFreeDevice,
        format!(
            "cannot attach {}: {ATTEMPTS} free loop devices in a row were taken by other programs; try again",
            printable(&examined.facts.path)
        ),
    ))
}

/// Marks a number for udev, before the event of the attach.
fn expect(shared: &Shared, untrusted: bool, number: u32) -> Result<Option<Expected<'_>>, Error> {
    let expected = untrusted.then(|| shared.untrusted.expect(number));
    expected.transpose().map_err(|error| unmarked(&error))
}

/// Marks the device by its disk sequence; detaches one that cannot be marked.
fn commit(expected: Option<Expected<'_>>, device: &Device) -> Result<(), Error> {
    let Some(mut expected) = expected else { return Ok(()) };
    let Err(error) = expected.becomes(device.disk_sequence) else { return Ok(()) };
    if let Some(device) = open_attached(device.number, device.disk_sequence)? {
        let _gone_at_close = ioctl::clear(&device);
    }
    Err(unmarked(&error))
}

/// Gives back a number after an error, with its node if that was made for it.
fn give_up(shared: &Shared, claim: Claim) {
    let (number, node_made) = (claim.number, claim.node_made);
    drop(claim);
    if node_made {
        remove(shared, number);
    }
}

fn unmarked(error: &std::io::Error) -> Error {
    let why = format!("cannot tell udev that the device is a user's (in /run/loopd/untrusted): {error}");
    Error::new(ErrorKind::Kernel, why)
}

/// Shows another file. A device that cannot be marked by its sequence then stays marked by its number.
fn replace(
    shared: &Shared,
    number: u32,
    disk_sequence: DiskSequence,
    file: &OwnedFd,
    untrusted: bool,
) -> Result<Option<Device>, Error> {
    let expected = expect(shared, untrusted, number)?;
    let replaced = change::replace(number, disk_sequence, file);
    let is_over = matches!(replaced, Ok(None));
    let sequence = sysfs::disk_sequence(number).filter(|sequence| *sequence != disk_sequence && !is_over);
    if let (Some(mut expected), Some(sequence)) = (expected, sequence)
        && let Err(error) = expected.becomes(sequence)
    {
        warn!(device = node(number), "{}", unmarked(&error));
        expected.stay();
    }
    replaced
}

/// 512, or what the image's partition table was written for.
fn choose_block_size(file: &OwnedFd, examined: &Examined, request: &AttachRequest) -> u32 {
    let shown = examined.size.map(|size| match request.size_limit {
        0 => size - request.offset,
        limit => limit.min(size - request.offset),
    });
    shown.and_then(|size| partitions::sector_size(file, request.offset, size)).unwrap_or(SECTOR)
}

/// Chooses a number, or takes the wanted one, under the one lock.
fn claim(shared: &Arc<Shared>, wanted: Option<u32>, examined: &Examined) -> Result<Claim, Error> {
    let mut claims = shared.claims();
    while wanted.is_some_and(|number| claims.get(&number) == Some(&Work::Remove)) {
        claims = shared.removed.wait(claims).unwrap_or_else(PoisonError::into_inner);
    }
    let (number, node_made) = match wanted {
        Some(number) if claims.contains_key(&number) || sysfs::is_bound(number) => {
            return Err(taken(number, examined));
        }
        Some(number) => (number, ensure_exists(shared, number, &attaching(examined))?),
        None => (free_number(shared, &claims, &attaching(examined))?, false),
    };
    claims.insert(number, Work::Attach);
    drop(claims);
    Ok(Claim { shared: Arc::clone(shared), number, node_made })
}

/// Removes a device for a caller; who has it open for a moment, such as udev, is waited for.
fn remove_device(shared: &Shared, number: u32) -> Result<(), Error> {
    let error = |kind, why: &str| Err(Error::new(kind, format!("cannot remove {}: {why}", node(number))));
    match shared.claims().entry(number) {
        Entry::Occupied(_) => return error(ErrorKind::Busy, "something is being attached to it"),
        Entry::Vacant(free) => drop(free.insert(Work::Remove)),
    }
    match remove_claimed(shared, number) {
        Ok(()) => Ok(()),
        Err(Errno::ENODEV) => error(ErrorKind::NotFound, "there is no such device"),
        Err(Errno::EBUSY) if sysfs::is_bound(number) => {
            error(ErrorKind::Busy, "a file is attached to it; detach it first")
        }
        Err(Errno::EBUSY) => error(ErrorKind::Busy, "a process has it open"),
        Err(errno) => Err(failed(&format!("remove {}", node(number)), "LOOP_CTL_REMOVE", errno)),
    }
}

fn remove_claimed(shared: &Shared, number: u32) -> nix::Result<()> {
    let removed = match ioctl::remove(&shared.control, number) {
        Err(Errno::EBUSY) if !sysfs::is_bound(number) => remove_when_closed(&shared.control, number),
        removed => removed,
    };
    shared.claims().remove(&number);
    shared.removed.notify_all();
    removed
}

/// Tries again at each close of the node, and once more when the time is over.
fn remove_when_closed(control: &OwnedFd, number: u32) -> nix::Result<()> {
    let deadline = Instant::now() + PASSING;
    let Ok(closes) = inotify::new() else { return Err(Errno::EBUSY) };
    if closes.add_watch(node(number).as_str(), AddWatchFlags::IN_CLOSE).is_err() {
        return Err(Errno::EBUSY);
    }
    let mut is_early = true;
    while is_early {
        match ioctl::remove(control, number) {
            Err(Errno::EBUSY) if !sysfs::is_bound(number) => {}
            removed => return removed,
        }
        is_early = inotify::comes(&closes, deadline, |_| true);
        // The kernel tells of a close before it lets go of the device (__fput in fs/file_table.c).
        std::thread::sleep(RELEASE);
    }
    ioctl::remove(control, number)
}

/// Removes a node, unless someone here or elsewhere goes on to use it. Takes some 50 ms.
fn remove(shared: &Shared, number: u32) {
    match shared.claims().entry(number) {
        Entry::Occupied(_) => return,
        Entry::Vacant(free) => drop(free.insert(Work::Remove)),
    }
    let _kept_where_in_use = remove_claimed(shared, number);
}

fn taken(number: u32, examined: &Examined) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "cannot attach {} to {}: that device is taken; choose another number, or leave it out",
            printable(&examined.facts.path),
            node(number)
        ),
    )
}

fn attaching(examined: &Examined) -> String {
    format!("attach {}", printable(&examined.facts.path))
}

fn ensure_exists(shared: &Shared, number: u32, asked: &str) -> Result<bool, Error> {
    if sysfs::exists(number) {
        return Ok(false);
    }
    match ioctl::add(&shared.control, number) {
        Ok(_) => Ok(true),
        Err(Errno::EEXIST) => Ok(false),
        Err(errno) => Err(no_device(asked, &format!("make {}", node(number)), errno)),
    }
}

/// The kernel's choice, or the next number after it that nobody here is working on.
fn free_number(shared: &Shared, claims: &HashMap<u32, Work>, asked: &str) -> Result<u32, Error> {
    let first = ioctl::free_number(&shared.control)
        .map_err(|errno| no_device(asked, "find a free loop device", errno))?;
    let number =
        (first..).find(|number| !claims.contains_key(number) && !sysfs::is_bound(*number)).unwrap_or(first);
    ensure_exists(shared, number, asked)?;
    Ok(number)
}

fn no_device(asked: &str, step: &str, errno: Errno) -> Error {
    Error::new(
        ErrorKind::NoFreeDevice,
        format!(
            "cannot {asked}: the kernel would not {step} ({errno:?}, {}); detach one that is not needed",
            errno.desc()
        ),
    )
}

/// A writable descriptor of the disk. It would stop mount(2) on kernels without
/// BLK_DEV_WRITE_MOUNTED, and goes before the caller hears of the device.
struct Writer<'a> {
    descriptor: OwnedFd,
    watch: NodeWatch<'a>,
}

impl Writer<'_> {
    fn close(self) {
        self.watch.close_unnoticed(self.descriptor);
    }
}

/// One `LOOP_CONFIGURE`, and the read-only descriptor that keeps the device where the lifetime
/// wants one. After an error nothing is attached. The writer is left to who waits for udev.
fn configure<'a>(
    shared: &'a Shared,
    claim: &Claim,
    file: &OwnedFd,
    examined: &Examined,
    request: &AttachRequest,
) -> nix::Result<(Device, Option<Hold>, Option<Writer<'a>>)> {
    let writable = examined.facts.writable && !request.read_only;
    let device = open(claim.number, OFlag::O_RDONLY)?;
    let writer = if writable { Some(open(claim.number, OFlag::O_RDWR)?) } else { None };
    let watch = if writable && request.wait && udev::runs() { shared.node_watches.of(&device) } else { None };
    let through = writer.as_ref().unwrap_or(&device);
    ioctl::configure(through, file.as_fd(), request.block_size, info(request))?;
    let writer = writer.zip(watch).map(|(descriptor, watch)| Writer { descriptor, watch });
    match finish(claim, &device, request) {
        Ok((known, hold)) => Ok((known, hold, writer)),
        Err(errno) => {
            let _gone_at_close = ioctl::clear(&device);
            Err(errno)
        }
    }
}

fn finish(claim: &Claim, device: &OwnedFd, request: &AttachRequest) -> nix::Result<(Device, Option<Hold>)> {
    let known = read_device(claim.number, device)?;
    if request.direct_io && !known.direct_io {
        return Err(Errno::EOPNOTSUPP);
    }
    let hold = match request.lifetime {
        Lifetime::Persistent => None,
        _ => Some(device.try_clone().map_err(|_| Errno::EMFILE)?),
    };
    let disk_sequence = known.disk_sequence;
    Ok((known, hold.map(|descriptor| Hold { descriptor, disk_sequence })))
}

fn info(request: &AttachRequest) -> loop_info64 {
    let mut info = ioctl::empty_info();
    info.lo_offset = request.offset;
    info.lo_sizelimit = request.size_limit;
    for (byte, wanted) in info.lo_file_name.iter_mut().zip(request.reference.bytes()) {
        *byte = wanted;
    }
    if request.reference.len() < MARK.start {
        info.lo_file_name[MARK].copy_from_slice(&request.mark.to_ne_bytes());
    }
    let mut set = |wanted: bool, flag: LoFlags| {
        if wanted {
            info.lo_flags |= flag as u32;
        }
    };
    set(request.read_only, LoFlags::LO_FLAGS_READ_ONLY);
    set(request.partition_scan, LoFlags::LO_FLAGS_PARTSCAN);
    set(request.direct_io, LoFlags::LO_FLAGS_DIRECT_IO);
    set(request.lifetime != Lifetime::Persistent, LoFlags::LO_FLAGS_AUTOCLEAR);
    info
}

/// What a failed attach is told as.
fn refusal(
    shared: &Shared,
    claim: &Claim,
    file: &OwnedFd,
    examined: &Examined,
    request: &AttachRequest,
    errno: Errno,
) -> Error {
    let name = printable(&examined.facts.path);
    match errno {
        Errno::EBUSY => taken(claim.number, examined),
        Errno::EACCES if is_closed_to_us(claim.number) => {
            let why = closed_to_us(claim.number);
            Error::new(ErrorKind::Kernel, format!("cannot attach {name}: {why}, or choose another number"))
        }
        Errno::EINVAL if request.block_size > SMALLEST_PAGE => {
            heal(claim.number, file);
            shared.largest_block.store(request.block_size / 2, Ordering::Relaxed);
            block_size_refused(examined, request, request.block_size / 2)
        }
        Errno::EOPNOTSUPP => Error::new(
            ErrorKind::NotSupported,
            format!(
                "cannot attach {name} with direct I/O: its file system, offset {} or block size does not allow it; \
                 leave direct-io out",
                request.offset
            ),
        ),
        Errno::EBADF | Errno::ELOOP => Error::new(
            ErrorKind::InvalidBackingFile,
            format!("cannot attach {name}: it is itself built on {}", node(claim.number)),
        ),
        Errno::EPERM | Errno::ETXTBSY | Errno::EROFS | Errno::EACCES => Error::new(
            ErrorKind::InvalidBackingFile,
            format!(
                "cannot attach {name}: the kernel refuses this file ({errno:?}, {}); is it a swap file?",
                errno.desc()
            ),
        ),
        errno => failed(&format!("attach {name}"), "LOOP_CONFIGURE", errno),
    }
}

/// Whether the node has been given to somebody else: root without capabilities is a user like others.
fn is_closed_to_us(number: u32) -> bool {
    matches!(open(number, OFlag::O_RDWR), Err(Errno::EACCES))
}

fn closed_to_us(number: u32) -> String {
    let node = node(number);
    format!("{node} may not be opened by root (EACCES); give it back (chown root:disk {node})")
}

fn block_size_refused(examined: &Examined, request: &AttachRequest, largest: u32) -> Error {
    Error::new(
        ErrorKind::NotSupported,
        format!(
            "cannot attach {} with a block size of {}: this kernel takes at most {largest}",
            printable(&examined.facts.path),
            request.block_size
        ),
    )
}

/// A refused block size leaves uevents suppressed and the device read-only until the next good
/// `LOOP_CONFIGURE` (Linux 5.15 to 6.x, `loop_configure`): make one, and undo it.
fn heal(number: u32, file: &OwnedFd) {
    let Ok(device) = open(number, OFlag::O_RDONLY) else { return };
    if ioctl::configure(&device, file.as_fd(), 512, ioctl::empty_info()).is_ok() {
        let _gone_at_close = ioctl::clear(&device);
    }
}

fn read(number: u32, disk_sequence: DiskSequence, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
    let Some(device) = open_attached(number, disk_sequence)? else { return Ok(Vec::new()) };
    let mut bytes = vec![0; length];
    let read = File::from(device).read_at(&mut bytes, offset).map_err(|error| {
        Error::new(ErrorKind::Kernel, format!("{} cannot be read: {error}", node(number)))
    })?;
    bytes.truncate(read);
    Ok(bytes)
}

fn status(number: u32) -> Result<Option<Device>, Error> {
    if !sysfs::is_bound(number) {
        return Ok(None);
    }
    let device = match open(number, OFlag::O_RDONLY) {
        Ok(device) => device,
        Err(Errno::ENXIO | Errno::ENOENT | Errno::ENODEV) => return Ok(None),
        Err(errno) => return Err(failed(&format!("open {}", node(number)), "open", errno)),
    };
    match read_device(number, &device) {
        Ok(known) => Ok(Some(known)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(failed(&format!("read the state of {}", node(number)), "LOOP_GET_STATUS64", errno)),
    }
}

/// The state of an open device.
pub fn read_device(number: u32, device: &OwnedFd) -> nix::Result<Device> {
    let has = |flags: u32, flag: LoFlags| flags & flag as u32 != 0;
    let info = ioctl::status(device)?;
    let node = nix::sys::stat::fstat(device)?.st_rdev;
    let minor = |device| u32::try_from(nix::sys::stat::minor(device)).unwrap_or_default();
    let major = |device| u32::try_from(nix::sys::stat::major(device)).unwrap_or_default();
    let name_length = info.lo_file_name.iter().position(|byte| *byte == 0).unwrap_or(info.lo_file_name.len());
    Ok(Device {
        number,
        device_number: (major(node), minor(node)),
        disk_sequence: DiskSequence(ioctl::disk_sequence(device)?),
        backing_file: sysfs::backing_file(number).unwrap_or_default(),
        backing_device: info.lo_device,
        backing_inode: info.lo_inode,
        // 0 for a regular file (`loop_get_status`).
        backing_block_device: (info.lo_rdevice != 0)
            .then(|| (major(info.lo_rdevice), minor(info.lo_rdevice))),
        offset: info.lo_offset,
        size_limit: info.lo_sizelimit,
        size: ioctl::size(device)?,
        reference: String::from_utf8_lossy(&info.lo_file_name[..name_length]).into_owned(),
        mark: mark(&info.lo_file_name, name_length),
        read_only: ioctl::read_only(device)?,
        direct_io: has(info.lo_flags, LoFlags::LO_FLAGS_DIRECT_IO),
        block_size: ioctl::block_size(device)?,
        partition_scan: has(info.lo_flags, LoFlags::LO_FLAGS_PARTSCAN),
        autoclear: has(info.lo_flags, LoFlags::LO_FLAGS_AUTOCLEAR),
    })
}

fn mark(file_name: &[u8; 64], name_length: usize) -> u64 {
    let bytes = file_name[MARK].try_into().unwrap_or_default();
    if name_length < MARK.start { u64::from_ne_bytes(bytes) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_without_disk_sequences_are_refused() {
        for release in ["5.15.0", "5.15", "5.15.0-91-generic", "6.1.0-18-amd64", "10.0.1"] {
            assert!(check_release(release).is_ok(), "{release}");
        }
        for release in ["5.14.21", "5.9.0", "4.19.0-27-amd64", "5", "", "unknown"] {
            let message = check_release(release).unwrap_err().message;
            assert!(message.contains("needs Linux 5.15 or newer"), "{message}");
        }
    }

    #[test]
    fn a_mark_lies_behind_the_reference_and_gives_way_to_it() {
        let request = |reference: &str| AttachRequest {
            reference: reference.to_owned(),
            mark: 0x0102_0304_0506_0708,
            ..AttachRequest::default()
        };
        for (length, marked) in [(0, true), (54, true), (55, false), (63, false)] {
            let reference = "x".repeat(length);
            let request = request(&reference);
            let info = info(&request);
            assert_eq!(&info.lo_file_name[..length], reference.as_bytes());
            assert_eq!(info.lo_file_name[length], 0);
            assert_eq!(mark(&info.lo_file_name, length), if marked { request.mark } else { 0 }, "{length}");
        }
    }
}
