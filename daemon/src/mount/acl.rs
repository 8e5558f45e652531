//! A folder that one user besides root may look into: its access control list as the kernel takes it
//! (`acl(5)`, `include/uapi/linux/posix_acl_xattr.h`).

/// The extended attribute that holds it.
pub const ATTRIBUTE: &str = "system.posix_acl_access";

const VERSION: u32 = 2;
const NOBODY: u32 = u32::MAX;
const READ_AND_ENTER: u16 = 5;
const EVERYTHING: u16 = 7;

/// Root may do everything, this user read and enter, and everyone else nothing.
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

#[derive(Clone, Copy)]
#[repr(u16)]
enum Tag {
    Owner = 0x01,
    User = 0x02,
    OwnersGroup = 0x04,
    Mask = 0x10,
    Other = 0x20,
}
