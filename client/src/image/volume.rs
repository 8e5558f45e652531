//! Volumes of an attachment: the whole device and each partition.

use std::fmt;

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::from_bus_path;
use zbus::wire::OwnedObjectPath;

use crate::bus::attachment::AttachmentInfo;
use crate::show::column::Column;
use crate::show::property::file;
use crate::show::table::{Row, Style, render};

/// udev's `ID_FS_USAGE` of what can be mounted.
pub const FILESYSTEM: &str = "filesystem";
/// udev's `ID_FS_USAGE` of an encrypted volume.
const CRYPTO: &str = "crypto";
/// The columns of the table of partitions to choose from.
const COLUMNS: &[Column] = &[Column::Number, Column::Size, Column::Type, Column::Label, Column::Partlabel];

/// A whole device or a partition.
#[derive(Clone, Copy, Debug)]
pub struct Volume<'a> {
    /// Its object on the bus.
    pub path: &'a OwnedObjectPath,
    /// Its number if it is a partition.
    pub partition: Option<u32>,
    /// `org.loopd1.Volume`.
    pub properties: &'a VolumeProperties,
}

impl Volume<'_> {
    fn has_filesystem(&self) -> bool {
        self.properties.usage == FILESYSTEM
    }

    /// Its mount points.
    pub fn mount_points(&self) -> impl Iterator<Item = &[u8]> {
        self.properties.mount_points.iter().map(|point| from_bus_path(point))
    }
}

/// The whole device, followed by its partitions.
#[must_use]
pub fn of(info: &AttachmentInfo) -> Vec<Volume<'_>> {
    let whole = Volume { path: &info.path, partition: None, properties: &info.volume };
    let partitions = info.partitions.iter().map(|one| Volume {
        path: &one.path,
        partition: Some(one.partition.number),
        properties: &one.volume,
    });
    std::iter::once(whole).chain(partitions).collect()
}

/// No volume was chosen.
#[derive(Clone, Debug, thiserror::Error)]
pub struct NoChoice {
    /// The reason.
    pub reason: String,
    /// A table of the partitions that ends with a newline.
    pub table: String,
}

impl fmt::Display for NoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Chooses the volume to mount: the requested partition; or the file system on the whole device, as on
/// hybrid images, whose partitions are parts of it; or the only partition with a file system. If there is
/// only one volume, it is chosen even if it cannot be mounted, so that loopd's error explains why.
///
/// # Errors
/// The partition does not exist, none has a file system, or more than one has.
pub fn choose(info: &AttachmentInfo, partition: Option<u32>) -> Result<Volume<'_>, NoChoice> {
    let all = of(info);
    let shown = format!("{} ({})", info.attachment.device, file(info));
    if let Some(number) = partition {
        let found = all.iter().find(|volume| volume.partition == Some(number));
        return found.copied().ok_or_else(|| no_choice(info, format!("{shown} has no partition {number}")));
    }
    let (whole, partitions) = (all[0], &all[1..]);
    if whole.has_filesystem() || partitions.is_empty() {
        return Ok(whole);
    }
    let mountable: Vec<_> = partitions.iter().filter(|volume| volume.has_filesystem()).collect();
    match (mountable.as_slice(), partitions) {
        ([one], _) => Ok(**one),
        ([], [one]) => Ok(*one),
        ([], _) => Err(no_choice(info, no_filesystem(&shown, partitions))),
        (several, _) => {
            let count = several.len();
            let reason = format!("{shown} has {count} file systems; choose one with --partition");
            Err(no_choice(info, reason))
        }
    }
}

fn no_filesystem(shown: &str, partitions: &[Volume<'_>]) -> String {
    let encrypted = partitions.iter().find(|volume| volume.properties.usage == CRYPTO);
    let remedy = encrypted.and_then(|volume| volume.partition).map(|number| {
        format!(
            "; partition {number} is encrypted: attach the image with `loopctl attach`, and unlock the \
             partition with `udisksctl unlock -b NODE`"
        )
    });
    format!("no partition of {shown} has a file system{}", remedy.unwrap_or_default())
}

fn no_choice(info: &AttachmentInfo, reason: String) -> NoChoice {
    let table =
        render(COLUMNS, &Row::of_partitions(info, COLUMNS), Style { legend: true, bold: false, width: None });
    NoChoice { reason, table }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example::{attachment, partition};

    /// An attachment with the `ID_FS_USAGE` of the whole device and of its partitions.
    fn device(whole: &str, partitions: &[&str]) -> AttachmentInfo {
        let mut info = attachment();
        info.volume.usage = whole.to_owned();
        info.partitions = (1..)
            .zip(partitions)
            .map(|(number, usage)| {
                let mut partition = partition(12, number);
                partition.volume.usage = (*usage).to_owned();
                partition
            })
            .collect();
        info
    }

    fn chosen(info: &AttachmentInfo, partition: Option<u32>) -> Option<u32> {
        choose(info, partition).unwrap().partition
    }

    #[test]
    fn the_only_file_system_is_chosen() {
        assert_eq!(chosen(&device("filesystem", &[]), None), None);
        assert_eq!(chosen(&device("", &["filesystem"]), None), Some(1));
        assert_eq!(chosen(&device("", &["other", "", "filesystem"]), None), Some(3));
        // A hybrid image: its partitions are parts of the file system on the whole.
        assert_eq!(chosen(&device("filesystem", &["filesystem", "filesystem"]), None), None);
    }

    #[test]
    fn a_single_volume_is_chosen_even_without_a_file_system() {
        assert_eq!(chosen(&device("", &[]), None), None);
        assert_eq!(chosen(&device("crypto", &[]), None), None);
        assert_eq!(chosen(&device("", &["other"]), None), Some(1));
    }

    #[test]
    fn a_partition_can_be_requested() {
        let hybrid = device("filesystem", &["filesystem", "filesystem"]);
        assert_eq!(chosen(&hybrid, Some(2)), Some(2));
        let none = choose(&hybrid, Some(3)).unwrap_err();
        assert_eq!(none.reason, "/dev/loop0 (/home/a/x.img) has no partition 3");
        assert_eq!(none.table.lines().count(), 3);
    }

    #[test]
    fn none_of_several_is_chosen_and_all_are_listed() {
        let several = device("", &["filesystem", "other", "filesystem"]);
        let none = choose(&several, None).unwrap_err();
        let reason = "/dev/loop0 (/home/a/x.img) has 2 file systems; choose one with --partition";
        assert_eq!(none.to_string(), reason);
        let mut lines = none.table.lines();
        assert_eq!(lines.next().unwrap(), "NUMBER  SIZE  TYPE  LABEL  PARTLABEL");
        assert_eq!(lines.next().unwrap(), "1       20M   ext4  data   -");
        assert_eq!(lines.count(), 2);
    }

    #[test]
    fn encrypted_partitions_are_named() {
        let none = choose(&device("", &["", "crypto"]), None).unwrap_err();
        let expected = "no partition of /dev/loop0 (/home/a/x.img) has a file system; partition 2 is \
            encrypted: attach the image with `loopctl attach`, and unlock the partition with \
            `udisksctl unlock -b NODE`";
        assert_eq!(none.reason, expected);
        let none = choose(&device("", &["", "other"]), None).unwrap_err();
        assert_eq!(none.reason, "no partition of /dev/loop0 (/home/a/x.img) has a file system");
    }
}
