//! The node of a mapping: opening it, and reading through it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use loopd_engine::{Error, Mapping};
use nix::fcntl::OFlag;

use super::node::open_node;
use crate::error::{failed, is_gone};
use crate::ioctl;

/// Opens a mapping for reading; `None` if it is gone, or another one has its number.
pub fn open_mapping(mapping: &Mapping) -> Result<Option<OwnedFd>, Error> {
    let node = mapping.node();
    match open_node(&node, OFlag::O_RDONLY) {
        Ok(device) => {
            let is_same = ioctl::disk_sequence(&device) == Ok(mapping.disk_sequence.0);
            Ok(is_same.then_some(device))
        }
        Err(errno) if is_gone(errno) => Ok(None),
        Err(errno) => Err(failed(format!("open {node}"), "open", errno)),
    }
}

/// Reads bytes of a mapping; fewer at its end, none if it is gone.
pub fn read_mapping(mapping: &Mapping, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
    let Some(device) = open_mapping(mapping)? else { return Ok(Vec::new()) };
    let mut bytes = vec![0; length];
    let read = File::from(device).read_at(&mut bytes, offset);
    let read =
        read.map_err(|source| Error::Io { operation: format!("read from {}", mapping.node()), source })?;
    bytes.truncate(read);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use loopd_common::EncryptionType;
    use loopd_engine::kernel::DiskSequence;

    #[test]
    fn a_mapping_that_is_gone_is_not_opened() {
        let mapping = Mapping {
            number: 900_001,
            device_number: (253, 900_001),
            disk_sequence: DiskSequence(7),
            name: "loopd-1".to_owned(),
            kind: EncryptionType::Luks,
            size: 512,
            read_only: false,
        };
        assert!(open_mapping(&mapping).unwrap().is_none());
        assert!(read_mapping(&mapping, 0, 512).unwrap().is_empty());
        assert!(crate::users::of_mapping(&mapping).unwrap().is_empty());
    }
}
