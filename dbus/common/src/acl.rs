//! The access control list of `/run/media/USER`, which only root and one user can enter. loopd sets it, and
//! daemon and client check it. In the kernel's format (`acl(5)`, `include/uapi/linux/posix_acl_xattr.h`).

/// The extended attribute with the list.
pub const ATTRIBUTE: &str = "system.posix_acl_access";

const VERSION: u32 = 2;
const NOBODY: u32 = u32::MAX;
const READ_AND_ENTER: u16 = 5;
const EVERYTHING: u16 = 7;

/// A list that allows root everything, this user to read and enter, and all others nothing.
#[must_use]
pub fn for_one_reader(uid: u32) -> Vec<u8> {
    let entries = [
        (Tag::Owner, EVERYTHING, NOBODY),
        (Tag::User, READ_AND_ENTER, uid),
        (Tag::OwnersGroup, 0, NOBODY),
        (Tag::Mask, READ_AND_ENTER, NOBODY),
        (Tag::Other, 0, NOBODY),
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend((tag as u16).to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// The one user that a list names. `None` if it names no user, several users or a group, or is invalid.
#[must_use]
pub fn only_reader(list: &[u8]) -> Option<u32> {
    let entries = list.strip_prefix(&VERSION.to_le_bytes())?;
    let (entries, []) = entries.as_chunks::<ENTRY>() else { return None };
    let mut reader = None;
    for &[tag, high, _, _, id @ ..] in entries {
        match u16::from_le_bytes([tag, high]) {
            tag if tag == Tag::User as u16 => {
                if reader.replace(u32::from_le_bytes(id)).is_some() {
                    return None;
                }
            }
            tag if UNNAMED.iter().any(|unnamed| *unnamed as u16 == tag) => {}
            _ => return None,
        }
    }
    reader
}

/// The size of an entry: tag, permissions, id.
const ENTRY: usize = 8;
/// The entries that every list has, which name neither user nor group.
const UNNAMED: [Tag; 4] = [Tag::Owner, Tag::OwnersGroup, Tag::Mask, Tag::Other];

#[derive(Clone, Copy)]
#[repr(u16)]
enum Tag {
    Owner = 0x01,
    User = 0x02,
    OwnersGroup = 0x04,
    Mask = 0x10,
    Other = 0x20,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_reader_of_a_list_is_found() {
        assert_eq!(only_reader(&for_one_reader(1000)), Some(1000));
        let entry = |tag: u16, id: u32| [&tag.to_le_bytes()[..], &[5, 0], &id.to_le_bytes()].concat();
        let with = |more: Vec<u8>| [for_one_reader(1000), more].concat();
        for (list, what) in [
            (Vec::new(), "nothing"),
            (VERSION.to_le_bytes().to_vec(), "no entry"),
            ([&VERSION.to_le_bytes()[..], &entry(Tag::Owner as u16, NOBODY)].concat(), "no user"),
            (with(entry(Tag::User as u16, 1001)), "two users"),
            (with(entry(0x08, 100)), "a group"),
            (with(entry(0x40, 100)), "an unknown entry"),
            (with(vec![0]), "half an entry"),
            (for_one_reader(1000)[1..].to_vec(), "another version"),
        ] {
            assert_eq!(only_reader(&list), None, "{what}");
        }
    }
}
