//! Bus name, object paths, interfaces and polkit actions.

use zbus::wire::ObjectPath;

/// The well-known name on the system bus.
pub const BUS_NAME: &str = "org.loopd1";
/// The root object: `org.loopd1.Manager` and the `ObjectManager`.
pub const ROOT_PATH: &str = "/org/loopd1";
/// The parent path of the attachments; each is named by its disk sequence in decimal.
pub const ATTACHMENT_PREFIX: &str = "/org/loopd1/attachment/";

/// The manager's interface.
pub const MANAGER: &str = "org.loopd1.Manager";
/// The interface of an attached loop device.
pub const ATTACHMENT: &str = "org.loopd1.Attachment";
/// The interface of a partition.
pub const PARTITION: &str = "org.loopd1.Partition";
/// The interface of everything that may contain a file system.
pub const VOLUME: &str = "org.loopd1.Volume";
/// The interface of a volume that is, or may be, encrypted.
pub const ENCRYPTED: &str = "org.loopd1.Encrypted";
/// The interface of an unlocked volume's cleartext.
pub const CLEARTEXT: &str = "org.loopd1.Cleartext";

/// The most key files of `Unlock`. dbus-daemon passes at most 16 descriptors in a message.
pub const MOST_KEY_FILES: u32 = 4;

/// The methods that take file descriptors, and how many. The bus policy and the daemon refuse more. `Unlock` takes the
/// secret, a header and key files.
pub const TAKES_DESCRIPTORS: &[(&str, &str, u32)] = &[
    (MANAGER, "SetupLoop", 1),
    (MANAGER, "List", 1),
    (ATTACHMENT, "ReplaceBackingFile", 1),
    (ENCRYPTED, "Unlock", 2 + MOST_KEY_FILES),
];

/// polkit action: attach a regular file.
pub const ACTION_ATTACH: &str = "org.loopd1.attach";
/// polkit action: attach a block device.
pub const ACTION_ATTACH_DEVICE: &str = "org.loopd1.attach-device";
/// polkit action: mount a volume of one's own attachment.
pub const ACTION_MOUNT: &str = "org.loopd1.mount";
/// polkit action: unlock a volume of one's own attachment.
pub const ACTION_UNLOCK: &str = "org.loopd1.unlock";
/// polkit action: change attachments of other users.
pub const ACTION_MANAGE_OTHERS: &str = "org.loopd1.manage-others";

/// The object path of the attachment made with this disk sequence.
#[must_use]
pub fn attachment_path(disk_sequence: u64) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{ATTACHMENT_PREFIX}{disk_sequence}"))
}

/// The object path of a partition of the attachment with this disk sequence.
#[must_use]
pub fn partition_path(disk_sequence: u64, partition: u32) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{ATTACHMENT_PREFIX}{disk_sequence}/p{partition}"))
}

/// The object path of a volume: the whole device of an attachment (`None`), or a partition.
#[must_use]
pub fn volume_path(disk_sequence: u64, partition: Option<u32>) -> ObjectPath<'static> {
    partition.map_or_else(|| attachment_path(disk_sequence), |number| partition_path(disk_sequence, number))
}

/// The object path of the cleartext of a volume.
#[must_use]
pub fn cleartext_path(disk_sequence: u64, partition: Option<u32>) -> ObjectPath<'static> {
    ObjectPath::from_string_unchecked(format!("{}/cleartext", volume_path(disk_sequence, partition)))
}

/// The disk sequence in an attachment's object path; `None` for any other path.
#[must_use]
pub fn disk_sequence_of(path: &str) -> Option<u64> {
    let digits = path.strip_prefix(ATTACHMENT_PREFIX)?;
    let number = digits.parse().ok()?;
    // No leading zeros and no sign: an attachment has only one path.
    (attachment_path(number).as_str() == path).then_some(number)
}

/// Whether this is the node of a loop device.
#[must_use]
pub fn is_loop_node(node: &str) -> bool {
    node.strip_prefix("/dev/loop").is_some_and(is_number)
}

/// Whether this is the node of a mapping of the device mapper.
#[must_use]
pub fn is_mapping_node(node: &str) -> bool {
    node.strip_prefix("/dev/dm-").is_some_and(is_number)
}

fn is_number(digits: &str) -> bool {
    digits.parse::<u32>().is_ok_and(|number| number.to_string() == digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loop_nodes_are_recognized() {
        for node in ["/dev/loop0", "/dev/loop1048575"] {
            assert!(is_loop_node(node), "{node}");
        }
        for other in
            ["", "/dev/loop", "/dev/loop+1", "/dev/loop01", "/dev/loop0p1", "/dev/loop4294967296", "loop0"]
        {
            assert!(!is_loop_node(other), "{other}");
        }
    }

    #[test]
    fn only_nodes_of_mappings_are_recognized() {
        for node in ["/dev/dm-0", "/dev/dm-1048575"] {
            assert!(is_mapping_node(node), "{node}");
        }
        for other in ["", "/dev/dm-", "/dev/dm-+1", "/dev/dm-01", "/dev/dm-0p1", "/dev/mapper/x", "dm-0"] {
            assert!(!is_mapping_node(other), "{other}");
        }
    }

    #[test]
    fn a_cleartext_is_below_its_volume() {
        assert_eq!(cleartext_path(7, None).as_str(), "/org/loopd1/attachment/7/cleartext");
        assert_eq!(cleartext_path(7, Some(2)).as_str(), "/org/loopd1/attachment/7/p2/cleartext");
    }

    #[test]
    fn paths_are_parsed_back() {
        assert_eq!(attachment_path(7).as_str(), "/org/loopd1/attachment/7");
        assert_eq!(disk_sequence_of("/org/loopd1/attachment/7"), Some(7));
        for other in [
            "/org/loopd1",
            "/org/loopd1/attachment/07",
            "/org/loopd1/attachment/7/p1",
            "/org/loopd1/attachment/7/cleartext",
        ] {
            assert_eq!(disk_sequence_of(other), None, "{other}");
        }
    }

    /// The bus policy and the interfaces have the same methods.
    #[test]
    fn the_bus_policy_allows_each_method_and_no_other() {
        let of =
            |file: &str| std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let quoted = |text: &str, before: &str| {
            let start = text.find(before).unwrap() + before.len();
            text[start..start + text[start..].find('"').unwrap()].to_owned()
        };
        let mut methods = Vec::new();
        for interface in [MANAGER, ATTACHMENT, PARTITION, VOLUME, ENCRYPTED, CLEARTEXT] {
            for method in of(&format!("{interface}.xml")).split("<method ").skip(1) {
                let member = quoted(method, "name=\"");
                let known = TAKES_DESCRIPTORS.iter().find(|known| (known.0, known.1) == (interface, &member));
                methods.push((interface.to_owned(), member, known.map_or(0, |known| known.2)));
            }
        }
        methods.sort();
        let mut allowed: Vec<_> = of("org.loopd1.conf")
            .split("<allow send_destination=\"org.loopd1\"")
            .skip(1)
            .map(|rule| {
                assert_eq!(quoted(rule, "send_type=\""), "method_call");
                let descriptors: u32 = quoted(rule, "max_fds=\"").parse().unwrap();
                (quoted(rule, "send_interface=\""), quoted(rule, "send_member=\""), descriptors)
            })
            .filter(|(interface, _, _)| interface.starts_with("org.loopd1."))
            .collect();
        allowed.sort();
        for (allowed, (interface, member, descriptors)) in allowed.iter().zip(&methods) {
            assert_eq!((&allowed.0, &allowed.1), (interface, member));
            assert_eq!(allowed.2, *descriptors, "{member}");
        }
        assert_eq!(allowed.len(), methods.len());
    }
}
