//! Linux: the loop driver, sysfs, the mount table, udev. The only crate with unsafe code.

mod attach;
mod backing_file;
mod bind;
mod change;
mod descriptor_store;
mod detach;
mod device;
mod difference;
mod direct_io;
mod error;
mod findings;
mod hold;
mod ioctl;
mod linux;
mod memory;
pub mod mounts;
mod node_watch;
mod numbers;
mod overlapping;
mod partition_table;
mod partitions;
mod readiness;
mod release;
mod replace;
mod shared;
mod sysfs;
#[cfg(test)]
mod test_descriptors;
pub mod udev;
mod udisks;
mod untrusted;
mod users;
mod wait;

pub use backing_file::{Examined, examine as examine_file};
pub use descriptor_store::DescriptorStore;
pub use linux::Linux;
pub use memory::return_free_pages;
pub use untrusted::Untrusted;
