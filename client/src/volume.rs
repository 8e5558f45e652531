//! What of an attachment may hold a file system: the whole device, and each partition.

use std::fmt;

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::from_bus_path;
use zbus::wire::OwnedObjectPath;

use crate::cli::Column;
use crate::output::table::{Row, Style, file, render};
use crate::target::Attached;

/// udev's word for what can be mounted.
const FILESYSTEM: &str = "filesystem";
/// udev's word for what is encrypted.
const CRYPTO: &str = "crypto";
/// What is told of the partitions to choose from.
const COLUMNS: &[Column] = &[Column::Number, Column::Size, Column::Type, Column::Label, Column::Partlabel];

/// A device or a partition.
#[derive(Clone, Copy, Debug)]
pub struct Volume<'a> {
    /// Its object on the bus.
    pub path: &'a OwnedObjectPath,
    /// Its number, where it is a partition.
    pub partition: Option<u32>,
    /// `org.loopd1.Volume`.
    pub properties: &'a VolumeProperties,
}

impl Volume<'_> {
    fn has_filesystem(&self) -> bool {
        self.properties.usage == FILESYSTEM
    }

    /// Where it is mounted.
    pub fn mount_points(&self) -> impl Iterator<Item = &[u8]> {
        self.properties.mount_points.iter().map(|point| from_bus_path(point))
    }
}

/// The whole device, and then its partitions.
#[must_use]
pub fn of(attached: &Attached) -> Vec<Volume<'_>> {
    let whole = Volume { path: &attached.path, partition: None, properties: &attached.volume };
    let partitions = attached.partitions.iter().map(|one| Volume {
        path: &one.path,
        partition: Some(one.partition.number),
        properties: &one.volume,
    });
    std::iter::once(whole).chain(partitions).collect()
}

/// Nothing was chosen: why, and a table of what there is.
#[derive(Clone, Debug, thiserror::Error)]
pub struct NoChoice {
    /// Why.
    pub reason: String,
    /// The partitions, as a table with a newline at its end.
    pub table: String,
}

impl fmt::Display for NoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The volume to mount: the partition that is asked for; or the file system on the whole device, as
/// on hybrid images, whose partitions are parts of it; or the only partition with a file system.
/// Where there is but one volume, loopd says what it is if it cannot be mounted.
///
/// # Errors
/// There is no such partition, none that can be mounted, or more than one.
pub fn choose(attached: &Attached, partition: Option<u32>) -> Result<Volume<'_>, NoChoice> {
    let all = of(attached);
    let shown = format!("{} ({})", attached.attachment.device, file(attached));
    if let Some(number) = partition {
        let found = all.iter().find(|volume| volume.partition == Some(number));
        return found
            .copied()
            .ok_or_else(|| no_choice(attached, format!("{shown} has no partition {number}")));
    }
    let (whole, partitions) = (all[0], &all[1..]);
    if whole.has_filesystem() || partitions.is_empty() {
        return Ok(whole);
    }
    let mountable: Vec<_> = partitions.iter().filter(|volume| volume.has_filesystem()).collect();
    match (mountable.as_slice(), partitions) {
        ([one], _) => Ok(**one),
        ([], [one]) => Ok(*one),
        ([], _) => Err(no_choice(attached, nothing_mountable(&shown, partitions))),
        (several, _) => {
            let count = several.len();
            let reason = format!("{shown} has {count} file systems; choose one with --partition");
            Err(no_choice(attached, reason))
        }
    }
}

fn nothing_mountable(shown: &str, partitions: &[Volume<'_>]) -> String {
    let encrypted = partitions.iter().find(|volume| volume.properties.usage == CRYPTO);
    let remedy = encrypted.and_then(|volume| volume.partition).map(|number| {
        format!(
            "; partition {number} is encrypted: attach the image with `loopctl attach`, and unlock the \
             partition's node with `udisksctl unlock -b`"
        )
    });
    format!("no partition of {shown} holds a file system{}", remedy.unwrap_or_default())
}

fn no_choice(attached: &Attached, reason: String) -> NoChoice {
    let table = render(
        COLUMNS,
        &Row::of_partitions(attached, COLUMNS),
        Style { legend: true, bold: false, width: None },
    );
    NoChoice { reason, table }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::json::tests::{example, partition};

    /// The whole device, and its partitions from 1 on, with what udev says of their use.
    fn device(whole: &str, partitions: &[&str]) -> Attached {
        let mut attached = example();
        attached.volume.usage = whole.to_owned();
        attached.partitions = (1..)
            .zip(partitions)
            .map(|(number, usage)| {
                let mut partition = partition(12, number);
                partition.volume.usage = (*usage).to_owned();
                partition
            })
            .collect();
        attached
    }

    fn chosen(attached: &Attached, partition: Option<u32>) -> Option<u32> {
        choose(attached, partition).unwrap().partition
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
    fn what_loopd_is_to_explain_is_chosen_too() {
        assert_eq!(chosen(&device("", &[]), None), None);
        assert_eq!(chosen(&device("crypto", &[]), None), None);
        assert_eq!(chosen(&device("", &["other"]), None), Some(1));
    }

    #[test]
    fn a_partition_can_be_asked_for() {
        let hybrid = device("filesystem", &["filesystem", "filesystem"]);
        assert_eq!(chosen(&hybrid, Some(2)), Some(2));
        let none = choose(&hybrid, Some(3)).unwrap_err();
        assert_eq!(none.reason, "/dev/loop0 (/home/a/x.img) has no partition 3");
        assert_eq!(none.table.lines().count(), 3);
    }

    #[test]
    fn of_several_none_is_chosen_and_all_are_listed() {
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
    fn what_is_encrypted_is_named() {
        let none = choose(&device("", &["", "crypto"]), None).unwrap_err();
        let expected = "no partition of /dev/loop0 (/home/a/x.img) holds a file system; partition 2 is \
            encrypted: attach the image with `loopctl attach`, and unlock the partition's node with \
            `udisksctl unlock -b`";
        assert_eq!(none.reason, expected);
        let none = choose(&device("", &["", "other"]), None).unwrap_err();
        assert_eq!(none.reason, "no partition of /dev/loop0 (/home/a/x.img) holds a file system");
    }
}
