//! The state file of each mount directory, which may outlive its attachment.

use std::io::Result as IoResult;
use std::path::{Path, PathBuf};

use loopd_engine::Error;
use serde::{Deserialize, Serialize};

use super::state_file::{self, SUFFIX, VERSION};
use crate::systemd::unit_name;
use loopd_engine::MountDirectory;

/// The state files of mount directories.
pub struct MountDirectoryFiles {
    directory: PathBuf,
}

/// The contents of a state file. Its name is the escaped path of the mount directory.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Contents {
    version: u32,
    path: PathBuf,
    user: u32,
    /// The name of this key is that of earlier versions.
    #[serde(rename = "told")]
    announced: bool,
}

impl MountDirectoryFiles {
    /// The state files in `mounts` below the runtime directory.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(runtime_directory: &Path) -> IoResult<Self> {
        Ok(Self { directory: state_file::make_private_directory(runtime_directory.join("mounts"))? })
    }

    fn path(&self, mount_directory: &Path) -> PathBuf {
        self.directory.join(format!("{}{SUFFIX}", unit_name::of_path(mount_directory)))
    }

    /// Writes the state of a mount directory.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    pub fn write(&self, directory: &MountDirectory) -> Result<(), Error> {
        let MountDirectory { path, uid, announced } = directory.clone();
        let file = self.path(&path);
        state_file::write(&file, &Contents { version: VERSION, path, user: uid, announced })
    }

    /// Removes the state of a mount directory.
    pub fn erase(&self, mount_directory: &Path) {
        state_file::remove(&self.path(mount_directory));
    }

    /// Reads all state files. Invalid ones are moved aside, temporary ones removed.
    pub fn read(&self) -> Vec<MountDirectory> {
        state_file::load_all(state_file::paths_in(&self.directory), |path| self.load(path))
    }

    fn load(&self, path: &Path) -> Result<MountDirectory, String> {
        let contents: Contents = state_file::read(path)?;
        state_file::check_version(contents.version)?;
        if self.path(&contents.path) != path {
            return Err("its name does not match the path in it".to_owned());
        }
        Ok(MountDirectory { path: contents.path, uid: contents.user, announced: contents.announced })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_directory(path: &str) -> MountDirectory {
        MountDirectory { path: PathBuf::from(path), uid: 1000, announced: true }
    }

    #[test]
    fn written_state_is_read_and_invalid_files_are_moved_aside() {
        let temporary = tempfile::tempdir().unwrap();
        let files = MountDirectoryFiles::open(temporary.path()).unwrap();
        let all = [mount_directory("/run/media/a/My Disk"), mount_directory("/run/media/a/ä-1")];
        for directory in &all {
            files.write(&MountDirectory { announced: false, ..directory.clone() }).unwrap();
            files.write(directory).unwrap();
        }
        let sorted = |mut read: Vec<MountDirectory>| {
            read.sort_unstable_by(|one, other| one.path.cmp(&other.path));
            read
        };
        assert_eq!(sorted(files.read()), all);
        std::fs::remove_file(files.path(&all[0].path)).unwrap();
        let text = std::fs::read_to_string(files.path(&all[1].path)).unwrap();
        for (name, text) in [
            ("half.toml", &text[..text.len() / 2]),
            ("other.toml", &text),
            ("version.toml", &text.replace("version = 1", "version = 7")),
            ("less.toml", &text.replace("user = 1000\n", "")),
            (".new.toml", "half a fi"),
        ] {
            std::fs::write(files.directory.join(name), text).unwrap();
        }
        assert_eq!(files.read(), all[1..]);
        let mut left: Vec<_> = state_file::paths_in(&files.directory);
        left.retain(|path| path.extension().is_some_and(|extension| extension == "damaged"));
        assert_eq!(left.len(), 4, "{left:?}");
    }

    #[test]
    fn files_of_other_versions_are_read() {
        let temporary = tempfile::tempdir().unwrap();
        let files = MountDirectoryFiles::open(temporary.path()).unwrap();
        let expected = mount_directory("/run/media/a/DISK");
        for text in [
            include_str!("fixtures/mount-directory.toml"),
            include_str!("fixtures/later-mount-directory.toml"),
        ] {
            std::fs::write(files.path(&expected.path), text).unwrap();
            assert_eq!(files.read(), std::slice::from_ref(&expected), "{text}");
        }
    }
}
