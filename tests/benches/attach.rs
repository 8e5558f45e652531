//! The duration of an attach: plain ioctls, udev, loopd, losetup and UDisks2, interleaved in one run on the
//! same file with udevd running. `make bench` runs it in release mode as root.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use linux_raw_sys::loop_device::LO_FLAGS_PARTSCAN;
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, Lifetime};
use loopd_tests::bus::Bus;
use loopd_tests::daemon::Daemon;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Polkit, Setup};
use loopd_tests::process::{PATIENCE, Process, eventually, installed, tied};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::table::Gpt;
use loopd_tests::{host, loop_ioctl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zbus::Connection;
use zbus::wire::OwnedObjectPath;

/// Without `--bench`, as in `cargo test --benches`, a few rounds show that it works.
const ROUNDS: usize = 200;
const UDISKS: &str = "org.freedesktop.UDisks2";

fn main() -> ExitCode {
    if let Some(why) = host::unfit() {
        println!("SKIPPED the benchmark: {why}");
        return ExitCode::SUCCESS;
    }
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 3 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(bench(rounds));
    drop(runtime);
    host::stop();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One way to attach a file.
enum Way {
    /// open, LOOP_CTL_GET_FREE, LOOP_CONFIGURE, close.
    Ioctls(File),
    /// The same, and until udev has processed this disk sequence.
    IoctlsAndUdev(File, udev::MonitorSocket),
    /// `SetupLoop` over an existing connection.
    Loopd { manager: Manager, wait: bool },
    /// A whole losetup process.
    Losetup,
    /// `SetupLoop` of an image with two partitions, until udev has processed them.
    LoopdPartitions(Manager),
    /// A whole losetup process on the same image, and a whole `udevadm settle` after it.
    LosetupPartitions,
    /// `LoopSetup` over an existing connection.
    Udisks { connection: Connection, _process: Process },
}

/// The images to attach.
struct Images {
    /// A file system.
    plain: Image,
    /// Two partitions.
    partitioned: Image,
}

/// How to undo it.
enum Detach {
    Ioctl,
    Loopd,
    Udisks(OwnedObjectPath),
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Self::Ioctls(_) => "ioctls",
            Self::IoctlsAndUdev(..) => "ioctls + udev",
            Self::Loopd { wait: false, .. } => "SetupLoop wait=false",
            Self::Loopd { wait: true, .. } => "SetupLoop wait=true",
            Self::Losetup => "losetup -f --show",
            Self::LoopdPartitions(_) => "SetupLoop, 2 partitions",
            Self::LosetupPartitions => "losetup -fP + settle",
            Self::Udisks { .. } => "UDisks2 LoopSetup",
        }
    }

    /// Attaches its image, detaches it, and gives how long each took.
    async fn round(&self, images: &Images) -> Result<(Duration, Duration)> {
        let image = match self {
            Self::LoopdPartitions(_) | Self::LosetupPartitions => &images.partitioned.path,
            _ => &images.plain.path,
        };
        if let Self::IoctlsAndUdev(_, socket) = self {
            // Work left by earlier rounds.
            socket.iter().for_each(drop);
        }
        let start = Instant::now();
        let (device, how) = self.attach(image).await?;
        let attached = start.elapsed();
        ensure!(device.bound(), "{}: {} is not attached", self.name(), device.node());
        // Work of this round must not affect the next measurement.
        loopd_tests::udev::settle().await?;
        let start = Instant::now();
        self.detach(device, how).await?;
        let detached = start.elapsed();
        eventually("the device is free", async || Ok(!device.bound())).await?;
        loopd_tests::udev::settle().await?;
        Ok((attached, detached))
    }

    async fn attach(&self, image: &Path) -> Result<(LoopDevice, Detach)> {
        match self {
            Self::Ioctls(control) => Ok((bare(control, image)?, Detach::Ioctl)),
            Self::IoctlsAndUdev(control, socket) => {
                let device = bare(control, image)?;
                until_processed(socket, device.number("diskseq")?)?;
                Ok((device, Detach::Ioctl))
            }
            Self::Loopd { manager, wait } => {
                let file = open(image)?;
                let lifetime = Lifetime::Persistent;
                let options = AttachOptions { wait: *wait, lifetime, ..AttachOptions::default() };
                let (_, node) = manager.setup_loop(file.as_fd(), &options).await?;
                Ok((LoopDevice::from_node(&node)?, Detach::Loopd))
            }
            Self::Losetup => Ok((losetup("-f", image)?, Detach::Ioctl)),
            Self::LoopdPartitions(manager) => {
                let file = open(image)?;
                let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
                let (_, node) = manager.setup_loop(file.as_fd(), &options).await?;
                let device = LoopDevice::from_node(&node)?;
                ensure!(device.partitions().len() == 2, "{node} has no two partitions");
                Ok((device, Detach::Loopd))
            }
            Self::LosetupPartitions => {
                let device = losetup("-fP", image)?;
                Command::new("udevadm").arg("settle").status()?;
                Ok((device, Detach::Ioctl))
            }
            Self::Udisks { connection, .. } => {
                let file = open(image)?;
                let body = (zbus::Fd::from(file.as_fd()), no_options());
                let path = "/org/freedesktop/UDisks2/Manager";
                let interface = "org.freedesktop.UDisks2.Manager";
                let reply =
                    connection.call_method(Some(UDISKS), path, Some(interface), "LoopSetup", &body).await?;
                let object: OwnedObjectPath = reply.body().deserialize()?;
                let name = object.as_str().rsplit('/').next().unwrap_or_default();
                Ok((LoopDevice::from_node(&format!("/dev/{name}"))?, Detach::Udisks(object)))
            }
        }
    }

    async fn detach(&self, device: LoopDevice, how: Detach) -> Result<()> {
        match (self, how) {
            (Self::Loopd { manager, .. } | Self::LoopdPartitions(manager), Detach::Loopd) => {
                Ok(manager.detach(&device.node(), DetachOptions::default()).await?)
            }
            (Self::Udisks { connection, .. }, Detach::Udisks(object)) => {
                let interface = "org.freedesktop.UDisks2.Loop";
                connection
                    .call_method(Some(UDISKS), object.as_ref(), Some(interface), "Delete", &(no_options(),))
                    .await?;
                Ok(())
            }
            _ => Ok(loop_ioctl::clear(&File::open(device.node())?)?),
        }
    }
}

fn no_options() -> std::collections::HashMap<&'static str, zbus::Variant<'static>> {
    std::collections::HashMap::new()
}

fn open(path: impl AsRef<Path>) -> Result<File> {
    Ok(File::options().read(true).write(true).open(path)?)
}

fn losetup(how: &str, image: &Path) -> Result<LoopDevice> {
    let output = Command::new("losetup").args([how, "--show"]).arg(image).output()?;
    LoopDevice::from_node(String::from_utf8(output.stdout)?.trim_end())
}

fn bare(control: &File, image: &Path) -> Result<LoopDevice> {
    let file = open(image)?;
    loop {
        let device = loop_ioctl::get_free(control)?;
        let node = open(device.node())?;
        match loop_ioctl::configure(&node, &file, LO_FLAGS_PARTSCAN as u32) {
            // Another program has taken the device.
            Err(nix::Error::EBUSY) => {}
            configured => return configured.map(|()| device).map_err(Into::into),
        }
    }
}

/// Reads udev's events until it has processed this disk sequence.
fn until_processed(socket: &udev::MonitorSocket, sequence: u64) -> Result<()> {
    let start = Instant::now();
    let sequence = sequence.to_string();
    while start.elapsed() < PATIENCE {
        let mut event = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut event, PollTimeout::from(100u8))?;
        if socket.iter().any(|event| event.property_value("DISKSEQ").is_some_and(|value| *value == *sequence))
        {
            return Ok(());
        }
    }
    bail!("udev does not tell of disk sequence {sequence}")
}

async fn bench(rounds: usize) -> Result<()> {
    let directory = host::get()?.new_directory()?;
    let directory = directory.path();
    let uuid = "11111111-2222-3333-4444-000000000010";
    let images = Images {
        plain: Image::ext4_sized(directory, "image", "bench", uuid, 64 * MIB).await?,
        partitioned: Image::sparse(directory, "partitioned", 64 * MIB)?,
    };
    Gpt::new(&[(2048, 43007), (43008, 131_000)]).write(&images.partitioned)?;
    let bus = Bus::start(directory)?;
    // In memory, like /run.
    let state = tempfile::tempdir_in("/dev/shm")?;
    let environment = [("LOOPD_LOG", "info"), ("RUNTIME_DIRECTORY", state.path().to_str().context("UTF-8")?)];
    let daemon = Daemon::start(&bus, directory, &[], &environment).await?;
    let connection = bus.connect().await?;
    let manager = Manager::new(&connection, Interaction::Forbidden).await?;
    manager.version().await?;
    let memory = Memory::of(daemon.pid())?;

    let mut ways = vec![
        Way::Ioctls(loop_ioctl::control()?),
        Way::IoctlsAndUdev(
            loop_ioctl::control()?,
            udev::MonitorBuilder::new()?.match_subsystem("block")?.listen()?,
        ),
        Way::Loopd { manager: manager.clone(), wait: false },
        Way::Loopd { manager: manager.clone(), wait: true },
        Way::Losetup,
        Way::LoopdPartitions(manager),
        Way::LosetupPartitions,
    ];
    let mut polkit = Polkit::None;
    match udisks(&bus, directory, &mut polkit).await {
        Ok(way) => ways.push(way),
        Err(why) => println!("SKIPPED UDisks2: {why:#}"),
    }
    if !installed("losetup") {
        println!("SKIPPED losetup: it is not installed");
        ways.retain(|way| !matches!(way, Way::Losetup | Way::LosetupPartitions));
    }

    let mut times = vec![(Vec::new(), Vec::new()); ways.len()];
    for _ in 0..rounds {
        for (way, (attached, detached)) in ways.iter().zip(&mut times) {
            let (attach, detach) = way.round(&images).await.with_context(|| way.name())?;
            attached.push(attach);
            detached.push(detach);
        }
    }

    println!("{rounds} rounds, 64 MiB, ext4 or two partitions, read-write; milliseconds\n");
    println!("{:<24}{:>10}{:>10}{:>16}{:>10}", "", "attach", "p95", "detach", "p95");
    for (way, (attached, detached)) in ways.iter().zip(&mut times) {
        attached.sort_unstable();
        detached.sort_unstable();
        let [a, a95] = [50, 95].map(|percent| percentile(attached, percent));
        let [d, d95] = [50, 95].map(|percent| percentile(detached, percent));
        println!("{:<24}{a:>10.2}{a95:>10.2}{d:>16.2}{d95:>10.2}", way.name());
    }
    let after = Memory::of(daemon.pid())?;
    println!("\nloopd's memory: {memory} idle, {after} after the rounds\n");

    let median = |index: usize| percentile(&times[index].0, 50);
    let (ioctls, and_udev, fast, waited) = (median(0), median(1), median(2), median(3));
    target("SetupLoop wait=false <= ioctls + 1 ms", fast, ioctls + 1.0, "ms");
    target("SetupLoop wait=true <= 1.25 * (ioctls + udev)", waited, 1.25 * and_udev, "ms");
    target("loopd's resident memory, idle", memory.resident, 5.0, "MB");
    Ok(())
}

/// Of sorted times, in milliseconds.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    let index = (times.len() * percent / 100).min(times.len() - 1);
    times[index].as_secs_f64() * 1000.0
}

fn target(name: &str, found: f64, limit: f64, unit: &str) {
    let verdict = if found <= limit { "met" } else { "MISSED" };
    println!("{verdict:<8}{name}: {found:.2} {unit} of {limit:.2} {unit}");
}

/// The memory of a process, in MB.
struct Memory {
    resident: f64,
    proportional: f64,
}

impl Memory {
    fn of(process: nix::unistd::Pid) -> Result<Self> {
        let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let field = |name: &str| -> Result<f64> {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
            Ok(kibibytes * 1024.0 / 1e6)
        };
        Ok(Self { resident: field("Rss:")?, proportional: field("Pss:")? })
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RSS {:.1} MB, PSS {:.1} MB", self.resident, self.proportional)
    }
}

/// UDisks2 on the same bus, if it is installed. It needs a real polkit.
async fn udisks(bus: &Bus, directory: &Path, polkit: &mut Polkit) -> Result<Way> {
    let programs = ["/usr/libexec/udisks2/udisksd", "/usr/lib/udisks2/udisksd"].map(PathBuf::from);
    let program = programs.into_iter().find(|path| path.exists()).context("it is not installed")?;
    *polkit = Polkit::start(Setup::Real, bus, directory).await?;
    let mut command = tied(program);
    command
        .env("DBUS_SYSTEM_BUS_ADDRESS", bus.address())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let process = Process::spawn("udisksd", &mut command)?;
    let connection = bus.connect().await?;
    let names = zbus::fdo::DBusProxy::new(&connection).await?;
    eventually("udisksd is on the bus", async || Ok(names.name_has_owner(UDISKS.try_into()?).await?)).await?;
    Ok(Way::Udisks { connection, _process: process })
}
