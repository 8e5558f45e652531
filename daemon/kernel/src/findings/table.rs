//! Selects the warnings about a partition table that the user sees. The log has all of them.

use loopd_engine::Warning;
use loopd_engine::kernel::{NotMade, PartitionNode};
use loopd_partition_table::{self as format, Fault, MAX_PARTITIONS, Partition, Reading, Refusal};

/// The partitions of a device when its table was read.
#[derive(Clone, Copy)]
pub struct Nodes<'a> {
    /// Those that have nodes.
    pub nodes: &'a [PartitionNode],
    /// Whether partitions should have nodes.
    pub wanted: bool,
    /// Whether missing nodes may still appear, or loopd lacks the privilege to make them. Then the partitions are not
    /// the cause.
    pub incomplete: bool,
}

/// The warnings about a table. `is_cut_short`: whether the image ends before the end that it describes. Then there is no
/// warning about structures in the missing part.
pub fn warnings(reading: &Reading, nodes: Nodes<'_>, is_cut_short: bool) -> Vec<Warning> {
    let mut all = Vec::new();
    all.extend(reading.warnings.iter().find_map(sector_size));
    if all.is_empty() {
        all.extend(of_table(reading, is_cut_short));
        all.extend(unread_backup(reading, nodes));
    }
    if nodes.wanted {
        all.extend(left_out(reading, nodes.nodes));
        all.extend(without_node(reading, nodes));
    }
    all
}

fn sector_size(warning: &format::Warning) -> Option<Warning> {
    match warning {
        format::Warning::OtherSectorSize { written, read, .. } => {
            Some(Warning::SectorSize { written: *written, device: *read })
        }
        _ => None,
    }
}

fn of_table(reading: &Reading, is_cut_short: bool) -> impl Iterator<Item = Warning> {
    let sentence = |warning: &format::Warning| format!("the partition table is damaged: {warning}");
    reading.warnings.iter().filter_map(move |warning| match warning {
        format::Warning::PrimaryDamaged(Fault::UsableRange | Fault::EntriesPastEnd | Fault::PastEnd)
        | format::Warning::BackupDamaged(_)
        | format::Warning::ChainBroken
            if is_cut_short =>
        {
            None
        }
        format::Warning::PrimaryDamaged(_)
        | format::Warning::BackupDamaged(_)
        | format::Warning::BackupDiffers
        | format::Warning::ChainLoop
        | format::Warning::ChainBroken
        | format::Warning::ChainTooLong => Some(Warning::TableDamaged(sentence(warning))),
        format::Warning::MisplacedProtection
        | format::Warning::UnprotectedGpt
        | format::Warning::HybridMbr => Some(Warning::TableIgnored(warning.to_string())),
        // `BackupUsed` comes with `PrimaryDamaged`. After an image was enlarged, `BackupMisplaced` is normal. The
        // others are about single partitions.
        _ => None,
    })
}

/// The backup was read, and a kernel that reads tables itself has made no nodes of it.
fn unread_backup(reading: &Reading, nodes: Nodes<'_>) -> Option<Warning> {
    let table = reading.table.as_ref().filter(|table| table.from_backup && !table.partitions.is_empty())?;
    let is_unread = nodes.wanted && !nodes.incomplete && nodes.nodes.is_empty();
    let partitions = table.partitions.len();
    is_unread.then(|| {
        Warning::TableIgnored(format!(
            "the backup GPT with {partitions} partitions is not used, since this kernel reads the primary GPT only; a \
             tool such as sgdisk can restore it"
        ))
    })
}

/// The entries that cannot be partitions.
fn left_out(reading: &Reading, nodes: &[PartitionNode]) -> impl Iterator<Item = Warning> {
    let reason = |warning: &format::Warning| match warning {
        format::Warning::PastEnd { number } => Some((*number, NotMade::PastEnd)),
        format::Warning::EndsBeforeStart { number } => Some((*number, NotMade::EndsBeforeStart)),
        format::Warning::TooManyPartitions => Some((MAX_PARTITIONS + 1, NotMade::NumberTooHigh)),
        _ => None,
    };
    let found = reading.warnings.iter().filter_map(reason);
    found
        .filter(|(number, _)| !has_node(nodes, *number))
        .map(|(number, reason)| Warning::PartitionNotMade { number, reason })
}

/// The partitions without a node.
fn without_node(reading: &Reading, nodes: Nodes<'_>) -> impl Iterator<Item = Warning> {
    let table = reading.table.as_ref().filter(|table| !table.from_backup || !nodes.nodes.is_empty());
    let partitions = table.map_or(&[][..], |table| &table.partitions).iter();
    let not_made = move |partition: &Partition| match partition.refusal {
        Some(Refusal::Overlaps(other)) => Some(NotMade::Overlaps(other)),
        Some(Refusal::Unaligned) => Some(NotMade::Unaligned),
        None => (!nodes.incomplete).then_some(NotMade::Refused),
    };
    partitions.filter(move |partition| !has_node(nodes.nodes, partition.number)).filter_map(
        move |partition| {
            Some(Warning::PartitionNotMade { number: partition.number, reason: not_made(partition)? })
        },
    )
}

fn has_node(nodes: &[PartitionNode], number: u32) -> bool {
    nodes.iter().any(|node| node.number == number)
}

#[cfg(test)]
mod tests {
    use loopd_partition_table::{Table, TableKind};

    use super::*;

    fn partition(number: u32, refusal: Option<Refusal>) -> Partition {
        let text = String::new;
        Partition { number, start: 512, size: 512, kind: text(), uuid: text(), label: text(), refusal }
    }

    fn reading(warnings: &[format::Warning], partitions: &[Partition], from_backup: bool) -> Reading {
        let kind = TableKind::Gpt;
        let table = Table { kind, uuid: String::new(), from_backup, partitions: partitions.to_vec() };
        Reading { table: Some(table), warnings: warnings.to_vec(), ..Reading::default() }
    }

    fn nodes(numbers: &[u32]) -> Vec<PartitionNode> {
        numbers.iter().map(|number| PartitionNode { number: *number, ..PartitionNode::default() }).collect()
    }

    fn found(reading: &Reading, made: &[u32], wanted: bool, incomplete: bool) -> Vec<Warning> {
        warnings(reading, Nodes { nodes: &nodes(made), wanted, incomplete }, false)
    }

    fn codes(warnings: &[format::Warning], is_cut_short: bool) -> Vec<&'static str> {
        let nodes = Nodes { nodes: &[], wanted: false, incomplete: false };
        let reading = reading(warnings, &[], false);
        super::warnings(&reading, nodes, is_cut_short).iter().map(Warning::code).collect()
    }

    #[test]
    fn damaged_and_ignored_tables_have_their_codes() {
        use format::Warning as Found;
        assert_eq!(codes(&[Found::PrimaryDamaged(Fault::HeaderChecksum)], false), ["table-damaged"]);
        assert_eq!(codes(&[Found::BackupDiffers, Found::ChainLoop], false), ["table-damaged"; 2]);
        let ignored = [Found::MisplacedProtection, Found::UnprotectedGpt, Found::HybridMbr];
        assert_eq!(codes(&ignored, false), ["table-ignored"; 3]);
        let harmless = [Found::BackupMisplaced, Found::BackupUsed, Found::OutsideUsable { number: 1 }];
        assert_eq!(codes(&harmless, false), [""; 0]);
    }

    #[test]
    fn structures_in_the_missing_part_are_not_reported_as_damaged() {
        use format::Warning as Found;
        let lost = [Found::PrimaryDamaged(Fault::UsableRange), Found::BackupDamaged(Fault::PastEnd)];
        assert_eq!((codes(&lost, true), codes(&lost, false)), (vec![], vec!["table-damaged"; 2]));
        let damaged = [Found::PrimaryDamaged(Fault::EntriesChecksum), Found::BackupDamaged(Fault::PastEnd)];
        assert_eq!(codes(&damaged, true), ["table-damaged"]);
    }

    #[test]
    fn a_table_for_other_sectors_is_not_reported_as_damaged() {
        use format::Warning as Found;
        let other = Found::OtherSectorSize { table: TableKind::Gpt, written: 4096, read: 512 };
        let all =
            [Found::PrimaryDamaged(Fault::NoSignature), Found::BackupDamaged(Fault::NoSignature), other];
        assert_eq!(codes(&all, false), ["sector-size"]);
    }

    #[test]
    fn partitions_without_a_node_are_named() {
        let past_end = format::Warning::PastEnd { number: 4 };
        let partitions = [
            partition(1, None),
            partition(2, Some(Refusal::Overlaps(1))),
            partition(3, Some(Refusal::Unaligned)),
            partition(5, None),
        ];
        let reading = reading(&[past_end, format::Warning::TooManyPartitions], &partitions, false);
        let not_made = |number, reason| Warning::PartitionNotMade { number, reason };
        let always = [
            not_made(4, NotMade::PastEnd),
            not_made(256, NotMade::NumberTooHigh),
            not_made(2, NotMade::Overlaps(1)),
            not_made(3, NotMade::Unaligned),
        ];
        assert_eq!(found(&reading, &[1, 5], true, false), always);
        assert_eq!(found(&reading, &[], true, true), always, "the others follow");
        let refused = [&always[..], &[not_made(5, NotMade::Refused)]].concat();
        assert_eq!(found(&reading, &[1], true, false), refused);
        assert_eq!(found(&reading, &[], false, false), [], "none was wanted");
        assert_eq!(found(&reading, &[1, 2, 3, 4, 5, 256], true, false), [], "the kernel makes them all");
    }

    #[test]
    fn a_backup_that_the_kernel_does_not_read_is_named_once() {
        let reading =
            reading(&[format::Warning::BackupUsed], &[partition(1, None), partition(2, None)], true);
        let [Warning::TableIgnored(sentence)] = &found(&reading, &[], true, false)[..] else {
            panic!("the backup is ignored")
        };
        assert!(sentence.starts_with("the backup GPT with 2 partitions is not used"), "{sentence}");
        assert_eq!(found(&reading, &[1, 2], true, false), []);
        assert_eq!(found(&reading, &[], true, true), [], "loopd makes them");
    }
}
