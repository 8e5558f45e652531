//! Files to attach, and mounts of them.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::process::run;
use crate::sysfs::{Extent, LoopDevice};

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// A file that any user may read and write.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its path.
    pub path: PathBuf,
}

impl Image {
    /// A file of zeros.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn sparse(directory: &Path, name: impl AsRef<OsStr>, bytes: u64) -> Result<Self> {
        let path = directory.join(Path::new(&name));
        File::create_new(&path)?.set_len(bytes)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self { path })
    }

    /// An ext4 file system of 16 MiB.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn ext4(directory: &Path, name: &str, label: &str, uuid: &str) -> Result<Self> {
        Self::ext4_sized(directory, name, label, uuid, 16 * MIB).await
    }

    /// An ext4 file system.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn ext4_sized(
        directory: &Path,
        name: &str,
        label: &str,
        uuid: &str,
        bytes: u64,
    ) -> Result<Self> {
        let image = Self::sparse(directory, name, bytes)?;
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

    /// Makes it look like one half of a mirror: writes a RAID superblock of version 1.0, 8 KiB before the end.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn add_mirror_superblock(&self) -> Result<()> {
        let file = self.open()?;
        let place = file.metadata()?.len() - 8 * 1024;
        let mut superblock = [0; 256];
        superblock[..8].copy_from_slice(b"\xfc\x4e\x2b\xa9\x01\0\0\0");
        // Its own position, in sectors of 512 bytes.
        superblock[144..152].copy_from_slice(&(place / 512).to_le_bytes());
        Ok(file.write_all_at(&superblock, place)?)
    }

    /// Its path as text, for commands.
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

    /// Changes its owner.
    ///
    /// # Errors
    /// It is gone.
    pub fn chown(&self, owner: crate::User) -> Result<()> {
        Ok(std::os::unix::fs::chown(&self.path, Some(owner.uid), Some(owner.gid))?)
    }
}

/// A mount; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    /// The mount point.
    pub directory: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Mounts the device at a new directory of this name.
    ///
    /// # Errors
    /// mount's.
    pub async fn new(device: LoopDevice, parent: &Path, name: &str) -> Result<Self> {
        Self::node(&device.node(), parent, name).await
    }

    /// Mounts the device with this node at a new directory of this name.
    ///
    /// # Errors
    /// mount's.
    pub async fn node(node: &str, parent: &Path, name: &str) -> Result<Self> {
        let directory = parent.join(name);
        std::fs::create_dir_all(&directory)?;
        run("mount", [OsStr::new(node), directory.as_os_str()]).await?;
        Ok(Self { directory, mounted: true })
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// umount's.
    pub async fn unmount(mut self) -> Result<()> {
        run("umount", [&self.directory]).await?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.directory).status();
        }
    }
}
