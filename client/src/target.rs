//! What a TARGET on the command line stands for.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use loopd_dbus::names::{ATTACHMENT, BUS_NAME, VOLUME};
use loopd_dbus::properties::from_bus_path;
use loopd_dbus::proxy::{Listed, Manager};
use loopd_dbus::{AttachmentProperties, ListOptions, VolumeProperties};
use nix::fcntl::OFlag;
use zbus::wire::OwnedObjectPath;

use crate::connection::{Bus, explain};
use crate::objects::managed_objects;
use crate::output::printable;
use crate::partition::{self, Partition};

/// What the kernel puts behind the path of a backing file that was removed.
const DELETED: &[u8] = b" (deleted)";

/// What the user named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/dev/loopN`.
    Device(u32),
    /// `/dev/loopNpM`. It is no attachment; only as a backing file it may have some.
    Partition {
        /// N.
        disk: u32,
        /// M.
        number: u32,
    },
    /// A backing file.
    File(PathBuf),
}

impl Target {
    /// Tells a device from a file by the word alone: `loop3` and `/dev/loop3` are devices, also
    /// where a file of that name lies in the current folder (it is `./loop3`). So are partitions.
    #[must_use]
    pub fn parse(word: &OsStr) -> Self {
        let device = word.to_str().and_then(|text| {
            let whole = loop_number(text).map(Self::Device);
            whole.or_else(|| partition_number(text).map(|(disk, number)| Self::Partition { disk, number }))
        });
        device.unwrap_or_else(|| Self::File(word.into()))
    }

    /// As [`Target::parse`], and follows links such as those in `/dev/disk` to a loop device or to a
    /// partition of one.
    #[must_use]
    pub fn resolve(word: &OsStr) -> Self {
        let target = Self::parse(word);
        if let Self::File(path) = &target
            && let Ok(real) = fs::canonicalize(path)
            && let device @ (Self::Device(_) | Self::Partition { .. }) = Self::parse(real.as_os_str())
        {
            return device;
        }
        target
    }

    /// The attachments that it stands for; at least one.
    ///
    /// # Errors
    /// There is none, or loopd could not be asked.
    pub async fn find(&self, manager: &Manager) -> anyhow::Result<Vec<Attached>> {
        let found = self.attachments(manager).await?;
        if found.is_empty() { Err(self.not_found()) } else { Ok(found) }
    }

    /// As [`Target::find`], with the partitions. A partition that nothing is attached from stands for
    /// its device here, which then has this partition only.
    ///
    /// # Errors
    /// There is none, or loopd could not be asked.
    pub async fn find_with_partitions(&self, bus: &Bus) -> anyhow::Result<Vec<Attached>> {
        let mut found = self.attachments(&bus.manager).await?;
        let only = match *self {
            Self::Partition { disk, number } if found.is_empty() => {
                found = Self::Device(disk).find(&bus.manager).await?;
                Some(number)
            }
            _ if found.is_empty() => return Err(self.not_found()),
            _ => None,
        };
        partition::add(&bus.connection, &mut found).await?;
        if let Some(number) = only {
            found.iter_mut().try_for_each(|attached| attached.keep_only(number))?;
        }
        Ok(found)
    }

    async fn attachments(&self, manager: &Manager) -> anyhow::Result<Vec<Attached>> {
        match self {
            Self::Device(number) => {
                let mut all = list(manager, &ListOptions { all: true, ..ListOptions::default() }).await?;
                all.retain(|attached| attached.attachment.number == *number);
                Ok(all)
            }
            Self::Partition { disk, number } => {
                attachments_of(manager, Path::new(&partition_node(*disk, *number))).await
            }
            Self::File(path) => attachments_of(manager, path).await,
        }
    }

    fn not_found(&self) -> anyhow::Error {
        let seek = "`loopctl list --all` shows what is attached";
        match self {
            Self::Device(number) => {
                anyhow::anyhow!("nothing is attached to {}; {seek}", device_node(*number))
            }
            Self::Partition { disk, number } => anyhow::anyhow!(
                "{} is a partition and goes with its device; name {}",
                partition_node(*disk, *number),
                device_node(*disk)
            ),
            Self::File(path) => {
                let shown = printable(path.as_os_str().as_bytes());
                if fs::symlink_metadata(path).is_err() {
                    anyhow::anyhow!(
                        "there is no file {shown}, and nothing is attached that had this path; {seek}"
                    )
                } else {
                    anyhow::anyhow!("{shown} is not attached to a loop device; {seek}")
                }
            }
        }
    }
}

/// An attachment as loopd lists it.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Its object on the bus.
    pub path: OwnedObjectPath,
    /// `org.loopd1.Attachment`.
    pub attachment: AttachmentProperties,
    /// `org.loopd1.Volume`.
    pub volume: VolumeProperties,
    /// Its partitions by number; empty where nobody asked for them ([`partition::add`]).
    pub partitions: Vec<Partition>,
}

impl Attached {
    /// Leaves out every other partition.
    fn keep_only(&mut self, number: u32) -> anyhow::Result<()> {
        self.partitions.retain(|partition| partition.partition.number == number);
        let device = &self.attachment.device;
        anyhow::ensure!(
            !self.partitions.is_empty(),
            "{device} has no partition {number}; `loopctl info {device}` shows those that it has"
        );
        Ok(())
    }
}

impl TryFrom<Listed> for Attached {
    type Error = zbus::Error;

    fn try_from((path, properties): Listed) -> zbus::Result<Self> {
        let attachment = AttachmentProperties::from_dict(&properties)?;
        let volume = VolumeProperties::from_dict(&properties)?;
        Ok(Self { path, attachment, volume, partitions: Vec::new() })
    }
}

/// The attachment with this path, with its partitions; `None` where it is gone.
///
/// # Errors
/// loopd could not be asked.
pub async fn attached_at(bus: &Bus, path: &OwnedObjectPath) -> anyhow::Result<Option<Attached>> {
    let (_, objects) = managed_objects(&bus.connection, BUS_NAME).await.map_err(explain)?;
    let interfaces = objects.get(path.as_str());
    let Some((Some(attachment), Some(volume))) =
        interfaces.map(|found| (found.get(ATTACHMENT), found.get(VOLUME)))
    else {
        return Ok(None);
    };
    let mut attached = Attached {
        path: path.clone(),
        attachment: AttachmentProperties::from_dict(attachment).map_err(explain)?,
        volume: VolumeProperties::from_dict(volume).map_err(explain)?,
        partitions: Vec::new(),
    };
    partition::join(std::slice::from_mut(&mut attached), &objects).map_err(explain)?;
    Ok(Some(attached))
}

/// The attachments, by number.
///
/// # Errors
/// loopd could not be asked.
pub async fn list(manager: &Manager, options: &ListOptions) -> anyhow::Result<Vec<Attached>> {
    let listed = manager.list(options).await.map_err(explain)?;
    let mut attached =
        listed.into_iter().map(Attached::try_from).collect::<zbus::Result<Vec<_>>>().map_err(explain)?;
    attached.sort_by_key(|attached| attached.attachment.number);
    Ok(attached)
}

/// N of `/dev/loopN` or `loopN`.
#[must_use]
pub fn loop_number(word: &str) -> Option<u32> {
    decimal(digits_of(word)?)
}

/// N and M of `/dev/loopNpM` or `loopNpM`.
fn partition_number(word: &str) -> Option<(u32, u32)> {
    let (disk, partition) = digits_of(word)?.split_once('p')?;
    Some((decimal(disk)?, decimal(partition)?))
}

fn digits_of(word: &str) -> Option<&str> {
    word.strip_prefix("/dev/").unwrap_or(word).strip_prefix("loop")
}

/// A number as the kernel writes it: without sign and leading zeros.
#[must_use]
pub fn decimal(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

/// The device node of this number.
#[must_use]
pub fn device_node(number: u32) -> String {
    format!("/dev/loop{number}")
}

fn partition_node(disk: u32, number: u32) -> String {
    format!("{}p{number}", device_node(disk))
}

async fn attachments_of(manager: &Manager, path: &Path) -> anyhow::Result<Vec<Attached>> {
    let all = ListOptions { all: true, ..ListOptions::default() };
    let metadata = fs::metadata(path);
    if let Ok(metadata) = &metadata
        && let Ok(file) = open_to_identify(path, metadata)
    {
        return list(manager, &ListOptions { file: Some(file.into()), ..all }).await;
    }
    // The file may not be read, or is gone: what can be compared here is what loopd tells.
    let mut found = list(manager, &all).await?;
    match metadata {
        Ok(metadata) => found.retain(|attached| is_same_file(&attached.attachment, &metadata)),
        Err(_) => {
            let path = absolute(path);
            found.retain(|attached| had_path(&attached.attachment, &path));
        }
    }
    Ok(found)
}

/// Opens a file to tell loopd which one is meant.
///
/// # Errors
/// It may not be read, or cannot be attached to a loop device.
pub fn open_to_identify(path: &Path, metadata: &Metadata) -> io::Result<File> {
    // Nothing else can be attached, and opening it may have effects: a FIFO waits for a writer.
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    fs::OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Whether this file is behind the attachment.
#[must_use]
pub fn is_same_file(attachment: &AttachmentProperties, metadata: &Metadata) -> bool {
    (attachment.backing_device, attachment.backing_inode) == (metadata.dev(), metadata.ino())
}

fn had_path(attachment: &AttachmentProperties, path: &Path) -> bool {
    let shown = from_bus_path(&attachment.backing_file);
    let path = path.as_os_str().as_bytes();
    shown == path || shown.strip_suffix(DELETED) == Some(path)
}

/// The path as the kernel would show it, of a file that need not be there.
fn absolute(path: &Path) -> PathBuf {
    let folder = match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => Path::new("/"),
    };
    match (fs::canonicalize(folder), path.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use loopd_dbus::properties::to_bus_path;

    use super::*;

    #[test]
    fn devices_are_told_from_files() {
        for word in ["loop3", "/dev/loop3"] {
            assert_eq!(Target::parse(OsStr::new(word)), Target::Device(3));
        }
        for word in ["./loop3", "loop", "loop03", "./loop3p1", "/tmp/loop3", "3", "x.img", ""] {
            assert_eq!(Target::parse(OsStr::new(word)), Target::File(word.into()), "{word}");
        }
        let bytes = OsString::from_vec(b"loop\xff".to_vec());
        assert_eq!(Target::parse(&bytes), Target::File(bytes.clone().into()));
    }

    #[test]
    fn partitions_are_told_from_devices_and_files() {
        for word in ["loop3p12", "/dev/loop3p12"] {
            assert_eq!(Target::parse(OsStr::new(word)), Target::Partition { disk: 3, number: 12 });
        }
        for other in ["/dev/loopp1", "/dev/sda1", "loop3p", "loop3p01", "loop3p1p2", "./loop3p1", "/"] {
            assert_eq!(Target::parse(OsStr::new(other)), Target::File(other.into()), "{other}");
        }
    }

    #[test]
    fn one_partition_can_be_picked() {
        let mut attached = crate::output::json::tests::example();
        attached.partitions.push(crate::output::json::tests::partition(12, 2));
        attached.keep_only(2).unwrap();
        assert_eq!(attached.partitions.len(), 1);
        assert_eq!(attached.partitions[0].volume.device, "/dev/loop0p2");
        let missing = attached.keep_only(7).unwrap_err().to_string();
        assert!(missing.starts_with("/dev/loop0 has no partition 7; `loopctl info /dev/loop0`"), "{missing}");
    }

    #[test]
    fn what_is_missing_is_explained() {
        let text = |word: &str| Target::parse(OsStr::new(word)).not_found().to_string();
        assert!(text("loop9").starts_with("nothing is attached to /dev/loop9; `loopctl list --all`"));
        assert!(text("/nonexistent/x").starts_with("there is no file /nonexistent/x"));
        assert!(text("/etc/passwd").starts_with("/etc/passwd is not attached"));
        assert_eq!(text("loop3p1"), "/dev/loop3p1 is a partition and goes with its device; name /dev/loop3");
    }

    #[test]
    fn removed_files_are_found_by_their_path() {
        let mut attachment = AttachmentProperties::default();
        for shown in [&b"/a/x.img"[..], b"/a/x.img (deleted)"] {
            attachment.backing_file = to_bus_path(shown);
            assert!(had_path(&attachment, Path::new("/a/x.img")));
            assert!(!had_path(&attachment, Path::new("/a/x")));
        }
    }

    #[test]
    fn paths_become_absolute_through_links() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(absolute(&real.join("link/gone.img")), real.join("gone.img"));
        assert_eq!(absolute(Path::new("gone.img")), std::env::current_dir().unwrap().join("gone.img"));
        assert_eq!(absolute(Path::new("/nonexistent/a/b")), Path::new("/nonexistent/a/b"));
    }

    #[test]
    fn links_to_loop_devices_are_followed_and_files_are_not_devices() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("loop3");
        fs::write(&file, b"").unwrap();
        assert_eq!(Target::resolve(file.as_os_str()), Target::File(file.clone()));
        if Path::new("/dev/loop0").exists() {
            let link = folder.path().join("link");
            std::os::unix::fs::symlink("/dev/loop0", &link).unwrap();
            assert_eq!(Target::resolve(link.as_os_str()), Target::Device(0));
        }
    }

    #[test]
    fn a_fifo_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open_to_identify(&fifo, &fs::metadata(&fifo).unwrap()).is_err());
    }
}
