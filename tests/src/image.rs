//! Files to attach, and mounts of them.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::process::run;
use crate::sysfs::{Extent, LoopDevice};

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// A file that any user may read and write.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
}

impl Image {
    /// A file of zeros.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn sparse(folder: &Path, name: impl AsRef<OsStr>, bytes: u64) -> Result<Self> {
        let path = folder.join(Path::new(&name));
        File::create_new(&path)?.set_len(bytes)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self { path })
    }

    /// An ext4 file system of 16 MiB.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn ext4(folder: &Path, name: &str, label: &str, uuid: &str) -> Result<Self> {
        Self::ext4_sized(folder, name, label, uuid, 16 * MIB).await
    }

    /// An ext4 file system.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn ext4_sized(folder: &Path, name: &str, label: &str, uuid: &str, bytes: u64) -> Result<Self> {
        let image = Self::sparse(folder, name, bytes)?;
        let path = image.path.as_os_str();
        run("mkfs.ext4", ["-q", "-F", "-L", label, "-U", uuid].map(OsStr::new).into_iter().chain([path]))
            .await?;
        Ok(image)
    }

    /// An ext4 file system within the file.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn add_ext4(&self, place: Extent, label: &str, uuid: &str) -> Result<()> {
        let offset = format!("offset={}", place.start);
        let kibibytes = format!("{}k", place.size / 1024);
        let path = self.path.to_string_lossy();
        run("mkfs.ext4", ["-q", "-F", "-L", label, "-U", uuid, "-E", &offset, &path, &kibibytes]).await?;
        Ok(())
    }

    /// Its path, for commands.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.to_str().expect("the tests' names are UTF-8")
    }

    /// Opens it for reading and writing.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self) -> Result<File> {
        Ok(File::options().read(true).write(true).open(&self.path)?)
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open_read_only(&self) -> Result<File> {
        Ok(File::open(&self.path)?)
    }

    /// Changes its access mode.
    ///
    /// # Errors
    /// It is gone.
    pub fn chmod(&self, mode: u32) -> Result<()> {
        Ok(std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(mode))?)
    }

    /// Gives it to someone.
    ///
    /// # Errors
    /// It is gone.
    pub fn chown(&self, owner: crate::User) -> Result<()> {
        Ok(std::os::unix::fs::chown(&self.path, Some(owner.uid), Some(owner.gid))?)
    }
}

/// A mount; taken down when dropped.
#[derive(Debug)]
pub struct Mounted {
    /// Where.
    pub folder: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Mounts the device at a new folder of this name.
    ///
    /// # Errors
    /// mount's.
    pub async fn new(device: LoopDevice, parent: &Path, name: &str) -> Result<Self> {
        Self::node(&device.node(), parent, name).await
    }

    /// Mounts the device with this node at a new folder of this name.
    ///
    /// # Errors
    /// mount's.
    pub async fn node(node: &str, parent: &Path, name: &str) -> Result<Self> {
        let folder = parent.join(name);
        std::fs::create_dir_all(&folder)?;
        run("mount", [OsStr::new(node), folder.as_os_str()]).await?;
        Ok(Self { folder, mounted: true })
    }

    /// Takes it down.
    ///
    /// # Errors
    /// umount's.
    pub async fn unmount(mut self) -> Result<()> {
        run("umount", [&self.folder]).await?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.folder).status();
        }
    }
}
