//! Chooses a number and attaches the file to it. After an error the number is released.

use std::os::fd::OwnedFd;

use loopd_engine::kernel::Device;
use loopd_engine::{AttachRequest, Error};
use nix::errno::Errno;
use tracing::warn;

use super::configure::{Configured, Writer, configure};
use super::refusal::{
    closed_to_us, is_closed_to_us, is_node_missing, node_missing, refusal, refuse_block_size, set_read_only,
};
use super::sweep::sweep;
use super::wanted::Wanted;
use crate::backing_file::{self, Examined};
use crate::error::is_gone;
use crate::hold::Hold;
use crate::numbers::Claim;
use crate::shared::Shared;
use crate::untrusted::{Expected, unmarked};
use crate::{detach, device, direct_io, partition_table};

/// How many numbers are tried that another process takes first.
const ATTEMPTS: usize = 64;
/// How many numbers are tried whose nodes are missing.
const ATTEMPTS_WITHOUT_NODE: usize = 4;
/// The block size if neither the request nor the partition table needs another.
const SECTOR: u32 = 512;

fn none_free(name: &str) -> Error {
    Error::NoFreeDevice {
        operation: format!("attach {name}"),
        reason: format!("{ATTEMPTS} free loop devices in a row were taken by other programs; try again"),
    }
}

/// A device that a file was attached to.
pub struct Bound<'a> {
    pub device: Device,
    /// Bytes of the file before the attach; `None` for a block device.
    pub file_size: Option<u64>,
    /// `None` for a persistent device.
    pub hold: Option<Hold>,
    pub claim: Claim,
    /// `None` for a read-only device.
    pub writer: Option<Writer<'a>>,
}

/// The end of an attempt with one number.
enum Attempt<'a> {
    Bound(Box<Bound<'a>>),
    /// Another process has taken the number.
    Taken(Claim),
    /// `/dev` lacks the node.
    NodeMissing(Claim),
}

/// Attaches the file. After an error nothing is attached, and no device is left that was not there before.
pub fn bind<'a>(shared: &'a Shared, file: &OwnedFd, request: &AttachRequest) -> Result<Bound<'a>, Error> {
    let examined = &backing_file::examine(file)?;
    backing_file::check_fit(examined, request)?;
    let block_size = match request.block_size {
        0 => choose_block_size(file, examined, request),
        wanted => wanted,
    };
    let request = &AttachRequest { block_size, ..request.clone() };
    let direct_io = request.direct_io.unwrap_or_else(|| direct_io::is_better(file, examined, request));
    let wanted = Wanted { file, examined, request, direct_io };
    refuse_block_size(shared, wanted)?;
    // Numbers that cannot be used stay claimed until the end, so that none is tried twice.
    let (mut taken, mut without_node) = (Vec::new(), Vec::new());
    let bound = loop {
        if taken.len() == ATTEMPTS {
            break Err(none_free(&wanted.name()));
        }
        let claim = match shared.numbers.claim(request.number, &wanted.name()) {
            Ok(claim) => claim,
            Err(error) => break Err(error),
        };
        match bind_number(shared, claim, wanted) {
            Ok(Attempt::Bound(bound)) => break Ok(*bound),
            Ok(Attempt::Taken(claim)) => taken.push(claim),
            Ok(Attempt::NodeMissing(claim)) if without_node.len() == ATTEMPTS_WITHOUT_NODE => {
                let error = node_missing(&wanted.name(), claim.number());
                without_node.push(claim);
                break Err(error);
            }
            Ok(Attempt::NodeMissing(claim)) => without_node.push(claim),
            Err(error) => break Err(error),
        }
    };
    without_node.into_iter().for_each(Claim::give_up);
    bound
}

/// 512, or the sector size that the image's partition table was written for, or what direct I/O needs if that is more.
fn choose_block_size(file: &OwnedFd, examined: &Examined, request: &AttachRequest) -> u32 {
    let shown = examined.size.map(|size| match request.size_limit {
        0 => size - request.offset,
        limit => limit.min(size - request.offset),
    });
    let of_table = shown.and_then(|size| partition_table::sector_size(file, request.offset, size));
    let of_disk = if request.direct_io == Some(true) { direct_io::alignment(file) } else { None };
    of_table.unwrap_or(SECTOR).max(of_disk.unwrap_or(SECTOR))
}

/// Attaches the file to the claimed number.
fn bind_number<'a>(shared: &'a Shared, claim: Claim, wanted: Wanted<'_>) -> Result<Attempt<'a>, Error> {
    let has_choice = wanted.request.number.is_none();
    if !sweep(claim.number()) && has_choice {
        return Ok(Attempt::Taken(claim));
    }
    let expected = match shared.untrusted.expect_if(wanted.request.untrusted, claim.number()) {
        Ok(expected) => expected,
        Err(error) => {
            claim.give_up();
            return Err(error);
        }
    };
    match configure(shared, claim.number(), wanted) {
        Ok(configured) => commit(expected, configured, wanted, claim).map(Box::new).map(Attempt::Bound),
        Err(errno) if has_choice && is_node_missing(errno, claim.number()) => Ok(Attempt::NodeMissing(claim)),
        Err(errno) if has_choice && is_taken(errno, claim.number()) => Ok(Attempt::Taken(claim)),
        Err(errno) => {
            let error = refusal(shared, claim.number(), wanted, errno);
            // The mark ends before the claim: the next claim of the number makes its own mark.
            drop(expected);
            claim.give_up();
            Err(error)
        }
    }
}

/// Whether another process has taken the number, or removed or locked its device.
fn is_taken(errno: Errno, number: u32) -> bool {
    match errno {
        Errno::EBUSY => true,
        errno if is_gone(errno) => true,
        Errno::EACCES if is_closed_to_us(number) => {
            warn!("{}", closed_to_us(number));
            true
        }
        Errno::EROFS if device::is_set_read_only(number) => {
            warn!("{}", set_read_only(number));
            true
        }
        _ => false,
    }
}

/// Replaces the mark of the number by one of the disk sequence. Detaches a device that cannot be marked.
fn commit<'a>(
    expected: Option<Expected<'_>>,
    configured: Configured<'a>,
    wanted: Wanted<'_>,
    claim: Claim,
) -> Result<Bound<'a>, Error> {
    let Configured { device, hold, writer } = configured;
    if let Some(mut mark) = expected
        && let Err(error) = mark.replace_by(device.disk_sequence)
    {
        let _ends_at_close = detach::clear(device.number, device.disk_sequence);
        drop((hold, writer));
        // After the device: udev must not process it without a mark.
        drop(mark);
        claim.give_up();
        return Err(unmarked(error));
    }
    Ok(Bound { device, file_size: wanted.examined.size, hold, claim, writer })
}
