//! Files on a simulated machine.

use crate::kernel::{FileEnd, FileFacts, FileIdentity, FileKind, Findings};

/// A file that can be attached on a simulated machine.
#[derive(Clone, Debug)]
pub struct SimulatedFile {
    /// What examining it finds.
    pub facts: FileFacts,
    /// Its size in bytes; 0 if the test does not depend on it.
    pub size: u64,
    /// What is found in it.
    pub findings: Findings,
}

impl SimulatedFile {
    /// The part from an offset up to a size limit, in bytes; 0 is no limit.
    pub(super) fn part(&self, offset: u64, size_limit: u64) -> u64 {
        let rest = self.size.saturating_sub(offset);
        if size_limit == 0 { rest } else { rest.min(size_limit) }
    }

    /// Its end, if it is attached with this offset and size limit.
    pub(super) fn end(&self, offset: u64, size_limit: u64) -> FileEnd {
        FileEnd { bytes: self.part(offset, size_limit), format: None }
    }
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
        Self { facts, size: 0, findings: Findings::default() }
    }
}
