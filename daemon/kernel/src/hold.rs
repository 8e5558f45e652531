//! A read-only descriptor of a loop device, which keeps an autoclear device attached, or of a mapping, which keeps one
//! that is closed with its last user.

use std::os::fd::{AsFd as _, OwnedFd};

use loopd_engine::kernel::DiskSequence;
use loopd_engine::{Error, Mapping};

use crate::descriptor_store::DescriptorStore;
use crate::device;

/// The descriptor. The descriptor store has a copy of it.
pub struct Hold {
    descriptor: OwnedFd,
    disk_sequence: DiskSequence,
}

impl Hold {
    /// Holds an open device.
    pub fn new(descriptor: OwnedFd, disk_sequence: DiskSequence) -> Self {
        Self { descriptor, disk_sequence }
    }

    /// Opens the device; `None` if this attach has ended.
    pub fn open(number: u32, disk_sequence: DiskSequence) -> Result<Option<Self>, Error> {
        let descriptor = device::open_attached(number, disk_sequence)?;
        Ok(descriptor.map(|descriptor| Self { descriptor, disk_sequence }))
    }

    /// Opens a mapping; `None` if it is gone.
    pub fn open_mapping(mapping: &Mapping) -> Result<Option<Self>, Error> {
        let descriptor = device::open_mapping(mapping)?;
        Ok(descriptor.map(|descriptor| Self { descriptor, disk_sequence: mapping.disk_sequence }))
    }

    /// The disk sequence of the device.
    pub fn disk_sequence(&self) -> DiskSequence {
        self.disk_sequence
    }

    /// Puts a copy into the descriptor store.
    pub fn store(&self, store: &dyn DescriptorStore) {
        store.deposit(self.disk_sequence, self.descriptor.as_fd());
    }
}
