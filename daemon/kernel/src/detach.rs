//! Detaches a device.

use loopd_engine::Error;
use loopd_engine::kernel::{DiskSequence, node};
use nix::errno::Errno;

use crate::error::failed;
use crate::{device, ioctl};

fn not_detached(number: u32, errno: Errno) -> Error {
    failed(format!("detach {}", node(number)), "LOOP_CLR_FD", errno)
}

/// Detaches the device now, or at its last close. Does nothing if this attach has ended.
pub fn clear(number: u32, disk_sequence: DiskSequence) -> Result<(), Error> {
    let Some(device) = device::open_attached(number, disk_sequence)? else { return Ok(()) };
    match ioctl::clear(&device) {
        Ok(()) | Err(Errno::ENXIO) => Ok(()),
        Err(errno) => Err(not_detached(number, errno)),
    }
}
