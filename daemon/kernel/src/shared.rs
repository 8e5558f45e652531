//! The state that all operations share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::descriptor_store::DescriptorStore;
use crate::node_watch::NodeWatches;
use crate::numbers::Numbers;
use crate::untrusted::Untrusted;

/// The state of this process.
pub struct Shared {
    pub numbers: Arc<Numbers>,
    pub fd_store: Box<dyn DescriptorStore>,
    pub untrusted: Untrusted,
    pub node_watches: NodeWatches,
    /// Whether the kernel reads partition tables, once that is known.
    pub kernel_scans: OnceLock<bool>,
    largest_block: AtomicU32,
}

impl Shared {
    /// The state at the start: the abilities of the kernel are not known yet.
    pub fn new(numbers: Numbers, fd_store: Box<dyn DescriptorStore>, untrusted: Untrusted) -> Self {
        Self {
            numbers: Arc::new(numbers),
            fd_store,
            untrusted,
            node_watches: NodeWatches::new(),
            kernel_scans: OnceLock::new(),
            largest_block: AtomicU32::new(65536),
        }
    }

    /// The largest block size in bytes that this kernel has not refused.
    pub fn largest_block(&self) -> u32 {
        self.largest_block.load(Ordering::Relaxed)
    }

    /// Remembers a block size that the kernel has refused, and returns the largest one that is left.
    pub fn refuse_block(&self, block_size: u32) -> u32 {
        self.largest_block.fetch_min(block_size / 2, Ordering::Relaxed).min(block_size / 2)
    }
}
