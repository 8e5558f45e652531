//! Volumes of an attachment: the whole device and each partition.

use std::fmt;

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::from_bus_path;
use zbus::wire::OwnedObjectPath;

use crate::bus::attachment::AttachmentInfo;
use crate::bus::cleartext::CleartextInfo;
use crate::show::column::Column;
use crate::show::property::{CRYPTO, file};
use crate::show::table::{Row, Style, render};

/// udev's `ID_FS_USAGE` of what can be mounted.
pub const FILESYSTEM: &str = "filesystem";
/// The columns of the table of partitions to choose from.
const COLUMNS: &[Column] = &[Column::Number, Column::Size, Column::Type, Column::Label, Column::Partlabel];

/// A whole device or a partition, or its cleartext.
#[derive(Clone, Copy, Debug)]
pub struct Volume<'a> {
    /// Its object on the bus.
    pub path: &'a OwnedObjectPath,
    /// Its number if it is a partition.
    pub partition: Option<u32>,
    /// `org.loopd1.Volume`.
    pub properties: &'a VolumeProperties,
    /// Its cleartext if it is unlocked.
    pub cleartext: Option<&'a CleartextInfo>,
    /// The object of the encrypted volume if this is a cleartext.
    pub encrypted: Option<&'a OwnedObjectPath>,
}

impl<'a> Volume<'a> {
    fn has_filesystem(&self) -> bool {
        self.properties.usage == FILESYSTEM
    }

    /// Whether it is recognized as encrypted, or unlocked.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.properties.usage == CRYPTO || self.cleartext.is_some()
    }

    /// What can be mounted: its cleartext if it is unlocked, and otherwise itself.
    #[must_use]
    pub fn content(self) -> Self {
        match self.cleartext {
            Some(cleartext) => Self {
                path: &cleartext.path,
                properties: &cleartext.volume,
                cleartext: None,
                encrypted: Some(self.path),
                ..self
            },
            None => self,
        }
    }

    /// Its mount points.
    pub fn mount_points(&self) -> impl Iterator<Item = &[u8]> {
        self.properties.mount_points.iter().map(|point| from_bus_path(point))
    }
}

/// The whole device, followed by its partitions.
#[must_use]
pub fn of(info: &AttachmentInfo) -> Vec<Volume<'_>> {
    let whole = Volume {
        path: &info.path,
        partition: None,
        properties: &info.volume,
        cleartext: info.cleartext.as_ref(),
        encrypted: None,
    };
    let partitions = info.partitions.iter().map(|one| Volume {
        path: &one.path,
        partition: Some(one.partition.number),
        properties: &one.volume,
        cleartext: one.cleartext.as_ref(),
        encrypted: None,
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
/// hybrid images, whose partitions are parts of it; or the only partition with a file system; or, if none has one, the only
/// encrypted partition. If there is only one volume, it is chosen even if it cannot be mounted, so that loopd's error
/// explains why.
///
/// # Errors
/// The partition does not exist, none has a file system, or more than one has.
pub fn choose(info: &AttachmentInfo, partition: Option<u32>) -> Result<Volume<'_>, NoChoice> {
    if let Some(number) = partition {
        return requested(info, number);
    }
    let all = of(info);
    let (whole, partitions) = (all[0], &all[1..]);
    if whole.has_filesystem() || partitions.is_empty() {
        return Ok(whole);
    }
    let mountable: Vec<_> = partitions.iter().filter(|volume| volume.has_filesystem()).collect();
    let encrypted: Vec<_> = partitions.iter().filter(|volume| volume.is_encrypted()).collect();
    match (mountable.as_slice(), encrypted.as_slice(), partitions) {
        ([one], _, _) | ([], [one], _) => Ok(**one),
        ([], [], [one]) => Ok(*one),
        ([], [], _) => Err(no_choice(info, format!("no partition of {} has a file system", shown(info)))),
        ([], several, _) => Err(several_of(info, several.len(), "encrypted partitions")),
        (several, _, _) => Err(several_of(info, several.len(), "file systems")),
    }
}

/// Chooses the volume to unlock: the requested partition; or the whole device if it is encrypted or has no partitions; or
/// the only encrypted partition.
///
/// # Errors
/// The partition does not exist, none is encrypted, or more than one is.
pub fn choose_encrypted(info: &AttachmentInfo, partition: Option<u32>) -> Result<Volume<'_>, NoChoice> {
    if let Some(number) = partition {
        return requested(info, number);
    }
    let all = of(info);
    let (whole, partitions) = (all[0], &all[1..]);
    if whole.is_encrypted() || partitions.is_empty() {
        return Ok(whole);
    }
    let encrypted: Vec<_> = partitions.iter().filter(|volume| volume.is_encrypted()).collect();
    match (encrypted.as_slice(), partitions) {
        ([one], _) => Ok(**one),
        ([], [one]) => Ok(*one),
        ([], _) => {
            let reason = format!(
                "no partition of {} is recognized as encrypted; choose one with --partition",
                shown(info)
            );
            Err(no_choice(info, reason))
        }
        (several, _) => Err(several_of(info, several.len(), "encrypted partitions")),
    }
}

fn requested(info: &AttachmentInfo, number: u32) -> Result<Volume<'_>, NoChoice> {
    let found = of(info).into_iter().find(|volume| volume.partition == Some(number));
    found.ok_or_else(|| no_choice(info, format!("{} has no partition {number}", shown(info))))
}

fn several_of(info: &AttachmentInfo, count: usize, what: &str) -> NoChoice {
    no_choice(info, format!("{} has {count} {what}; choose one with --partition", shown(info)))
}

fn shown(info: &AttachmentInfo) -> String {
    format!("{} ({})", info.attachment.device, file(info))
}

fn no_choice(info: &AttachmentInfo, reason: String) -> NoChoice {
    let table =
        render(COLUMNS, &Row::of_partitions(info, COLUMNS), Style { legend: true, bold: false, width: None });
    NoChoice { reason, table }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example::{attachment, cleartext, partition};

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
    fn the_only_encrypted_partition_is_chosen_if_none_has_a_file_system() {
        assert_eq!(chosen(&device("", &["", "crypto"]), None), Some(2));
        assert_eq!(chosen(&device("", &["filesystem", "crypto"]), None), Some(1));
        let none = choose(&device("", &["crypto", "crypto"]), None).unwrap_err();
        let reason = "/dev/loop0 (/home/a/x.img) has 2 encrypted partitions; choose one with --partition";
        assert_eq!(none.reason, reason);
        let none = choose(&device("", &["", "other"]), None).unwrap_err();
        assert_eq!(none.reason, "no partition of /dev/loop0 (/home/a/x.img) has a file system");
    }

    #[test]
    fn the_volume_to_unlock_is_encrypted_or_requested() {
        let chosen = |info: &AttachmentInfo, partition| {
            choose_encrypted(info, partition).map(|volume| volume.partition).map_err(|none| none.reason)
        };
        assert_eq!(chosen(&device("crypto", &[]), None), Ok(None));
        // VeraCrypt: nothing is recognized.
        assert_eq!(chosen(&device("", &[]), None), Ok(None));
        assert_eq!(chosen(&device("", &["filesystem", "crypto"]), None), Ok(Some(2)));
        assert_eq!(chosen(&device("", &[""]), None), Ok(Some(1)));
        assert_eq!(chosen(&device("", &["crypto", "crypto"]), Some(2)), Ok(Some(2)));
        assert!(
            chosen(&device("", &["crypto", "crypto"]), None).unwrap_err().contains("2 encrypted partitions")
        );
        assert!(
            chosen(&device("", &["", ""]), None).unwrap_err().contains("is recognized as encrypted; choose")
        );
        assert!(chosen(&device("crypto", &[]), Some(1)).unwrap_err().contains("has no partition 1"));
    }

    #[test]
    fn the_content_of_an_unlocked_volume_is_its_cleartext() {
        let mut info = device("crypto", &[]);
        assert_eq!(of(&info)[0].content().path, &info.path);
        info.cleartext = Some(cleartext(None));
        let content = of(&info)[0].content();
        assert_eq!(content.path.as_str(), "/org/loopd1/attachment/12/cleartext");
        assert_eq!((content.properties.device.as_str(), content.encrypted), ("/dev/dm-3", Some(&info.path)));
    }
}
