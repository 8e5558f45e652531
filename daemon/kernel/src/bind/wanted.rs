//! The file to attach, and the request for it.

use std::os::fd::OwnedFd;

use loopd_engine::AttachRequest;

use crate::backing_file::Examined;

/// A file and the request for it.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub file: &'a OwnedFd,
    pub examined: &'a Examined,
    /// Its block size is set.
    pub request: &'a AttachRequest,
    /// Whether to bypass the page cache of the file.
    pub direct_io: bool,
}

impl Wanted<'_> {
    /// The path for messages.
    pub fn name(&self) -> String {
        self.examined.name()
    }
}
