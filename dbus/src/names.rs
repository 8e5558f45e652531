//! Bus name, object paths, interfaces and polkit actions.

use zbus::wire::ObjectPath;

/// The well-known name on the system bus.
pub const BUS_NAME: &str = "org.loopd1";
/// The root object: `org.loopd1.Manager` and the `ObjectManager`.
pub const ROOT_PATH: &str = "/org/loopd1";
/// Below it stand the attachments, each named by its disk sequence in decimal.
pub const ATTACHMENT_PREFIX: &str = "/org/loopd1/attachment/";

/// The manager's interface.
pub const MANAGER: &str = "org.loopd1.Manager";
/// The interface of an attached loop device.
pub const ATTACHMENT: &str = "org.loopd1.Attachment";
/// The interface of a partition of one.
pub const PARTITION: &str = "org.loopd1.Partition";
/// The interface of whatever may hold a file system.
pub const VOLUME: &str = "org.loopd1.Volume";

/// polkit action: attach a regular file.
pub const ACTION_ATTACH: &str = "org.loopd1.attach";
/// polkit action: attach a block device.
pub const ACTION_ATTACH_DEVICE: &str = "org.loopd1.attach-device";
/// polkit action: mount a volume of one's own attachment.
pub const ACTION_MOUNT: &str = "org.loopd1.mount";
/// polkit action: change what is not one's own.
pub const ACTION_MANAGE_OTHERS: &str = "org.loopd1.manage-others";

/// The object path of the attachment made with this disk sequence.
#[must_use]
pub fn attachment_path(disk_sequence: u64) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{ATTACHMENT_PREFIX}{disk_sequence}"))
}

/// The object path of a partition of that attachment.
#[must_use]
pub fn partition_path(disk_sequence: u64, partition: u32) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{ATTACHMENT_PREFIX}{disk_sequence}/p{partition}"))
}

/// The disk sequence in an attachment's object path; `None` for any other path.
#[must_use]
pub fn disk_sequence_of(path: &str) -> Option<u64> {
    let digits = path.strip_prefix(ATTACHMENT_PREFIX)?;
    let number = digits.parse().ok()?;
    // One attachment has one path: no leading zeros, no sign.
    (attachment_path(number).as_str() == path).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_back() {
        assert_eq!(attachment_path(7).as_str(), "/org/loopd1/attachment/7");
        assert_eq!(disk_sequence_of("/org/loopd1/attachment/7"), Some(7));
        for other in ["/org/loopd1", "/org/loopd1/attachment/07", "/org/loopd1/attachment/7/p1"] {
            assert_eq!(disk_sequence_of(other), None, "{other}");
        }
    }
}
