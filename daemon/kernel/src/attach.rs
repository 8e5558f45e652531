//! Attaches a file.

use std::os::fd::OwnedFd;

use loopd_engine::AttachRequest;
use loopd_engine::Error;
use loopd_engine::kernel::{Device, FileEnd, Partitioning};

use crate::bind::bind;
use crate::findings;
use crate::hold::Hold;
use crate::numbers::Claim;
use crate::partitions;
use crate::shared::Shared;

/// A device that was attached.
pub struct Attached {
    pub device: Device,
    /// `None` for a persistent device.
    pub hold: Option<Hold>,
    pub partitioning: Partitioning,
    pub file_end: FileEnd,
    pub claim: Claim,
}

/// Attaches the file, reads its partition table, finds what is unusual and stores a copy of the hold.
pub fn attach(shared: &Shared, file: &OwnedFd, request: &AttachRequest) -> Result<Attached, Error> {
    let bound = bind(shared, file, request)?;
    let partitioning = partitions::of_new_attach(shared, file, &bound.device, request.partition_scan);
    let file_end = findings::file_end(file, bound.file_size, request.offset, request.size_limit);
    if let Some(hold) = &bound.hold {
        hold.store(&*shared.fd_store);
    }
    if let Some(writer) = bound.writer {
        writer.close();
    }
    Ok(Attached { device: bound.device, hold: bound.hold, partitioning, file_end, claim: bound.claim })
}
