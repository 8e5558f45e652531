//! The floor: the loop driver's ioctls without a daemon.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Result, bail};
use linux_raw_sys::loop_device::LO_FLAGS_PARTSCAN;
use loopd_tests::image::Image;
use loopd_tests::loop_ioctl;
use loopd_tests::process::PATIENCE;
use loopd_tests::sysfs::{Extents, LoopDevice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use udev::MonitorSocket;

/// How to attach.
pub struct Ioctls {
    control: File,
    /// Whether to wait for udev.
    waits: bool,
    /// What to add because the kernel does not read the partition table.
    partitions: Extents,
}

/// An attached device.
pub struct Attached {
    pub device: LoopDevice,
    /// A writable descriptor. If it were closed before udev has processed the device, udev would remove the
    /// partitions that the kernel has not found itself.
    _writer: Option<File>,
}

impl Ioctls {
    /// Without waiting, or until udev has processed the device.
    pub fn new(waits: bool) -> Result<Self> {
        Ok(Self { control: loop_ioctl::control()?, waits, partitions: Extents::new() })
    }

    /// Until udev has processed the device and these partitions.
    pub fn with_partitions(partitions: Extents) -> Result<Self> {
        Ok(Self { control: loop_ioctl::control()?, waits: true, partitions })
    }

    /// Listens to udev if the attach waits for it. A new socket has no events of earlier rounds.
    pub fn listen(&self) -> Result<Option<MonitorSocket>> {
        if !self.waits {
            return Ok(None);
        }
        Ok(Some(udev::MonitorBuilder::new()?.match_subsystem("block")?.listen()?))
    }

    /// Attaches the file.
    pub fn attach(&self, image: &Image, events: Option<&MonitorSocket>) -> Result<Attached> {
        let (device, writer) = configure(&self.control, &image.open()?)?;
        for (&number, &place) in &self.partitions {
            loop_ioctl::add_partition(&writer, number, place)?;
        }
        // losetup closes it at once.
        let writer = if self.partitions.is_empty() { None } else { Some(writer) };
        if let Some(events) = events {
            let numbers = self.partitions.keys().copied().collect();
            until_processed(events, device.number("diskseq")?, numbers)?;
        }
        Ok(Attached { device, _writer: writer })
    }
}

/// Attaches the file to a free device; returns the writable descriptor that was needed for it.
pub fn configure(control: &File, file: &File) -> Result<(LoopDevice, File)> {
    loop {
        let device = loop_ioctl::get_free(control)?;
        let node = File::options().read(true).write(true).open(device.node())?;
        match loop_ioctl::configure(&node, file, LO_FLAGS_PARTSCAN as u32) {
            // Another program has taken the device.
            Err(nix::Error::EBUSY) => {}
            configured => return Ok(configured.map(|()| (device, node))?),
        }
    }
}

/// `LOOP_CLR_FD`. The device is free when its last descriptor is closed.
pub fn clear(device: LoopDevice) -> Result<()> {
    Ok(loop_ioctl::clear(&File::open(device.node())?)?)
}

/// Reads udev's events until it has processed this disk sequence, and each of these partitions.
fn until_processed(events: &MonitorSocket, sequence: u64, mut partitions: BTreeSet<u32>) -> Result<()> {
    let start = Instant::now();
    let sequence = sequence.to_string();
    let mut is_disk_missing = true;
    while start.elapsed() < 3 * PATIENCE {
        let mut ready = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::from(100u8))?;
        for event in events.iter() {
            if event.property_value("DISKSEQ").is_none_or(|value| *value != *sequence) {
                continue;
            }
            match event.property_value("PARTN").and_then(|number| number.to_str()?.parse().ok()) {
                Some(number) => drop(partitions.remove(&number)),
                None => is_disk_missing = false,
            }
        }
        if !is_disk_missing && partitions.is_empty() {
            return Ok(());
        }
    }
    bail!("udev has not processed disk sequence {sequence}, partitions {partitions:?}")
}
