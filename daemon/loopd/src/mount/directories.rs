//! The directories to mount on: `/run/media/USER/NAME`, which desktops know.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use loopd_common::acl;
use loopd_engine::Error;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

/// The default if the service manager sets no other.
const MEDIA: &str = "/run/media";

/// The directory that contains the users' directories.
#[derive(Clone, Debug)]
pub struct Directories {
    media: PathBuf,
}

impl Directories {
    /// The second runtime directory that the service manager made, or the default.
    pub fn from_environment() -> Self {
        let given = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
        let second = std::env::split_paths(&given).nth(1);
        Self { media: second.unwrap_or_else(|| PathBuf::from(MEDIA)) }
    }

    /// The user's directory with this name.
    pub fn path(&self, user: &str, name: &str) -> PathBuf {
        self.media.join(user).join(name)
    }

    /// Makes a directory; returns false if the path exists.
    ///
    /// # Errors
    /// `Kernel`; `NotSupported` if the user's directory cannot be restricted to the user.
    pub fn make(&self, path: &Path, uid: u32) -> Result<bool, Error> {
        let (user, name) = self.parts(path).ok_or_else(|| not_ours(path))?;
        // Another task may remove the user's directory at the same time.
        for _ in 0..8 {
            let directory = self.user_directory(&user, uid)?;
            match rustix::fs::mkdirat(&directory, &name, Mode::RWXU) {
                Ok(()) => return Ok(true),
                Err(Errno::EXIST) => return Ok(false),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed("make", path, errno)),
            }
        }
        Err(failed("make", path, Errno::NOENT))
    }

    /// Removes an empty directory, and the user's directory if it is empty then.
    ///
    /// # Errors
    /// It is not empty, or something is mounted on it.
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        let (user, name) = self.parts(path).ok_or_else(|| not_ours(path))?;
        let users = self.media.join(&user);
        let directory = match open(&users) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed("open", &users, errno)),
        };
        match rustix::fs::unlinkat(&directory, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("remove", path, errno)),
        }
        let _others_are_in_it = rustix::fs::unlinkat(CWD, &users, AtFlags::REMOVEDIR);
        Ok(())
    }

    /// The user's name and the directory's, if loopd could have made this path.
    fn parts(&self, path: &Path) -> Option<(OsString, OsString)> {
        let parts: Vec<&OsStr> = path.strip_prefix(&self.media).ok()?.iter().collect();
        match parts[..] {
            [user, name] if user != ".." && name != ".." => Some((user.to_owned(), name.to_owned())),
            _ => None,
        }
    }

    /// Opens the user's directory, which only root can write to and only the user can read.
    fn user_directory(&self, user: &OsStr, uid: u32) -> Result<OwnedFd, Error> {
        let path = self.media.join(user);
        rustix::fs::mkdir(&self.media, Mode::from_bits_retain(0o755))
            .or_else(ignore_existing)
            .map_err(|errno| failed("make", &self.media, errno))?;
        rustix::fs::mkdir(&path, Mode::RWXU)
            .or_else(ignore_existing)
            .map_err(|errno| failed("make", &path, errno))?;
        let directory = open(&path).map_err(|errno| failed("open", &path, errno))?;
        restrict(&directory, &path, uid)?;
        Ok(directory)
    }
}

/// Makes sure that only root can write to the user's directory, and gives this user alone read access.
fn restrict(directory: &OwnedFd, path: &Path, uid: u32) -> Result<(), Error> {
    let found = rustix::fs::fstat(directory).map_err(|errno| failed("examine", path, errno))?;
    let mode = Mode::from_raw_mode(found.st_mode);
    let is_safe = FileType::from_raw_mode(found.st_mode) == FileType::Directory
        && found.st_uid == rustix::process::geteuid().as_raw()
        && !mode.intersects(Mode::WGRP | Mode::WOTH);
    if !is_safe {
        return Err(not_usable(path, "it is not a directory that only root can write to; remove it"));
    }
    if let Some(list) = access_list(directory).map_err(|errno| failed("examine", path, errno))?
        && acl::only_reader(&list) != Some(uid)
    {
        return Err(not_usable(path, &format!("users other than uid {uid} can read it; remove it")));
    }
    if found.st_uid == uid { Ok(()) } else { grant_access(directory, path, uid) }
}

fn grant_access(directory: &OwnedFd, path: &Path, uid: u32) -> Result<(), Error> {
    let list = acl::for_one_reader(uid);
    match rustix::fs::fsetxattr(directory, acl::ATTRIBUTE, &list, XattrFlags::empty()) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => Err(Error::NotSupported {
            operation: format!("grant only uid {uid} access to {}", path.display()),
            reason: "the file system has no access control lists".to_owned(),
        }),
        Err(errno) => Err(failed("grant its user access to", path, errno)),
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The access control list of a directory; `None` if it has none.
fn access_list(directory: &OwnedFd) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut list = [0; 4096];
    match rustix::fs::fgetxattr(directory, acl::ATTRIBUTE, &mut list) {
        Ok(length) => Ok(Some(list[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn ignore_existing(errno: Errno) -> rustix::io::Result<()> {
    if errno == Errno::EXIST { Ok(()) } else { Err(errno) }
}

fn not_ours(path: &Path) -> Error {
    Error::Failed { operation: mount_on(path), reason: "it is not a directory of loopd".to_owned() }
}

fn not_usable(path: &Path, reason: &str) -> Error {
    Error::NotSupported { operation: mount_on(path), reason: reason.to_owned() }
}

fn mount_on(path: &Path) -> String {
    format!("use {} to mount on", path.display())
}

fn failed(what: &str, path: &Path, errno: Errno) -> Error {
    Error::Io { operation: format!("{what} {}", path.display()), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use loopd_dbus::ErrorKind;

    use super::*;

    fn directories() -> (tempfile::TempDir, Directories) {
        let temporary = tempfile::tempdir().unwrap();
        let media = temporary.path().join("media");
        (temporary, Directories { media })
    }

    fn own_uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn a_directory_is_made_once_and_the_last_removal_removes_the_users() {
        let (_temporary, directories) = directories();
        let (first, second) = (directories.path("a", "data"), directories.path("a", "data1"));
        assert!(directories.make(&first, own_uid()).unwrap());
        assert!(!directories.make(&first, own_uid()).unwrap());
        assert!(directories.make(&second, own_uid()).unwrap());
        directories.remove(&first).unwrap();
        directories.remove(&first).unwrap();
        assert!(second.is_dir() && !first.exists());
        directories.remove(&second).unwrap();
        assert!(!directories.media.join("a").exists() && directories.media.is_dir());
    }

    #[test]
    fn only_the_user_gets_access_to_the_users_directory() {
        let (_temporary, directories) = directories();
        let path = directories.path("a", "data");
        match directories.make(&path, own_uid() + 1) {
            Err(error) if error.to_string().contains("no access control lists") => {
                return loopd_test_support::skipped("directories", &error.to_string());
            }
            made => assert!(made.unwrap()),
        }
        let users = fs::metadata(directories.media.join("a")).unwrap();
        // The group's bits show the mask.
        assert_eq!((users.mode() & 0o7777, users.uid()), (0o750, own_uid()));
        let mut list = [0; 64];
        let length = rustix::fs::getxattr(directories.media.join("a"), acl::ATTRIBUTE, &mut list).unwrap();
        assert_eq!(list[..length], acl::for_one_reader(own_uid() + 1));
        // An existing directory is used, and its user gets access.
        assert!(directories.make(&directories.path("a", "more"), own_uid() + 1).unwrap());
        // No second user gets access, and the first keeps it.
        for other in [own_uid() + 2, own_uid()] {
            let error = directories.make(&directories.path("a", "other"), other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
            assert!(error.to_string().contains("users other than"), "{error}");
        }
        assert!(!directories.path("a", "other").exists());
    }

    #[test]
    fn directories_that_others_can_write_to_are_refused() {
        let (temporary, directories) = directories();
        fs::create_dir_all(directories.media.join("open")).unwrap();
        fs::set_permissions(directories.media.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        fs::create_dir_all(directories.media.join("group")).unwrap();
        fs::set_permissions(directories.media.join("group"), fs::Permissions::from_mode(0o770)).unwrap();
        symlink(temporary.path(), directories.media.join("link")).unwrap();
        fs::write(directories.media.join("file"), "").unwrap();
        for user in ["open", "group", "link", "file"] {
            let error = directories.make(&directories.path(user, "data"), own_uid()).unwrap_err();
            assert!(error.to_string().contains(&format!("/{user}")), "{error}");
        }
        assert!(!temporary.path().join("data").exists());
    }

    #[test]
    fn only_empty_directories_of_loopd_are_removed() {
        let (temporary, directories) = directories();
        let full = directories.path("a", "full");
        directories.make(&full, own_uid()).unwrap();
        fs::write(full.join("file"), "").unwrap();
        assert!(directories.remove(&full).is_err());
        assert!(full.join("file").exists());
        for other in ["..", "a", "a/b/c", "a/..", "../x"] {
            assert!(directories.remove(&directories.media.join(other)).is_err(), "{other}");
        }
        assert!(directories.remove(temporary.path()).is_err());
    }
}
