//! Whether the kernel reads partition tables. Some kernels are built without any parser.
//!
//! When the kernel has made no nodes for a table with partitions for the first time, a test follows: an image with a
//! table that every parser knows is attached for a moment.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;

use loopd_engine::AttachRequest;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::debug;

use crate::bind::bind;
use crate::shared::Shared;
use crate::sysfs::loop_device;

/// Whether the kernel reads partition tables; `None` if that is not known yet.
pub fn known(shared: &Shared) -> Option<bool> {
    shared.kernel_scans.get().copied()
}

/// Whether the kernel is known to read partition tables.
pub fn kernel_is_known_to_scan(shared: &Shared) -> bool {
    known(shared) == Some(true)
}

/// Whether the kernel reads partition tables. Tests that if it is not known and `has_made_nodes` does not prove it.
pub fn kernel_scans(shared: &Shared, has_made_nodes: bool) -> bool {
    *shared.kernel_scans.get_or_init(|| {
        let scans = has_made_nodes || test(shared).unwrap_or(false);
        let verb = if scans { "reads" } else { "does not read" };
        debug!("this kernel {verb} partition tables");
        scans
    })
}

/// Whether the kernel makes the node of a partition when the sample image is attached.
fn test(shared: &Shared) -> Option<bool> {
    let request = AttachRequest { read_only: true, wait: false, ..AttachRequest::default() };
    let bound = bind(shared, &sample_image().ok()?, &request).ok()?;
    Some(!loop_device::partitions(bound.device.number).ok()?.is_empty())
}

/// An image with one DOS partition of 8 sectors.
fn sample_image() -> io::Result<OwnedFd> {
    const SECTOR: usize = 512;
    let mut image = vec![0; 64 * SECTOR];
    let entry = [0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0];
    image[446..462].copy_from_slice(&entry);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut file = File::from(memfd_create(c"loopd-partition-sample", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&image)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use loopd_partition_table as format;

    use super::*;
    use crate::partition_table::Bytes;

    #[test]
    fn the_sample_image_has_one_partition() {
        let image = sample_image().unwrap();
        let reading = format::read(&mut Bytes::new(&image, 0, 64 * 512), 512).unwrap();
        let partitions = reading.table.unwrap().partitions;
        assert_eq!((partitions.len(), partitions[0].start, partitions[0].size), (1, 8 * 512, 8 * 512));
        assert_eq!(reading.warnings, []);
    }
}
