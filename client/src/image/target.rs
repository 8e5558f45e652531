//! TARGET on the command line: a loop device, a partition or a backing file.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use loopd_dbus::ListOptions;
use loopd_dbus::proxy::Manager;

use super::backing_file::{is_same_file, open_to_identify};
use super::earlier_file::{self, Owners};
use crate::bus::attachment::{AttachmentInfo, add_partitions, list};
use crate::bus::connection::Bus;
use crate::device_node::{device_node, loop_number, partition_node, partition_numbers};
use crate::message::{printable, reason};

/// What the user named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/dev/loopN`.
    Device(u32),
    /// `/dev/loopNpM`. It may itself be the backing file of attachments.
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
    /// Distinguishes devices from files by the argument alone: `loop3` and `/dev/loop3` are devices even
    /// if the current directory has a file of that name (that one is `./loop3`). The same applies to
    /// partitions.
    #[must_use]
    pub fn parse(argument: &OsStr) -> Self {
        let device = argument.to_str().and_then(|text| {
            let whole = loop_number(text).map(Self::Device);
            whole.or_else(|| partition_numbers(text).map(|(disk, number)| Self::Partition { disk, number }))
        });
        device.unwrap_or_else(|| Self::File(argument.into()))
    }

    /// As [`Target::parse`], and follows symbolic links, such as those in `/dev/disk`, to a loop device
    /// or to a partition of one.
    #[must_use]
    pub fn resolve(argument: &OsStr) -> Self {
        let target = Self::parse(argument);
        if let Self::File(path) = &target
            && let Ok(real) = fs::canonicalize(path)
            && let device @ (Self::Device(_) | Self::Partition { .. }) = Self::parse(real.as_os_str())
        {
            return device;
        }
        target
    }

    /// The device of a partition; any other target unchanged.
    #[must_use]
    pub fn device(&self) -> Self {
        match self {
            Self::Partition { disk, .. } => Self::Device(*disk),
            other => other.clone(),
        }
    }

    /// The number of the partition that it names.
    #[must_use]
    pub fn partition(&self) -> Option<u32> {
        match self {
            Self::Partition { number, .. } => Some(*number),
            Self::Device(_) | Self::File(_) => None,
        }
    }

    /// The attachments of the target; at least one. A path names the devices of the file that it has now, or if there
    /// is none, the device of the file that had it before.
    ///
    /// # Errors
    /// There is none, or the call failed.
    pub async fn find(&self, manager: &Manager) -> anyhow::Result<Vec<AttachmentInfo>> {
        let found = self.attachments(manager, Owners::All).await?;
        if found.is_empty() { Err(self.not_found()) } else { Ok(found) }
    }

    /// As [`Target::find`], but only an attachment of the user counts for a file that had the path before.
    ///
    /// # Errors
    /// There is none, or the call failed.
    pub async fn find_to_mount(&self, manager: &Manager) -> anyhow::Result<Vec<AttachmentInfo>> {
        let found = self.attachments(manager, Owners::Own).await?;
        if found.is_empty() { Err(self.not_found()) } else { Ok(found) }
    }

    /// As [`Target::find`], with the partitions. A partition that is not itself attached gives its
    /// device, with this partition only.
    ///
    /// # Errors
    /// There is none, or the call failed.
    pub async fn find_with_partitions(&self, bus: &Bus) -> anyhow::Result<Vec<AttachmentInfo>> {
        let mut found = self.attachments(&bus.manager, Owners::All).await?;
        let only = match *self {
            Self::Partition { disk, number } if found.is_empty() => {
                found = Self::Device(disk).find(&bus.manager).await?;
                Some(number)
            }
            _ if found.is_empty() => return Err(self.not_found()),
            _ => None,
        };
        add_partitions(&bus.connection, &mut found).await?;
        if let Some(number) = only {
            found.iter_mut().try_for_each(|info| keep_partition(info, number))?;
        }
        Ok(found)
    }

    async fn attachments(&self, manager: &Manager, owners: Owners) -> anyhow::Result<Vec<AttachmentInfo>> {
        match self {
            Self::Device(number) => {
                let mut all = list(manager, &ListOptions { all: true, ..ListOptions::default() }).await?;
                all.retain(|info| info.attachment.number == *number);
                Ok(all)
            }
            Self::Partition { disk, number } => {
                attachments_of_file(manager, Path::new(&partition_node(*disk, *number))).await
            }
            Self::File(path) => {
                let found = attachments_of_file(manager, path).await?;
                if !found.is_empty() {
                    return Ok(found);
                }
                Ok(earlier_file::find(manager, path, owners).await?.into_iter().collect())
            }
        }
    }

    fn not_found(&self) -> anyhow::Error {
        let hint = "`loopctl list --all` shows what is attached";
        match self {
            Self::Device(number) => {
                anyhow::anyhow!("nothing is attached to {}; {hint}", device_node(*number))
            }
            Self::Partition { disk, number } => anyhow::anyhow!(
                "{} is a partition and is detached with its device; name {}",
                partition_node(*disk, *number),
                device_node(*disk)
            ),
            Self::File(path) => {
                let shown = printable(path.as_os_str().as_bytes());
                match fs::symlink_metadata(path).map_err(|error| (error.kind(), reason(&error))) {
                    Ok(_) => anyhow::anyhow!("{shown} is not attached to a loop device; {hint}"),
                    Err((ErrorKind::NotFound, _)) => anyhow::anyhow!(
                        "{shown} does not exist, and no deleted file of this path is attached; {hint}"
                    ),
                    Err((_, reason)) => anyhow::anyhow!(
                        "cannot find {shown}: {reason}; name the device node, which `loopctl list --all` shows"
                    ),
                }
            }
        }
    }
}

fn keep_partition(info: &mut AttachmentInfo, number: u32) -> anyhow::Result<()> {
    info.partitions.retain(|partition| partition.partition.number == number);
    let device = &info.attachment.device;
    anyhow::ensure!(
        !info.partitions.is_empty(),
        "{device} has no partition {number}; `loopctl info {device}` shows its partitions"
    );
    Ok(())
}

/// The attachments of the file that has this path now, by device and inode.
async fn attachments_of_file(manager: &Manager, path: &Path) -> anyhow::Result<Vec<AttachmentInfo>> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(Vec::new()) };
    let all = ListOptions { all: true, ..ListOptions::default() };
    if let Ok(file) = open_to_identify(path, &metadata) {
        return list(manager, &ListOptions { file: Some(file.into()), ..all }).await;
    }
    // The file is unreadable: compare what loopd lists.
    let mut found = list(manager, &all).await?;
    found.retain(|info| is_same_file(&info.attachment, &metadata));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::bus::example::{attachment, partition};

    #[test]
    fn node_names_are_devices_and_everything_else_is_a_file() {
        for name in ["loop3", "/dev/loop3"] {
            assert_eq!(Target::parse(OsStr::new(name)), Target::Device(3));
        }
        for name in ["./loop3", "loop", "loop03", "./loop3p1", "/tmp/loop3", "3", "x.img", ""] {
            assert_eq!(Target::parse(OsStr::new(name)), Target::File(name.into()), "{name}");
        }
        let bytes = OsString::from_vec(b"loop\xff".to_vec());
        assert_eq!(Target::parse(&bytes), Target::File(bytes.clone().into()));
    }

    #[test]
    fn partition_nodes_are_partitions() {
        for name in ["loop3p12", "/dev/loop3p12"] {
            assert_eq!(Target::parse(OsStr::new(name)), Target::Partition { disk: 3, number: 12 });
        }
        for other in ["/dev/loopp1", "/dev/sda1", "loop3p", "loop3p01", "loop3p1p2", "./loop3p1", "/"] {
            assert_eq!(Target::parse(OsStr::new(other)), Target::File(other.into()), "{other}");
        }
    }

    #[test]
    fn other_partitions_are_removed_and_a_missing_one_is_an_error() {
        let mut info = attachment();
        info.partitions.push(partition(12, 2));
        keep_partition(&mut info, 2).unwrap();
        assert_eq!(info.partitions.len(), 1);
        assert_eq!(info.partitions[0].volume.device, "/dev/loop0p2");
        let missing = keep_partition(&mut info, 7).unwrap_err().to_string();
        assert!(missing.starts_with("/dev/loop0 has no partition 7; `loopctl info /dev/loop0`"), "{missing}");
    }

    #[test]
    fn a_target_without_attachment_is_explained() {
        let text = |name: &str| Target::parse(OsStr::new(name)).not_found().to_string();
        assert!(text("loop9").starts_with("nothing is attached to /dev/loop9; `loopctl list --all`"));
        assert!(text("/nonexistent/x").starts_with("/nonexistent/x does not exist"));
        assert!(text("/etc/passwd").starts_with("/etc/passwd is not attached"));
        assert!(
            text("/etc/passwd/x").starts_with("cannot find /etc/passwd/x: Not a directory; name the device")
        );
        assert_eq!(
            text("loop3p1"),
            "/dev/loop3p1 is a partition and is detached with its device; name /dev/loop3"
        );
    }

    #[test]
    fn links_to_loop_devices_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("loop3");
        fs::write(&file, b"").unwrap();
        assert_eq!(Target::resolve(file.as_os_str()), Target::File(file.clone()));
        if Path::new("/dev/loop0").exists() {
            let link = directory.path().join("link");
            std::os::unix::fs::symlink("/dev/loop0", &link).unwrap();
            assert_eq!(Target::resolve(link.as_os_str()), Target::Device(0));
        }
    }
}
