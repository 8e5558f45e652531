//! Whether the kernel reads partition tables. Some kernels are built without any parser.
//!
//! When the kernel has made no nodes for a table with partitions for the first time, a test follows: an image with a
//! table that every parser knows is attached for a moment.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use loopd_engine::{AttachRequest, Error};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::{debug, warn};

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
/// If the test fails, the result is false this time, and the next call tests again.
pub fn kernel_scans(shared: &Shared, has_made_nodes: bool) -> bool {
    let determine = || if has_made_nodes { Ok(true) } else { test(shared) };
    known_or_determined(&shared.kernel_scans, determine)
}

fn known_or_determined(known: &OnceLock<bool>, determine: impl FnOnce() -> Result<bool, Error>) -> bool {
    if let Some(scans) = known.get() {
        return *scans;
    }
    match determine() {
        Ok(scans) => {
            let verb = if scans { "reads" } else { "does not read" };
            debug!("this kernel {verb} partition tables");
            *known.get_or_init(|| scans)
        }
        Err(error) => {
            warn!("whether this kernel reads partition tables is not known: {error}");
            false
        }
    }
}

/// Whether the kernel makes the node of a partition when the sample image is attached.
fn test(shared: &Shared) -> Result<bool, Error> {
    let request = AttachRequest { read_only: true, wait: false, ..AttachRequest::default() };
    let failed = |operation: &str| {
        let operation = operation.to_owned();
        move |source| Error::Io { operation, source }
    };
    let image = sample_image().map_err(failed("make a sample image"))?;
    let bound = bind(shared, &image, &request)?;
    let nodes = loop_device::partitions(bound.device.number);
    Ok(!nodes.map_err(failed("read the partitions of the sample image"))?.is_empty())
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
    fn a_test_that_failed_is_repeated_and_a_result_is_kept() {
        let failed = || Err(Error::Failed { operation: "attach".to_owned(), reason: "no device".to_owned() });
        for scans in [true, false] {
            let known = OnceLock::new();
            assert!(!known_or_determined(&known, failed));
            assert_eq!(known.get(), None, "nothing is known yet");
            assert_eq!(known_or_determined(&known, || Ok(scans)), scans);
            assert_eq!(known_or_determined(&known, || unreachable!("it is known")), scans);
        }
    }

    #[test]
    fn the_sample_image_has_one_partition() {
        let image = sample_image().unwrap();
        let reading = format::read(&mut Bytes::new(&image, 0, 64 * 512), 512).unwrap();
        let partitions = reading.table.unwrap().partitions;
        assert_eq!((partitions.len(), partitions[0].start, partitions[0].size), (1, 8 * 512, 8 * 512));
        assert_eq!(reading.warnings, []);
    }
}
