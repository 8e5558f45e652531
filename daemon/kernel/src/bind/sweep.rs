//! Deletes partitions that an earlier attach has left on a free number.

use loopd_engine::kernel::node;
use nix::fcntl::OFlag;
use tracing::warn;

use crate::sysfs::loop_device;
use crate::{device, ioctl};

/// Deletes the partitions; false if some are left.
pub fn sweep(number: u32) -> bool {
    let Ok(left) = loop_device::partitions(number) else { return false };
    if left.is_empty() {
        return true;
    }
    let Ok(disk) = device::open(number, OFlag::O_RDONLY) else { return false };
    left.iter().all(|partition| {
        warn!(
            device = node(number),
            partition = partition.number,
            "deleting a partition that an earlier attach has left"
        );
        ioctl::delete_partition(&disk, partition.number).is_ok()
    })
}
