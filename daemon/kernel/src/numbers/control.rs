//! `/dev/loop-control`: finds, adds and removes loop devices.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use loopd_engine::Error;
use loopd_engine::kernel::node;
use nix::errno::Errno;

use crate::sysfs::loop_device;
use crate::{ioctl, wait};

const PATH: &str = "/dev/loop-control";

fn not_opened(error: &std::io::Error) -> Error {
    let reason = format!("{error}; is the loop module loaded (modprobe loop), and is loopd run as root?");
    Error::NotSupported { operation: format!("open {PATH}"), reason }
}

fn no_device(action: &str, step: &str, errno: Errno) -> Error {
    let reason = format!(
        "the kernel did not {step} ({errno:?}, {}); detach a device that is not needed",
        errno.desc()
    );
    Error::NoFreeDevice { operation: action.to_owned(), reason }
}

/// An open `/dev/loop-control`. `action` in its methods completes "cannot" in messages.
pub struct Control(OwnedFd);

impl Control {
    /// Opens it, which loads the loop module if there is one.
    ///
    /// # Errors
    /// `NotSupported` if the kernel has no loop driver.
    pub fn open() -> Result<Self, Error> {
        let control =
            File::options().read(true).write(true).open(PATH).map_err(|error| not_opened(&error))?;
        Ok(Self(control.into()))
    }

    /// A number that nothing is attached to at this moment.
    pub fn free_number(&self, action: &str) -> Result<u32, Error> {
        ioctl::free_number(&self.0).map_err(|errno| no_device(action, "find a free loop device", errno))
    }

    /// Adds the device unless it exists; true if it was added.
    pub fn ensure_exists(&self, number: u32, action: &str) -> Result<bool, Error> {
        if loop_device::exists(number) {
            return Ok(false);
        }
        match ioctl::add(&self.0, number) {
            Ok(_) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(no_device(action, &format!("add {}", node(number)), errno)),
        }
    }

    /// Removes the device. Waits a bounded time for another process that has it open, such as udev. Takes
    /// some 50 ms.
    pub fn remove(&self, number: u32) -> nix::Result<()> {
        let remove = || ioctl::remove(&self.0, number);
        wait::while_busy(Path::new(&node(number)), remove, || !loop_device::is_bound(number))
    }
}
