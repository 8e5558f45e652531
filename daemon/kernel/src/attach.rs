//! Attaches a file.

use std::os::fd::OwnedFd;

use loopd_engine::kernel::{Attached, Kernel};
use loopd_engine::{AttachRequest, Error};

use crate::bind::bind;
use crate::findings;
use crate::hold::Hold;
use crate::numbers::Claim;
use crate::partitions;
use crate::shared::Shared;

/// Attaches the file, reads its partition table, collects the findings and stores a copy of the hold.
///
/// # Errors
/// Nothing is attached then.
pub fn attach<K>(shared: &Shared, file: &OwnedFd, request: &AttachRequest) -> Result<Attached<K>, Error>
where
    K: Kernel<Hold = Hold, Claim = Claim>,
{
    let bound = bind(shared, file, request)?;
    let partitioning = partitions::of_new_attach(shared, file, &bound.device, request.partition_scan);
    let file_end = findings::file_end(file, bound.file_size, request.offset, request.size_limit);
    if let Some(hold) = &bound.hold {
        hold.store(&*shared.fd_store);
    }
    if let Some(writer) = bound.writer {
        writer.close();
    }
    let node_made = bound.claim.node_made();
    let (device, hold, claim) = (bound.device, bound.hold, bound.claim);
    Ok(Attached { device, hold, partitioning, file_end, claim, node_made })
}
