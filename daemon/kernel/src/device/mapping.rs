//! Opens the node of a mapping.

use std::os::fd::OwnedFd;

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
    }
}
