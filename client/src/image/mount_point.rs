//! The mount points that `loopctl mount` may print: those that loopd made for this user.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use loopd_common::acl;
use nix::unistd::getuid;

use super::mount_table::MountTable;
use super::volume::Volume;

/// A mount point of the volume in a directory that only root can write and only this user can read, as
/// loopd makes it. `None` if the volume is not mounted, or somewhere else.
#[must_use]
pub fn of(volume: &Volume<'_>) -> Option<PathBuf> {
    let device = fs::metadata(&volume.properties.device).ok()?.rdev();
    let table = MountTable::read().ok()?;
    let points = volume.mount_points().map(|point| Path::new(OsStr::from_bytes(point)));
    let mut own = points.filter(|point| table.shows(point, device) && point.parent().is_some_and(is_own));
    own.next().map(Path::to_owned)
}

fn is_own(directory: &Path) -> bool {
    let Ok(found) = fs::symlink_metadata(directory) else { return false };
    let writable_by_others = 0o022;
    let accessible_by_all = 0o007;
    let is_private =
        found.is_dir() && found.uid() == 0 && found.mode() & (writable_by_others | accessible_by_all) == 0;
    is_private && is_reader(directory, getuid().as_raw())
}

/// Whether the directory's access control list lets this user in, and no other.
fn is_reader(directory: &Path, uid: u32) -> bool {
    let mut list = [0; 256];
    match rustix::fs::lgetxattr(directory, acl::ATTRIBUTE, &mut list) {
        Ok(length) => acl::only_reader(&list[..length]) == Some(uid),
        Err(_) => uid == 0,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_others_can_write_or_read_is_rejected() {
        let directory = tempfile::tempdir().unwrap();
        let is_root = getuid().is_root();
        for (mode, expected) in
            [(0o700, is_root), (0o750, is_root), (0o755, false), (0o720, false), (0o702, false)]
        {
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_own(directory.path()), expected, "{mode:o}");
        }
        assert!(!is_own(Path::new("/nonexistent")));
    }

    #[test]
    fn the_access_list_must_name_the_user() {
        let directory = tempfile::tempdir().unwrap();
        let list = acl::for_one_reader(1000);
        let flags = rustix::fs::XattrFlags::empty();
        if rustix::fs::setxattr(directory.path(), acl::ATTRIBUTE, &list, flags).is_err() {
            return eprintln!("skipped: no access control lists here");
        }
        assert!(is_reader(directory.path(), 1000));
        assert!(!is_reader(directory.path(), 1001) && !is_reader(directory.path(), 0));
    }
}
