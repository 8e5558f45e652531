//! The folders to mount on, in a folder of their own: they may outlast their attachments.

use std::io::{Error as IoError, Result as IoResult};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::debug;

use super::{Kind, SUFFIX, VERSION, kind_of, own_folder, paths_in, read_own, replace, set_aside};
use crate::mount::unit_name;
use loopd_engine::MountDirectory;

/// The files of the folders.
pub struct MountDirectories {
    folder: PathBuf,
}

/// The contents of a file, which has the folder's path, escaped, as its name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Contents {
    version: u32,
    path: PathBuf,
    user: u32,
    told: bool,
}

impl MountDirectories {
    pub fn open(runtime_folder: &Path) -> IoResult<Self> {
        Ok(Self { folder: own_folder(runtime_folder.join("mounts"))? })
    }

    pub fn file(&self, path: &Path) -> PathBuf {
        self.folder.join(format!("{}{SUFFIX}", unit_name::of_path(path)))
    }

    pub fn write(&self, place: &MountDirectory) -> IoResult<()> {
        let MountDirectory { path, uid, announced } = place.clone();
        let file = self.file(&path);
        let contents = Contents { version: VERSION, path, user: uid, told: announced };
        replace(&file, &toml::to_string(&contents).map_err(IoError::other)?)
    }

    pub fn read(&self) -> Vec<MountDirectory> {
        let mut all = Vec::new();
        for file in paths_in(&self.folder) {
            match kind_of(&file) {
                Kind::Unfinished => drop(std::fs::remove_file(&file)),
                Kind::SetAside => debug!("{} is passed over", file.display()),
                Kind::Attachment | Kind::Announcement => match self.load(&file) {
                    Ok(place) => all.push(place),
                    Err(why) => set_aside(&file, &why),
                },
            }
        }
        all
    }

    fn load(&self, file: &Path) -> Result<MountDirectory, String> {
        let contents: Contents =
            toml::from_str(&read_own(file)?).map_err(|error| error.message().to_owned())?;
        if contents.version != VERSION {
            return Err(format!("it has version {}, and this loopd knows {VERSION}", contents.version));
        }
        if self.file(&contents.path) != file {
            return Err("it is about another folder than its name says".to_owned());
        }
        Ok(MountDirectory { path: contents.path, uid: contents.user, announced: contents.told })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> MountDirectory {
        MountDirectory { path: PathBuf::from(path), uid: 1000, announced: true }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let places = MountDirectories::open(folder.path()).unwrap();
        let all = [place("/run/media/a/My Disk"), place("/run/media/a/ä-1")];
        for place in &all {
            places.write(&MountDirectory { announced: false, ..place.clone() }).unwrap();
            places.write(place).unwrap();
        }
        let sorted = |mut read: Vec<MountDirectory>| {
            read.sort_unstable_by(|one, other| one.path.cmp(&other.path));
            read
        };
        assert_eq!(sorted(places.read()), all);
        std::fs::remove_file(places.file(&all[0].path)).unwrap();
        let text = std::fs::read_to_string(places.file(&all[1].path)).unwrap();
        for (name, text) in [
            ("half.toml", &text[..text.len() / 2]),
            ("other.toml", &text),
            ("version.toml", &text.replace("version = 1", "version = 7")),
            ("more.toml", &format!("{text}more = 1\n")),
            (".new.toml", "half a fi"),
        ] {
            std::fs::write(places.folder.join(name), text).unwrap();
        }
        assert_eq!(places.read(), all[1..]);
        let mut left: Vec<_> = paths_in(&places.folder);
        left.retain(|path| path.extension().is_some_and(|extension| extension == "damaged"));
        assert_eq!(left.len(), 4, "{left:?}");
    }
}
