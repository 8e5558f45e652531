//! Requests of clients.

use loopd_common::limits::{REFERENCE_LENGTH, is_block_size};
use loopd_common::{Lifetime, Overlap};

use crate::error::Error;

/// The largest number that the loop driver takes: minor numbers have 20 bits.
const LARGEST_NUMBER: u32 = (1 << 20) - 1;
/// Sizes and offsets of a loop device count in sectors.
const SECTOR: u64 = 512;

/// A request for a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// Bytes into the file. Direct I/O needs a multiple of 512.
    pub offset: u64,
    /// Bytes at most; 0 is up to the end of the file.
    pub size_limit: u64,
    /// Make the device read-only, even if the descriptor allows writing.
    pub read_only: bool,
    /// Let the kernel look for partitions.
    pub partition_scan: bool,
    /// Whether to bypass the page cache of the backing file; `None`: the kernel crate chooses.
    pub direct_io: Option<bool>,
    /// Logical block size in bytes: a power of two; 0 takes what the image was made for.
    pub block_size: u32,
    /// When the attachment ends.
    pub lifetime: Lifetime,
    /// `lo_file_name`: at most 63 bytes.
    pub reference: String,
    /// N of the wanted `/dev/loopN`.
    pub number: Option<u32>,
    /// What to do if the file is attached already.
    pub overlap: Overlap,
    /// Wait for udev.
    pub wait: bool,
    /// The mark of the device, by which a later daemon recognizes this attach; 0 is none. A reference of more than 54
    /// bytes leaves no space for it.
    pub mark: u64,
    /// Whether a user other than root has chosen what the device shows.
    pub untrusted: bool,
}

impl Default for AttachRequest {
    fn default() -> Self {
        Self {
            offset: 0,
            size_limit: 0,
            read_only: false,
            partition_scan: true,
            direct_io: None,
            block_size: 0,
            lifetime: Lifetime::default(),
            reference: String::new(),
            number: None,
            overlap: Overlap::default(),
            wait: true,
            mark: 0,
            untrusted: false,
        }
    }
}

impl AttachRequest {
    /// Checks the values, as far as that is possible without the file.
    ///
    /// # Errors
    /// `InvalidArgs` for a value out of range.
    pub fn check(&self) -> Result<(), Error> {
        check_extent("offset", self.offset)?;
        check_extent("size-limit", self.size_limit)?;
        check(self.direct_io != Some(true) || self.offset.is_multiple_of(SECTOR), || {
            format!(
                "direct I/O needs an offset that is a multiple of 512 bytes, and {} is not; leave direct-io out",
                self.offset
            )
        })?;
        check(self.size_limit == 0 || self.size_limit >= SECTOR, || {
            format!("the size limit {} is less than one sector of 512 bytes", self.size_limit)
        })?;
        check(is_block_size(self.block_size) || self.block_size == 0, || {
            format!(
                "the block size {} is not a power of two from 512 to 65536 (0 chooses it)",
                self.block_size
            )
        })?;
        check(self.reference.len() <= REFERENCE_LENGTH, || {
            format!("the reference has {} bytes; it takes at most {REFERENCE_LENGTH}", self.reference.len())
        })?;
        check(self.number.is_none_or(|number| number <= LARGEST_NUMBER), || {
            let number = self.number.unwrap_or_default();
            format!("there can be no /dev/loop{number}; the largest is {LARGEST_NUMBER}")
        })
    }
}

/// A request to mount a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountRequest {
    /// Mount it read-only; a read-only device always is.
    pub read_only: bool,
    /// The file system; empty for the one that udev has found.
    pub filesystem: String,
    /// A comma-separated list of further options for the file system.
    pub options: String,
}

/// The kernel counts in signed 64 bit (`LOOP_CONFIGURE` would fail with `EOVERFLOW`).
fn check_extent(name: &str, bytes: u64) -> Result<(), Error> {
    check(i64::try_from(bytes).is_ok(), || {
        format!("the {name} {bytes} is above {}, the largest that the kernel takes", i64::MAX)
    })
}

fn check(is_valid: bool, reason: impl FnOnce() -> String) -> Result<(), Error> {
    if is_valid {
        Ok(())
    } else {
        Err(Error::InvalidArgument { operation: "attach".to_owned(), reason: reason() })
    }
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;

    fn refused(change: impl FnOnce(&mut AttachRequest)) -> ErrorKind {
        let mut request = AttachRequest::default();
        change(&mut request);
        request.check().unwrap_err().kind()
    }

    #[test]
    fn values_out_of_range_are_rejected() {
        for block_size in [1, 256, 511, 1000, 131_072, u32::MAX] {
            assert_eq!(refused(|o| o.block_size = block_size), ErrorKind::InvalidArgs, "{block_size}");
        }
        for extent in [1 << 63, u64::MAX - 511, u64::MAX] {
            assert_eq!(refused(|o| o.offset = extent), ErrorKind::InvalidArgs, "{extent}");
            assert_eq!(refused(|o| o.size_limit = extent), ErrorKind::InvalidArgs, "{extent}");
        }
        assert_eq!(refused(|o| (o.offset, o.direct_io) = (513, Some(true))), ErrorKind::InvalidArgs);
        assert_eq!(refused(|o| o.size_limit = 511), ErrorKind::InvalidArgs);
        assert_eq!(refused(|o| o.reference = "x".repeat(64)), ErrorKind::InvalidArgs);
        assert_eq!(refused(|o| o.number = Some(1 << 20)), ErrorKind::InvalidArgs);
    }

    #[test]
    fn the_largest_values_are_accepted() {
        let request = AttachRequest {
            offset: (1 << 63) - 1,
            size_limit: (1 << 63) - 1,
            block_size: 65536,
            reference: "x".repeat(63),
            number: Some((1 << 20) - 1),
            ..AttachRequest::default()
        };
        assert!(request.check().is_ok());
        assert!(AttachRequest::default().check().is_ok());
    }
}
