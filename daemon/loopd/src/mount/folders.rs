//! The folders that file systems are mounted on: `/run/media/USER/NAME`, as desktops know them.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use loopd_common::acl;
use loopd_dbus::{Error, ErrorKind};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

/// Where the service manager gives us no other.
const MEDIA: &str = "/run/media";

/// The folder that all the users' folders lie in.
#[derive(Clone, Debug)]
pub struct Folders {
    media: PathBuf,
}

impl Folders {
    /// The second of the folders that the service manager has made for us, or the same one by its name.
    pub fn given() -> Self {
        let given = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
        let second = std::env::split_paths(&given).nth(1);
        Self { media: second.unwrap_or_else(|| PathBuf::from(MEDIA)) }
    }

    /// The folder for this name of this user.
    pub fn path(&self, user: &str, name: &str) -> PathBuf {
        self.media.join(user).join(name)
    }

    /// Makes a folder; false where there is something by that name.
    ///
    /// # Errors
    /// `Kernel`, or `NotSupported` where the user's folder cannot be the user's alone.
    pub fn make(&self, path: &Path, uid: u32) -> Result<bool, Error> {
        let (user, name) = self.parts(path).ok_or_else(|| strange(path))?;
        // The user's folder is removed with the last one in it, perhaps at this very moment.
        for _ in 0..8 {
            let folder = self.users_folder(&user, uid)?;
            match rustix::fs::mkdirat(&folder, &name, Mode::RWXU) {
                Ok(()) => return Ok(true),
                Err(Errno::EXIST) => return Ok(false),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed("make", path, errno)),
            }
        }
        Err(failed("make", path, Errno::NOENT))
    }

    /// Removes an empty folder, and the user's where that was the last one.
    ///
    /// # Errors
    /// It is not empty, or something is mounted on it.
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        let (user, name) = self.parts(path).ok_or_else(|| strange(path))?;
        let users = self.media.join(&user);
        let folder = match open(&users) {
            Ok(folder) => folder,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed("open", &users, errno)),
        };
        match rustix::fs::unlinkat(&folder, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("remove", path, errno)),
        }
        let _others_are_in_it = rustix::fs::unlinkat(CWD, &users, AtFlags::REMOVEDIR);
        Ok(())
    }

    /// The user's name and the folder's, of a path that we could have made.
    fn parts(&self, path: &Path) -> Option<(OsString, OsString)> {
        let parts: Vec<&OsStr> = path.strip_prefix(&self.media).ok()?.iter().collect();
        match parts[..] {
            [user, name] if user != ".." && name != ".." => Some((user.to_owned(), name.to_owned())),
            _ => None,
        }
    }

    /// The user's folder, which root alone can write to and nobody but the user can look into.
    fn users_folder(&self, user: &OsStr, uid: u32) -> Result<OwnedFd, Error> {
        let path = self.media.join(user);
        rustix::fs::mkdir(&self.media, Mode::from_bits_retain(0o755))
            .or_else(unless_there)
            .map_err(|errno| failed("make", &self.media, errno))?;
        rustix::fs::mkdir(&path, Mode::RWXU)
            .or_else(unless_there)
            .map_err(|errno| failed("make", &path, errno))?;
        let folder = open(&path).map_err(|errno| failed("open", &path, errno))?;
        let found = rustix::fs::fstat(&folder).map_err(|errno| failed("look at", &path, errno))?;
        let mode = Mode::from_raw_mode(found.st_mode);
        let is_safe = FileType::from_raw_mode(found.st_mode) == FileType::Directory
            && found.st_uid == rustix::process::geteuid().as_raw()
            && !mode.intersects(Mode::WGRP | Mode::WOTH);
        if !is_safe {
            let message =
                format!("{} is not a folder that only root can write to; remove it", path.display());
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        if let Some(list) = access_list(&folder).map_err(|errno| failed("look at", &path, errno))?
            && acl::only_reader(&list) != Some(uid)
        {
            let message = format!("others than user {uid} may look into {}; remove it", path.display());
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        if found.st_uid == uid {
            return Ok(folder);
        }
        let list = acl::for_one_reader(uid);
        match rustix::fs::fsetxattr(&folder, acl::ATTRIBUTE, &list, XattrFlags::empty()) {
            Ok(()) => Ok(folder),
            Err(Errno::OPNOTSUPP) => Err(Error::new(
                ErrorKind::NotSupported,
                format!(
                    "{} cannot be opened to its user alone: no access control lists there",
                    path.display()
                ),
            )),
            Err(errno) => Err(failed("open to its user", &path, errno)),
        }
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The access control list; `None` if it has none.
fn access_list(folder: &OwnedFd) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut list = [0; 4096];
    match rustix::fs::fgetxattr(folder, acl::ATTRIBUTE, &mut list) {
        Ok(length) => Ok(Some(list[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn unless_there(errno: Errno) -> rustix::io::Result<()> {
    if errno == Errno::EXIST { Ok(()) } else { Err(errno) }
}

fn strange(path: &Path) -> Error {
    Error::new(ErrorKind::Kernel, format!("{} is not a folder of ours", path.display()))
}

fn failed(what: &str, path: &Path, errno: Errno) -> Error {
    Error::new(ErrorKind::Kernel, format!("cannot {what} {}: {errno}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    fn folders() -> (tempfile::TempDir, Folders) {
        let folder = tempfile::tempdir().unwrap();
        let media = folder.path().join("media");
        (folder, Folders { media })
    }

    fn own_uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn a_folder_is_made_once_and_removed_with_the_users() {
        let (_temporary, folders) = folders();
        let (first, second) = (folders.path("a", "data"), folders.path("a", "data1"));
        assert!(folders.make(&first, own_uid()).unwrap());
        assert!(!folders.make(&first, own_uid()).unwrap());
        assert!(folders.make(&second, own_uid()).unwrap());
        folders.remove(&first).unwrap();
        folders.remove(&first).unwrap();
        assert!(second.is_dir() && !first.exists());
        folders.remove(&second).unwrap();
        assert!(!folders.media.join("a").exists() && folders.media.is_dir());
    }

    #[test]
    fn the_users_folder_is_opened_to_the_user_alone() {
        let (_temporary, folders) = folders();
        let path = folders.path("a", "data");
        match folders.make(&path, own_uid() + 1) {
            Err(error) if error.message.contains("no access control lists") => {
                return loopd_test_support::skipped("folders", &error.to_string());
            }
            made => assert!(made.unwrap()),
        }
        let users = fs::metadata(folders.media.join("a")).unwrap();
        // The group's bits show the mask.
        assert_eq!((users.mode() & 0o7777, users.uid()), (0o750, own_uid()));
        let mut list = [0; 64];
        let length = rustix::fs::getxattr(folders.media.join("a"), acl::ATTRIBUTE, &mut list).unwrap();
        assert_eq!(list[..length], acl::for_one_reader(own_uid() + 1));
        // One that is there already is taken, and opened to its user.
        assert!(folders.make(&folders.path("a", "more"), own_uid() + 1).unwrap());
        // It is never opened to a second one, nor closed to the first.
        for other in [own_uid() + 2, own_uid()] {
            let error = folders.make(&folders.path("a", "other"), other).unwrap_err();
            assert_eq!(error.kind, ErrorKind::NotSupported);
            assert!(error.message.contains("others than user"), "{error}");
        }
        assert!(!folders.path("a", "other").exists());
    }

    #[test]
    fn what_others_could_write_to_is_not_taken() {
        let (temporary, folders) = folders();
        fs::create_dir_all(folders.media.join("open")).unwrap();
        fs::set_permissions(folders.media.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        fs::create_dir_all(folders.media.join("group")).unwrap();
        fs::set_permissions(folders.media.join("group"), fs::Permissions::from_mode(0o770)).unwrap();
        symlink(temporary.path(), folders.media.join("link")).unwrap();
        fs::write(folders.media.join("file"), "").unwrap();
        for user in ["open", "group", "link", "file"] {
            let error = folders.make(&folders.path(user, "data"), own_uid()).unwrap_err();
            assert!(error.message.contains(&format!("/{user}")), "{error}");
        }
        assert!(!temporary.path().join("data").exists());
    }

    #[test]
    fn only_empty_folders_of_ours_are_removed() {
        let (temporary, folders) = folders();
        let full = folders.path("a", "full");
        folders.make(&full, own_uid()).unwrap();
        fs::write(full.join("file"), "").unwrap();
        assert!(folders.remove(&full).is_err());
        assert!(full.join("file").exists());
        for other in ["..", "a", "a/b/c", "a/..", "../x"] {
            assert!(folders.remove(&folders.media.join(other)).is_err(), "{other}");
        }
        assert!(folders.remove(temporary.path()).is_err());
    }
}
