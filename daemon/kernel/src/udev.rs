//! Events that udev has processed, or without udev those of the kernel; udev's database.
//!
//! The objects of libudev cannot leave their thread, so each event is converted to an owned [`Uevent`] at once.

use std::ffi::OsStr;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use loopd_engine::kernel::{DiskSequence, FileSystem, ProbeResult, TableEntry};
use loopd_engine::{Error, MappingEvent, Uevent};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::io::Interest;
use tracing::warn;

use crate::readiness::Readiness;
use crate::sysfs::loop_device;

/// The time without an event, after events were lost, until everything is read again.
const QUIET: Duration = Duration::from_millis(200);

/// udev's control socket.
const CONTROL: &str = "/run/udev/control";

/// How much older than the clock the modification time of a new file may be.
const CLOCK_TICK: Duration = Duration::from_millis(10);

/// How many events are read before other tasks run.
const AT_ONCE: usize = 8;

/// An item of the monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A loop device changed.
    Uevent(Box<Uevent>),
    /// A mapping changed.
    Mapping(Box<MappingEvent>),
    /// Events were lost, and udev is idle since: everything has to be read again.
    Lost,
}

fn not_enumerated(uuid: &str, source: std::io::Error) -> Error {
    Error::Io { operation: format!("determine which devices have the UUID {uuid}"), source }
}

/// The netlink sockets. Must be read from the thread that created them.
pub struct Monitor {
    from_udev: Socket,
    from_kernel: Option<Socket>,
}

struct Socket {
    socket: udev::MonitorSocket,
    readiness: Readiness,
    from_udev: bool,
}

impl Socket {
    fn new(builder: udev::MonitorBuilder, from_udev: bool) -> std::io::Result<Self> {
        let socket = builder.match_subsystem("block")?.listen()?;
        Ok(Self { readiness: Readiness::watch(&socket, Interest::READABLE)?, socket, from_udev })
    }

    async fn ready(&self) -> std::io::Result<&Self> {
        self.readiness.wait().await?;
        Ok(self)
    }
}

impl Monitor {
    /// Starts listening to udev, and to the kernel too if udev does not answer.
    ///
    /// # Errors
    /// The sockets cannot be created.
    pub fn listen() -> std::io::Result<Self> {
        let from_udev = Socket::new(udev::MonitorBuilder::new()?, true)?;
        let from_kernel =
            if answers() { None } else { Some(Socket::new(udev::MonitorBuilder::new_kernel()?, false)?) };
        Ok(Self { from_udev, from_kernel })
    }

    /// Passes each event to `publish`. Returns only if listening fails.
    pub async fn run(self, mut publish: impl FnMut(Notice)) {
        let mut lost = false;
        loop {
            let ready = async {
                match &self.from_kernel {
                    Some(from_kernel) => tokio::select! {
                        socket = self.from_udev.ready() => socket,
                        socket = from_kernel.ready() => socket,
                    },
                    None => self.from_udev.ready().await,
                }
            };
            // The timer runs only while something is known to be lost.
            let ready = if lost { tokio::time::timeout(QUIET, ready).await.ok() } else { Some(ready.await) };
            match ready {
                Some(Ok(socket)) => lost |= drain(socket, &mut publish).await,
                Some(Err(error)) => return warn!("listening to udev failed: {error}"),
                None if is_idle() => {
                    lost = false;
                    publish(Notice::Lost);
                }
                None => {}
            }
        }
    }
}

/// Reads all pending events; true if the buffer of the socket has overflowed. Other tasks run in between.
async fn drain(socket: &Socket, publish: &mut impl FnMut(Notice)) -> bool {
    let mut lost = false;
    for read_at_once in 1usize.. {
        match socket.socket.iter().next() {
            Some(event) => {
                if let Some(notice) = read(&event, socket.from_udev) {
                    publish(notice);
                }
            }
            // The crate reports an overflow as "no event"; libudev has left the errno.
            None if Errno::last() == Errno::ENOBUFS => lost = true,
            None => break,
        }
        if read_at_once.is_multiple_of(AT_ONCE) {
            tokio::task::yield_now().await;
        }
    }
    lost
}

/// Whether udev runs.
#[must_use]
pub fn runs() -> bool {
    Path::new(CONTROL).exists()
}

/// Whether udev has processed all events (`/run/udev/queue`, as in sd-device).
#[must_use]
pub fn is_idle() -> bool {
    !Path::new("/run/udev/queue").exists()
}

/// The entry of a loop device or its partition in udev's database; `None` if there is none.
#[must_use]
pub fn stored(number: u32, partition: Option<u32>) -> Option<ProbeResult> {
    let name =
        partition.map_or_else(|| format!("loop{number}"), |partition| format!("loop{number}p{partition}"));
    let device = udev::Device::from_subsystem_sysname("block".to_owned(), name).ok()?;
    device.is_initialized().then(|| found(&device))
}

/// The same if it was written since a time: microseconds of `CLOCK_REALTIME`.
#[must_use]
pub fn stored_since(number: u32, partition: Option<u32>, since: u64) -> Option<ProbeResult> {
    let (major, minor) = loop_device::device_number(number, partition)?;
    let written = std::fs::metadata(format!("/run/udev/data/b{major}:{minor}")).ok()?.modified().ok()?;
    let since = UNIX_EPOCH + Duration::from_micros(since);
    (written + CLOCK_TICK >= since).then(|| stored(number, partition)).flatten()
}

/// Whether udev accepts a connection to its control socket. The file of the socket stays when udev ends.
#[must_use]
pub fn answers() -> bool {
    let connect = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(CONTROL)?)
    };
    // EAGAIN: too many connections wait for udev to accept them.
    matches!(connect(), Ok(()) | Err(Errno::EAGAIN))
}

/// The nodes of all block devices with this UUID in udev's database.
///
/// # Errors
/// `Kernel` if sysfs cannot be read.
pub fn with_uuid(uuid: &str) -> Result<Vec<String>, Error> {
    nodes_with_uuid(uuid).map_err(|error| not_enumerated(uuid, error))
}

fn nodes_with_uuid(uuid: &str) -> std::io::Result<Vec<String>> {
    let mut enumerator = udev::Enumerator::new()?;
    enumerator.match_subsystem("block")?;
    enumerator.match_property("ID_FS_UUID", uuid)?;
    let node = |device: udev::Device| Some(device.devnode()?.to_string_lossy().into_owned());
    Ok(enumerator.scan_devices()?.filter_map(node).collect())
}

fn read(event: &udev::Event, from_udev: bool) -> Option<Notice> {
    let name = event.sysname().to_str()?;
    let disk_sequence = text(event.property_value("DISKSEQ")).parse().ok().map(DiskSequence);
    let removed = event.event_type() == udev::EventType::Remove;
    if let Some(number) = mapping_number(name) {
        // A mapping is added before it has a table. udev probes it at a change.
        let is_probed = from_udev && event.event_type() == udev::EventType::Change && is_ready(event);
        let file_system = is_probed.then(|| file_system(event));
        return Some(Notice::Mapping(Box::new(MappingEvent { number, removed, disk_sequence, file_system })));
    }
    let (number, partition) = numbers(name)?;
    Some(Notice::Uevent(Box::new(Uevent {
        number,
        partition,
        removed,
        disk_sequence,
        processed: from_udev.then(|| found(event)),
        resized: event.property_value("RESIZE").is_some(),
    })))
}

/// The number in `dm-0`.
fn mapping_number(name: &str) -> Option<u32> {
    name.strip_prefix("dm-")?.parse().ok()
}

/// Whether the rules of dmsetup let other rules act on a mapping: it has a table and is not suspended. Without those
/// rules, udev probes no mapping.
fn is_ready(mapping: &udev::Device) -> bool {
    mapping.property_value("DM_UDEV_DISABLE_OTHER_RULES_FLAG").is_none_or(|flag| flag != "1")
}

/// The file system on a mapping by udev's database; `None` if udev has not probed it.
#[must_use]
pub fn stored_mapping(number: u32) -> Option<FileSystem> {
    let device = udev::Device::from_subsystem_sysname("block".to_owned(), format!("dm-{number}")).ok()?;
    (device.is_initialized() && is_ready(&device)).then(|| file_system(&device))
}

/// The numbers in `loop0` and `loop0p1`.
fn numbers(name: &str) -> Option<(u32, Option<u32>)> {
    let numbers = name.strip_prefix("loop")?;
    match numbers.split_once('p') {
        Some((disk, partition)) => Some((disk.parse().ok()?, Some(partition.parse().ok()?))),
        None => Some((numbers.parse().ok()?, None)),
    }
}

fn found(device: &udev::Device) -> ProbeResult {
    let property = |name: &str| text(device.property_value(name));
    ProbeResult {
        file_system: file_system(device),
        entry: TableEntry {
            table: property("ID_PART_ENTRY_SCHEME"),
            kind: property("ID_PART_ENTRY_TYPE"),
            uuid: property("ID_PART_ENTRY_UUID"),
            label: unescape(&property("ID_PART_ENTRY_NAME")),
        },
        // In sectors of 512 bytes with any block size.
        start: property("ID_PART_ENTRY_OFFSET")
            .parse::<u64>()
            .ok()
            .and_then(|sectors| sectors.checked_mul(512)),
        has_table: device.property_value("ID_PART_TABLE_TYPE").is_some(),
    }
}

/// `63-untrusted-loop.rules` moves the type to a property of loopd if udev must not act on it.
fn file_system(device: &udev::Device) -> FileSystem {
    let property = |name: &str| text(device.property_value(name));
    FileSystem {
        usage: property("ID_FS_USAGE"),
        kind: text(device.property_value("LOOPD_FS_TYPE").or_else(|| device.property_value("ID_FS_TYPE"))),
        version: property("ID_FS_VERSION"),
        label: unescape(&property("ID_FS_LABEL_ENC")),
        uuid: property("ID_FS_UUID"),
    }
}

fn text(value: Option<&OsStr>) -> String {
    value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Decodes udev's `\xNN` (`encode_devnode_name` of systemd) to the label on the disk.
fn unescape(encoded: &str) -> String {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.strip_prefix(b"x").and_then(|hex| hex.get(..2));
        let hex = hex.filter(|hex| *first == b'\\' && hex.iter().all(u8::is_ascii_hexdigit));
        match hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::{mapping_number, numbers, unescape};

    #[test]
    fn names_of_disks_and_partitions_are_parsed() {
        assert_eq!(numbers("loop12"), Some((12, None)));
        assert_eq!(numbers("loop12p3"), Some((12, Some(3))));
        assert_eq!(numbers("loopp"), None);
        assert_eq!(numbers("sda1"), None);
        assert_eq!((numbers("dm-1"), mapping_number("dm-1")), (None, Some(1)));
        assert_eq!((mapping_number("loop1"), mapping_number("dm-")), (None, None));
    }

    #[test]
    fn labels_are_decoded() {
        assert_eq!(unescape("my\\x20disk"), "my disk");
        assert_eq!(unescape("a\\x5cb\\x2fc"), "a\\b/c");
        // A label of FAT in another code page than UTF-8.
        assert_eq!(unescape("caf\\x82"), "caf\u{fffd}");
        assert_eq!(unescape("\\xzz\\x4"), "\\xzz\\x4");
        assert_eq!(unescape("\\x+1é"), "\\x+1é");
    }
}
