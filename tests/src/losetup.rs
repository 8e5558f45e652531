//! Loop devices of another program: util-linux's losetup.

use anyhow::Result;

use crate::image::Image;
use crate::process::{eventually, run};
use crate::sysfs::LoopDevice;

/// Attaches to a free device, with these arguments: options and the file.
///
/// # Errors
/// losetup's.
pub async fn attach(arguments: &[&str]) -> Result<LoopDevice> {
    let node = run("losetup", [&["-f", "--show"], arguments].concat()).await?;
    LoopDevice::from_node(node.trim_end())
}

/// Detaches, and waits until the device is free: udev may still have it open.
///
/// # Errors
/// losetup's, or the device is still in use.
pub async fn detach(device: LoopDevice) -> Result<()> {
    run("losetup", ["-d", &device.node()]).await?;
    eventually(&format!("{} is free", device.node()), async || Ok(!device.bound())).await
}

/// A device that losetup has attached; detached when dropped.
#[derive(Debug)]
pub struct Losetup {
    /// The device.
    pub device: LoopDevice,
}

impl Losetup {
    /// Attaches the image with these options.
    ///
    /// # Errors
    /// losetup's.
    pub async fn new(options: &[&str], image: &Image) -> Result<Self> {
        Ok(Self { device: attach(&[options, &[image.name()]].concat()).await? })
    }
}

impl Drop for Losetup {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("-d").arg(self.device.node()).status();
    }
}
