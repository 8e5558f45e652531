//! One way to attach an image and to detach it.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::proxy::Manager;
use loopd_dbus::{AttachOptions, DetachOptions};
use loopd_tests::image::Image;
use loopd_tests::process::PATIENCE;
use loopd_tests::sysfs::LoopDevice;
use zbus::wire::OwnedObjectPath;

use crate::commands::Commands;
use crate::ioctls::{self, Ioctls};
use crate::udisks::Udisks;
use crate::workspace::quiet;

/// The implementation of a side.
pub enum Way {
    /// The loop driver's ioctls.
    Ioctls(Ioctls),
    /// `SetupLoop` and `Detach` over one connection.
    Loopd { manager: Manager, waits: bool },
    /// A process for each.
    Commands(Commands),
    /// `LoopSetup` and `Delete` over one connection.
    Udisks(Udisks),
}

/// What is attached, and what its detach needs.
enum Attached {
    Device(LoopDevice),
    Ioctls(ioctls::Attached),
    Udisks(LoopDevice, OwnedObjectPath),
}

impl Attached {
    fn device(&self) -> LoopDevice {
        match self {
            Self::Device(device) | Self::Udisks(device, _) => *device,
            Self::Ioctls(attached) => attached.device,
        }
    }
}

/// How long an attach and a detach took.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Until the reply, the exit of the process, or udev's event.
    pub attach: Duration,
    /// Until the device is free.
    pub detach: Duration,
}

impl Way {
    /// Attaches the image, which must get this number of partitions if the way waits for udev, and detaches it.
    pub async fn round(&self, image: &Image, partitions: usize) -> Result<Round> {
        let events = match self {
            Self::Ioctls(ioctls) => ioctls.listen()?,
            _ => None,
        };
        let start = Instant::now();
        let attached = match self {
            Self::Ioctls(ioctls) => Attached::Ioctls(ioctls.attach(image, events.as_ref())?),
            Self::Loopd { manager, waits } => {
                Attached::Device(setup_loop(manager, &image.open()?, *waits).await?)
            }
            Self::Commands(commands) => Attached::Device(commands.attach(image)?),
            Self::Udisks(udisks) => {
                let (device, object) = udisks.attach(image).await?;
                Attached::Udisks(device, object)
            }
        };
        let attach = start.elapsed();
        let device = attached.device();
        ensure!(device.bound(), "{} is not attached", device.node());
        let found = device.partitions().len();
        ensure!(partitions == 0 || found == partitions, "{found} partitions instead of {partitions}");
        // udev's work must not be part of the next figure.
        quiet().await?;
        let start = Instant::now();
        self.detach(attached).await?;
        until_free(device)?;
        let detach = start.elapsed();
        quiet().await?;
        Ok(Round { attach, detach })
    }

    async fn detach(&self, attached: Attached) -> Result<()> {
        match (self, attached) {
            (Self::Loopd { manager, .. }, Attached::Device(device)) => {
                Ok(manager.detach(&device.node(), DetachOptions::default()).await?)
            }
            (Self::Commands(commands), Attached::Device(device)) => commands.detach(device),
            (Self::Udisks(udisks), Attached::Udisks(_, object)) => udisks.detach(&object).await,
            (_, attached) => ioctls::clear(attached.device()),
        }
    }
}

/// `SetupLoop` with the default options, apart from `wait`.
pub async fn setup_loop(manager: &Manager, file: &File, waits: bool) -> Result<LoopDevice> {
    let options = AttachOptions { wait: waits, ..AttachOptions::default() };
    let (_, node) = manager.setup_loop(file.as_fd(), &options).await.context("SetupLoop")?;
    LoopDevice::from_node(&node)
}

/// Waits until nothing is attached to the device.
pub fn until_free(device: LoopDevice) -> Result<()> {
    let start = Instant::now();
    while device.bound() {
        ensure!(start.elapsed() < 6 * PATIENCE, "{} is still attached", device.node());
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}
