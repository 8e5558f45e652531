//! What sysfs shows of block devices. None of these reads can block on a backing file.

mod block;
pub mod loop_device;
mod mapping;
mod multi_device;

pub use block::{Block, DeviceNumber};
pub use mapping::cleartexts;
pub use multi_device::{MultiDevice, mounted_btrfs};
