//! Linux: the loop driver, sysfs, the mount table, udev. The only crate with unsafe code.

mod backing_file;
mod bytes;
mod change;
mod descriptor_store;
mod exclusive;
mod inotify;
mod ioctl;
mod linux;
pub mod mounts;
mod multi_device;
mod node_watch;
mod overlapping;
mod partitions;
mod readiness;
mod sysfs;
pub mod udev;
mod udisks;
mod untrusted;

pub use descriptor_store::DescriptorStore;
pub use linux::Linux;
pub use untrusted::Untrusted;
