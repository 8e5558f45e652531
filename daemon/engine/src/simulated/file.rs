//! Files on a simulated machine.

use crate::kernel::{FileFacts, FileIdentity, FileKind};

/// A file that can be attached on a simulated machine.
#[derive(Clone, Debug)]
pub struct SimulatedFile {
    /// What examining it finds.
    pub facts: FileFacts,
    /// Its size in bytes; 0 if the test does not depend on it.
    pub size: u64,
}

impl From<u64> for SimulatedFile {
    /// A file without a path, to which any user can write, with this inode number.
    fn from(inode: u64) -> Self {
        let facts = FileFacts {
            kind: FileKind::Regular,
            path: Vec::new(),
            identity: FileIdentity { device: 0, inode },
            writable: true,
            appends: false,
            only_root_writes: false,
        };
        Self { facts, size: 0 }
    }
}
