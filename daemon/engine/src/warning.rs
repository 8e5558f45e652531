//! Warnings: what is unusual about an attachment, for its user. A warning makes no call fail.

use std::fmt;

use crate::image_format::ImageFormat;

/// What describes the size of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Describer {
    /// The partition table.
    PartitionTable,
    /// The superblock of an ext2, ext3 or ext4 file system.
    Ext,
    /// The superblock of a squashfs.
    Squashfs,
    /// The volume descriptor of an ISO 9660 file system.
    Iso9660,
}

impl fmt::Display for Describer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PartitionTable => "partition table",
            Self::Ext => "ext file system",
            Self::Squashfs => "squashfs file system",
            Self::Iso9660 => "ISO 9660 file system",
        })
    }
}

/// Why no event of udev has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// udev has not processed the device, and does not answer.
    NotRunning,
    /// udev has processed the device, and its event has not arrived.
    NotHeard,
}

/// Why a partition has no node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMade {
    /// It lies past the end of the image.
    PastEnd,
    /// Its last sector comes before its first.
    EndsBeforeStart,
    /// It shares bytes with the partition of this number.
    Overlaps(u32),
    /// It is not made of whole blocks.
    Unaligned,
    /// No node can have its number, nor a higher one.
    NumberTooHigh,
    /// The kernel has refused it.
    Refused,
}

/// A warning. It has a stable code and details for programs; `Display` writes its message in English. A message
/// has fixed texts and numbers, and no bytes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// The bytes are of another format than the disk that they stand for.
    NotRaw(ImageFormat),
    /// The image describes more than there is.
    Truncated {
        /// What describes it.
        by: Describer,
        /// The described size in bytes.
        described: u64,
        /// How many bytes are missing.
        bytes: u64,
    },
    /// The last bytes are no whole sector.
    UnreachableTail {
        /// How many.
        bytes: u64,
        /// The size of a sector in bytes.
        sector: u32,
    },
    /// The partition table counts sectors of another size than the device has.
    SectorSize {
        /// The size in bytes that it was written for.
        written: u32,
        /// The logical block size of the device in bytes.
        device: u32,
    },
    /// The partition table is damaged: a sentence of the reader, without bytes of the image.
    TableDamaged(String),
    /// A partition table, or a part of one, is not used: a sentence of the reader, without bytes of the image.
    TableIgnored(String),
    /// A partition of the table has no node.
    PartitionNotMade {
        /// Its number.
        number: u32,
        /// Why.
        reason: NotMade,
    },
    /// udev's events do not arrive.
    UdevSilent(Silence),
}

impl Warning {
    /// The code on the bus and in JSON, which never changes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotRaw(_) => "not-raw",
            Self::Truncated { .. } => "truncated",
            Self::UnreachableTail { .. } => "unreachable-tail",
            Self::SectorSize { .. } => "sector-size",
            Self::TableDamaged(_) => "table-damaged",
            Self::TableIgnored(_) => "table-ignored",
            Self::PartitionNotMade { .. } => "partition-not-made",
            Self::UdevSilent(_) => "udev-silent",
        }
    }

    /// The detail `bytes`.
    #[must_use]
    pub const fn bytes(&self) -> Option<u64> {
        match self {
            Self::Truncated { bytes, .. } | Self::UnreachableTail { bytes, .. } => Some(*bytes),
            _ => None,
        }
    }

    /// The detail `number`: of a partition, or the sector size that a table was written for.
    #[must_use]
    pub const fn number(&self) -> Option<u32> {
        match self {
            Self::SectorSize { written, .. } => Some(*written),
            Self::PartitionNotMade { number, .. } => Some(*number),
            _ => None,
        }
    }

    /// The detail `format`.
    #[must_use]
    pub const fn format(&self) -> Option<&'static str> {
        match self {
            Self::NotRaw(format) => Some(format.as_str()),
            _ => None,
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRaw(format) => write!(
                f,
                "this is {}, and the device shows its bytes as they are; {}",
                format.description(),
                format.remedy()
            ),
            Self::Truncated { by, described, bytes } => {
                write!(f, "{} missing at the end: the {by} describes {described} bytes", Missing(*bytes))
            }
            Self::UnreachableTail { bytes: 1, sector } => write!(
                f,
                "the last byte cannot be reached: the device has whole sectors of {sector} bytes only"
            ),
            Self::UnreachableTail { bytes, sector } => write!(
                f,
                "the last {bytes} bytes cannot be reached: the device has whole sectors of {sector} bytes only"
            ),
            Self::SectorSize { written, device } => write!(
                f,
                "the partition table counts sectors of {written} bytes and the device has {device}: its partitions \
                 are right with a block size of {written} only"
            ),
            Self::TableDamaged(sentence) | Self::TableIgnored(sentence) => f.write_str(sentence),
            Self::PartitionNotMade { number, reason } => match reason {
                NotMade::PastEnd => write!(f, "partition {number} has no node: it lies past the end"),
                NotMade::EndsBeforeStart => {
                    write!(f, "partition {number} has no node: it ends before it starts")
                }
                NotMade::Overlaps(other) => {
                    write!(f, "partition {number} has no node: it overlaps partition {other}")
                }
                NotMade::Unaligned => {
                    write!(f, "partition {number} has no node: it is not made of whole blocks")
                }
                NotMade::NumberTooHigh => write!(f, "partitions from number {number} on cannot have a node"),
                NotMade::Refused => write!(f, "partition {number} has no node: the kernel has refused it"),
            },
            Self::UdevSilent(Silence::NotRunning) => f.write_str(
                "udev does not answer, so that the file system is not known and /dev/disk has no links to the device; \
                 is systemd-udevd running?",
            ),
            Self::UdevSilent(Silence::NotHeard) => f.write_str(
                "udev's events do not arrive, as in a container or another network namespace: what udev has found was \
                 read from its database, and later changes may not be noticed",
            ),
        }
    }
}

/// How many bytes are missing, with the verb.
struct Missing(u64);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("1 byte is"),
            bytes => write!(f, "{bytes} bytes are"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Warning> {
        let formats = ImageFormat::ALL.into_iter().map(Warning::NotRaw);
        let describers = [Describer::PartitionTable, Describer::Ext, Describer::Squashfs, Describer::Iso9660];
        let truncated = describers.map(|by| Warning::Truncated { by, described: u64::MAX, bytes: u64::MAX });
        let reasons = [
            NotMade::PastEnd,
            NotMade::EndsBeforeStart,
            NotMade::Overlaps(u32::MAX),
            NotMade::Unaligned,
            NotMade::NumberTooHigh,
            NotMade::Refused,
        ];
        let not_made = reasons.map(|reason| Warning::PartitionNotMade { number: u32::MAX, reason });
        let others = [
            Warning::UnreachableTail { bytes: u64::MAX, sector: u32::MAX },
            Warning::SectorSize { written: u32::MAX, device: u32::MAX },
            Warning::TableDamaged("a sentence".to_owned()),
            Warning::TableIgnored("a sentence".to_owned()),
            Warning::UdevSilent(Silence::NotRunning),
            Warning::UdevSilent(Silence::NotHeard),
        ];
        formats.chain(truncated).chain(not_made).chain(others).collect()
    }

    #[test]
    fn messages_are_short_and_printable() {
        for warning in all() {
            let message = warning.to_string();
            assert!(!message.is_empty() && message.len() <= 240, "{message}");
            assert!(message.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{message}");
            assert!(!message.contains("loopctl") && !message.contains("--"), "{message}");
        }
    }

    #[test]
    fn details_are_those_of_the_contract() {
        let details =
            |warning: Warning| (warning.code(), warning.bytes(), warning.number(), warning.format());
        let truncated = Warning::Truncated { by: Describer::Ext, described: 9, bytes: 5 };
        let not_made = Warning::PartitionNotMade { number: 7, reason: NotMade::PastEnd };
        assert_eq!(details(truncated), ("truncated", Some(5), None, None));
        let tail = Warning::UnreachableTail { bytes: 65, sector: 512 };
        assert_eq!(details(tail), ("unreachable-tail", Some(65), None, None));
        let sector_size = Warning::SectorSize { written: 4096, device: 512 };
        assert_eq!(details(sector_size), ("sector-size", None, Some(4096), None));
        assert_eq!(details(not_made), ("partition-not-made", None, Some(7), None));
        assert_eq!(details(Warning::NotRaw(ImageFormat::Xz)), ("not-raw", None, None, Some("xz")));
        let sentence = "a sentence".to_owned();
        assert_eq!(details(Warning::TableDamaged(sentence.clone())), ("table-damaged", None, None, None));
        assert_eq!(details(Warning::TableIgnored(sentence)), ("table-ignored", None, None, None));
    }

    #[test]
    fn messages_read_as_sentences() {
        let shown = |warning: Warning| warning.to_string();
        assert_eq!(
            shown(Warning::NotRaw(ImageFormat::Qcow2)),
            "this is a qcow2 image, and the device shows its bytes as they are; convert it to raw first, for example \
             with qemu-img convert -O raw"
        );
        assert_eq!(
            shown(Warning::Truncated { by: Describer::PartitionTable, described: 1024, bytes: 512 }),
            "512 bytes are missing at the end: the partition table describes 1024 bytes"
        );
        assert_eq!(
            shown(Warning::Truncated { by: Describer::Squashfs, described: 1000, bytes: 1 }),
            "1 byte is missing at the end: the squashfs file system describes 1000 bytes"
        );
        assert_eq!(
            shown(Warning::UnreachableTail { bytes: 65, sector: 512 }),
            "the last 65 bytes cannot be reached: the device has whole sectors of 512 bytes only"
        );
        let one = shown(Warning::UnreachableTail { bytes: 1, sector: 512 });
        assert!(one.starts_with("the last byte cannot be reached"), "{one}");
    }
}
