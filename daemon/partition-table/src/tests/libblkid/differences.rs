//! The intended differences between this crate and libblkid, each with its reason.

use super::{Comparison, Row};
use crate::disk::u32_at;
use crate::{Reading, Warning, boot_sector};

/// A difference.
pub struct Difference {
    pub name: &'static str,
    pub reason: &'static str,
    /// Removes the difference from libblkid's result; false if there is none.
    pub remove: fn(&mut Comparison<'_>) -> bool,
}

pub const DIFFERENCES: [Difference; 16] = [
    Difference {
        name: "a partition past the end",
        reason: "libblkid lists what the table has; the kernel makes no node of what starts past the end",
        remove: |seen| {
            let end = seen.sectors;
            let is_past = |warning: &Warning| matches!(warning, Warning::PastEnd { .. });
            seen.drop_theirs(is_past, |start, _| start >= end)
        },
    },
    Difference {
        name: "a partition cut off by the end",
        reason: "libblkid lists what the table has; the kernel's node ends with the device",
        remove: |seen| {
            let (end, reading) = (seen.sectors, &seen.reading);
            let mut found = false;
            for (number, (start, size)) in &mut seen.theirs.rows {
                let is_cut = reading.warnings.contains(&Warning::Truncated { number: *number });
                if is_cut && *start < end && *start + *size > end {
                    (*size, found) = (end - *start, true);
                }
            }
            found
        },
    },
    Difference {
        name: "a GPT partition that ends before it starts",
        reason: "libblkid and the kernel list one of a size near 2^64",
        remove: |seen| {
            let is_inverted = |warning: &Warning| matches!(warning, Warning::EndsBeforeStart { .. });
            seen.drop_theirs(is_inverted, |_, size| size > 1 << 62 || size == 0)
        },
    },
    Difference {
        name: "a GPT partition outside the usable blocks",
        reason: "the kernel makes a node of it, libblkid leaves it out",
        remove: |seen| {
            let outside = numbers(&seen.reading, |warning| match warning {
                Warning::OutsideUsable { number } => Some(*number),
                _ => None,
            });
            let theirs = &mut seen.theirs.rows;
            let before = theirs.len();
            for (number, row) in seen.ours.rows.iter().filter(|(number, _)| outside.contains(number)) {
                theirs.entry(*number).or_insert(*row);
            }
            theirs.len() != before
        },
    },
    Difference {
        name: "numbers above 255",
        reason: "the kernel has no node for them",
        remove: |seen| {
            let before = seen.theirs.rows.len();
            seen.theirs.rows.retain(|number, _| *number <= 255);
            seen.theirs.rows.len() != before && seen.reading.warnings.contains(&Warning::TooManyPartitions)
        },
    },
    Difference {
        name: "a chain with a loop",
        reason: "libblkid and the kernel list its partitions again and again, up to some number",
        remove: |seen| {
            let before = seen.theirs.rows.len();
            let ours = &seen.ours.rows;
            let again = |row: &Row| ours.values().any(|own| own == row);
            seen.theirs.rows.retain(|number, row| ours.contains_key(number) || !again(row));
            seen.theirs.rows.len() != before && seen.reading.warnings.contains(&Warning::ChainLoop)
        },
    },
    Difference {
        name: "nested tables",
        reason: "tables of BSD within a DOS partition are not read; a warning names them",
        remove: |seen| {
            let is_nested = |warning: &Warning| matches!(warning, Warning::NestedTable { .. });
            let nested = std::mem::take(&mut seen.theirs.nested);
            seen.theirs.rows.retain(|number, _| !nested.contains(number));
            !nested.is_empty() && seen.reading.warnings.iter().any(is_nested)
        },
    },
    Difference {
        name: "a table in the boot sector of a volume",
        reason: "its entries are plausible, so that somebody partitioned the disk after it was formatted: people see \
                 the partitions, as with the kernel; libblkid sees the volume only",
        remove: |seen| {
            let is_in_volume = seen.case.image.first_chunk().is_some_and(boot_sector::is_of_volume);
            let found = is_in_volume && seen.ours.table == "dos" && seen.theirs.table.is_empty();
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a boot sector known by its name",
        reason: "a volume of exFAT, NTFS or BitLocker is one volume; libblkid knows them by more fields, and no version \
                 knows all three",
        remove: |seen| {
            let name = seen.case.image.get(3..11).unwrap_or_default();
            let is_named = [&b"NTFS    "[..], b"EXFAT   ", b"-FVE-FS-"].contains(&name);
            let found = is_named && seen.reading.is_volume && seen.theirs.table == "dos";
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a disk of AIX",
        reason: "libblkid names any sector with the magic number; for the kernel it is a DOS table if it has partitions \
                 of Linux, or if there are no logical volumes",
        remove: |seen| {
            let is_named = seen.theirs.table == "aix" || seen.case.block_size != 512;
            let has_magic = seen.case.image.starts_with(b"\xc9\xc2\xd4\xc1");
            let found = has_magic && is_named && seen.theirs.rows.is_empty();
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a protective MBR alone",
        reason: "libblkid has a name for it; there is no table and no partition",
        remove: |seen| {
            let found =
                seen.theirs.table == "PMBR" && seen.theirs.rows.is_empty() && seen.ours.table.is_empty();
            if found {
                seen.theirs.table.clear();
            }
            found
        },
    },
    Difference {
        name: "a protective entry that does not start at sector 1",
        reason: "the kernel reads no table then; a warning says so",
        remove: |seen| {
            let found =
                seen.reading.warnings.contains(&Warning::MisplacedProtection) && seen.theirs.table == "gpt";
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a backup that is not in the last block",
        reason: "the damaged primary names its place, which an image that was made larger needs; libblkid looks at the \
                 last block only",
        remove: |seen| {
            let is_backup = seen.reading.table.as_ref().is_some_and(|table| table.from_backup);
            let last = seen.case.image.len() / seen.case.block_size - 1;
            let block = &seen.case.image[last * seen.case.block_size..];
            let found = is_backup && !block.starts_with(b"EFI PART") && seen.theirs.rows.is_empty();
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a table cut off in a partition whose type has nested tables",
        reason: "libblkid gives up the whole table; the kernel makes nodes of what is there",
        remove: |seen| {
            let found =
                seen.theirs.rows.is_empty() && seen.ours.table == "dos" && has_nested_type_past_the_end(seen);
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a logical partition that starts where another one does",
        reason: "libblkid leaves it out, and the numbers behind it differ; the kernel makes a node of it",
        remove: |seen| {
            let rows = &seen.ours.rows;
            let is_first =
                |number: u32, start: u64| !rows.range(..number).any(|(_, (other, _))| *other == start);
            let kept = rows.iter().filter(|(number, (start, _))| **number < 5 || is_first(**number, *start));
            let found =
                kept.clone().count() < rows.len() && kept.map(|(_, row)| row).eq(seen.theirs.rows.values());
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
    Difference {
        name: "a table of another machine",
        reason: "tables of Atari, Sun, SGI and others are not read",
        remove: |seen| {
            let is_other = !["", "dos", "gpt", "PMBR", "aix"].contains(&seen.theirs.table.as_str());
            let found = is_other && seen.ours.table.is_empty();
            if found {
                seen.theirs = seen.ours.clone();
            }
            found
        },
    },
];

/// Whether an entry of the MBR ends past the image and has a type in which libblkid looks for nested tables.
fn has_nested_type_past_the_end(seen: &Comparison<'_>) -> bool {
    let sectors_of_block = seen.case.block_size as u64 / 512;
    [446, 462, 478, 494].into_iter().any(|offset| {
        let entry = &seen.case.image[offset..offset + 16];
        let end = u64::from(u32_at(entry, 8)) + u64::from(u32_at(entry, 12));
        [0x63, 0x81, 0x82, 0xa5, 0xa6, 0xa9, 0xbf].contains(&entry[4])
            && end * sectors_of_block > seen.sectors
    })
}

fn numbers(reading: &Reading, of: impl Fn(&Warning) -> Option<u32>) -> Vec<u32> {
    reading.warnings.iter().filter_map(of).collect()
}

impl Comparison<'_> {
    /// Drops the partitions of libblkid that a warning names and for which the function returns true.
    fn drop_theirs(&mut self, of: fn(&Warning) -> bool, is: impl Fn(u64, u64) -> bool) -> bool {
        let named = numbers(&self.reading, |warning| match warning {
            Warning::PastEnd { number } | Warning::EndsBeforeStart { number } if of(warning) => Some(*number),
            _ => None,
        });
        let before = self.theirs.rows.len();
        self.theirs.rows.retain(|number, (start, size)| !(named.contains(number) && is(*start, *size)));
        self.theirs.rows.len() != before
    }
}
