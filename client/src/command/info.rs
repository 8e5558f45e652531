//! `loopctl info`.

use loopd_dbus::properties::NO_OWNER;
use loopd_dbus::proxy::Interaction;
use loopd_dbus::{VolumeProperties, Warning};
use nix::unistd::{Uid, User};

use crate::bus::attachment::AttachmentInfo;
use crate::bus::cleartext::CleartextInfo;
use crate::bus::connection::Bus;
use crate::bus::partition::PartitionInfo;
use crate::cli::Info;
use crate::image::file_state::add_file_states;
use crate::image::target::Target;
use crate::message::shown;
use crate::show::json::Device;
use crate::show::property::{file, file_state, mount_points, owner, since, text, time_or_nothing, yes_no};
use crate::show::size::human;
use crate::show::stdout::{print, print_json};

/// The indentation of a partition's properties.
const INDENT: &str = "  ";

/// A property's name and its value.
type Line = (&'static str, String);

/// Prints the properties of each attachment of the target.
pub async fn run(args: &Info) -> anyhow::Result<u8> {
    let bus = Bus::open(Interaction::Forbidden).await?;
    let mut found = Target::resolve(&args.target).find_with_partitions(&bus).await?;
    add_file_states(&mut found).await;
    if args.json {
        for info in &found {
            print_json(&Device::from(info))?;
        }
    } else {
        print(&found.iter().map(describe).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(0)
}

fn describe(info: &AttachmentInfo) -> String {
    let mut shown = align(&properties(info), "");
    shown.extend(info.cleartext.iter().map(|cleartext| describe_cleartext("Cleartext", cleartext)));
    for partition in &info.partitions {
        let name = format!("Partition {}", partition.partition.number);
        shown.push_str(&format!("{name}:\n{}", align(&partition_properties(partition), INDENT)));
        let name = format!("Cleartext of partition {}", partition.partition.number);
        shown.extend(partition.cleartext.iter().map(|cleartext| describe_cleartext(&name, cleartext)));
    }
    shown
}

fn describe_cleartext(name: &str, info: &CleartextInfo) -> String {
    let CleartextInfo { path, cleartext, volume } = info;
    let mut lines = vec![
        ("Device", text(&cleartext.device)),
        ("Object path", text(path.as_str())),
        ("Encryption", text(&cleartext.kind)),
        ("Unlocked since", time_or_nothing(cleartext.since)),
        ("Size", bytes(volume.size)),
    ];
    lines.extend(contents(volume));
    format!("{name}:\n{}", align(&lines, INDENT))
}

fn align(lines: &[Line], indent: &str) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default() + 1;
    lines.iter().map(|(name, value)| format!("{indent}{:width$} {value}\n", format!("{name}:"))).collect()
}

fn properties(info: &AttachmentInfo) -> Vec<Line> {
    let AttachmentInfo { path, attachment, volume, .. } = info;
    let mut lines = vec![
        ("Device", text(&attachment.device)),
        ("Number", attachment.number.to_string()),
        ("Disk sequence", attachment.disk_sequence.to_string()),
        ("Object path", text(path.as_str())),
        ("State", text(&attachment.state)),
        ("Backing file", file(info)),
        ("File state", file_state(info)),
        ("Backing device", device_number(attachment.backing_device)),
        ("Backing inode", attachment.backing_inode.to_string()),
        ("Offset", bytes(attachment.offset)),
        ("Size limit", size_limit(attachment.size_limit)),
        ("Size", bytes(volume.size)),
        ("Block size", attachment.block_size.to_string()),
        ("Read-only", yes_no(attachment.read_only)),
        ("Direct I/O", yes_no(attachment.direct_io)),
        ("Partition scan", yes_no(attachment.partition_scan)),
        ("Autoclear", yes_no(attachment.autoclear)),
        ("Reference", text(&attachment.reference)),
        ("Managed", yes_no(attachment.managed)),
        ("Lifetime", text(&attachment.lifetime)),
        ("Owner", owner_and_name(info)),
        ("Client", text(&attachment.client)),
        ("Since", since(info)),
    ];
    lines.extend(contents(volume));
    lines.extend(warnings(info));
    lines
}

/// A line for each warning.
fn warnings(info: &AttachmentInfo) -> Vec<Line> {
    let line = |warning: &Warning| ("Warning", text(&warning.message));
    shown(&info.attachment.warnings).map(line).collect()
}

fn partition_properties(info: &PartitionInfo) -> Vec<Line> {
    let PartitionInfo { path, partition, volume, .. } = info;
    let mut lines = vec![
        ("Device", text(&volume.device)),
        ("Object path", text(path.as_str())),
        ("Offset", bytes(partition.offset)),
        ("Size", bytes(partition.size)),
        ("Partition table", text(&partition.table)),
        ("Partition type", text(&partition.kind)),
        ("Partition label", text(&partition.label)),
        ("Partition UUID", text(&partition.uuid)),
    ];
    lines.extend(contents(volume));
    lines
}

/// The contents of a volume.
fn contents(volume: &VolumeProperties) -> [Line; 6] {
    [
        ("Usage", text(&volume.usage)),
        ("File system", text(&volume.filesystem_type)),
        ("Version", text(&volume.filesystem_version)),
        ("Label", text(&volume.filesystem_label)),
        ("UUID", text(&volume.filesystem_uuid)),
        ("Mount points", mount_points(volume)),
    ]
}

fn bytes(size: u64) -> String {
    if size < 1024 { size.to_string() } else { format!("{size} ({})", human(size)) }
}

fn size_limit(size: u64) -> String {
    if size == 0 { "0 (up to the end of the file)".to_owned() } else { bytes(size) }
}

fn device_number(number: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(number), nix::sys::stat::minor(number))
}

fn owner_and_name(info: &AttachmentInfo) -> String {
    let uid = owner(info);
    match info.attachment.owner {
        NO_OWNER => uid,
        number => match User::from_uid(Uid::from_raw(number)) {
            Ok(Some(user)) => format!("{uid} ({})", text(&user.name)),
            _ => uid,
        },
    }
}

#[cfg(test)]
mod tests {
    use loopd_common::limits::MOST_WARNINGS;
    use loopd_dbus::Warnings;

    use super::*;
    use crate::bus::attachment::FileState;
    use crate::bus::example::{attachment, cleartext, partition};

    #[test]
    fn values_are_aligned() {
        let mut attached = attachment();
        attached.attachment.owner = 0;
        attached.file_state = Some(FileState::Deleted);
        attached.attachment.offset = 512;
        attached.attachment.since = 1_700_000_000_000_000;
        let shown = describe(&attached);
        for line in [
            "Device:         /dev/loop0\n",
            "Disk sequence:  12\n",
            "Backing file:   /home/a/x.img\nFile state:     deleted\n",
            "Offset:         512\n",
            "Size limit:     0 (up to the end of the file)\n",
            "Size:           67108864 (64M)\n",
            "Reference:      -\n",
            "Owner:          0 (root)\n",
            "Since:          2023-11-14T22:13:20Z\n",
        ] {
            assert!(shown.contains(line), "{line} is missing in\n{shown}");
        }
    }

    #[test]
    fn each_warning_has_a_line() {
        let mut attached = attachment();
        attached.attachment.warnings = Warnings::default();
        assert!(!describe(&attached).contains("Warning"));
        let warning = |message: &str| Warning { message: message.to_owned(), ..Warning::default() };
        attached.attachment.warnings = Warnings(vec![warning("one"), warning("two\n\u{1b}[31m")]);
        let lines = "Warning:        one\nWarning:        two\\n\\u{1b}[31m\nPartition 1:";
        assert!(describe(&attached).contains(lines), "{}", describe(&attached));
        attached.attachment.warnings = Warnings(vec![warning("many"); 1000]);
        assert_eq!(describe(&attached).matches("many").count(), MOST_WARNINGS);
    }

    #[test]
    fn partitions_are_listed_below_their_device() {
        let mut attached = attachment();
        attached.partitions.push(partition(12, 5));
        attached.partitions[1].volume.mount_points.clear();
        let shown = describe(&attached);
        let (device, partitions) = shown.split_once("Partition 1:\n").unwrap();
        assert!(device.ends_with("\nMount points:   -\nWarning:        …\n"), "{device}");
        let (first, second) = partitions.split_once("Partition 5:\n").unwrap();
        let expected = "  \
  Device:          /dev/loop0p1
  Object path:     /org/loopd1/attachment/12/p1
  Offset:          1048576 (1M)
  Size:            20971520 (20M)
  Partition table: gpt
  Partition type:  0fc63daf-8483-4772-8e79-3d69d8477de4
  Partition label: -
  Partition UUID:  …
  Usage:           filesystem
  File system:     ext4
  Version:         1.0
  Label:           data
  UUID:            …
  Mount points:    /run/media/a/data
";
        assert_eq!(first, expected);
        assert!(second.starts_with("  Device:          /dev/loop0p5\n"), "{second}");
        assert!(second.ends_with("  Mount points:    -\n"), "{second}");
    }

    #[test]
    fn a_cleartext_follows_its_volume() {
        let mut attached = attachment();
        attached.cleartext = Some(cleartext(None));
        attached.partitions[0].cleartext = Some(cleartext(Some(1)));
        let shown = describe(&attached);
        let expected = "Cleartext:
  Device:         /dev/dm-3
  Object path:    /org/loopd1/attachment/12/cleartext
  Encryption:     luks
  Unlocked since: 2023-11-14T22:13:20Z
  Size:           4194304 (4M)
  Usage:          filesystem
  File system:    xfs
  Version:        -
  Label:          -
  UUID:           -
  Mount points:   -
Partition 1:
";
        assert!(shown.contains(expected), "{shown}");
        assert!(shown.contains("\nCleartext of partition 1:\n  Device:         /dev/dm-3\n"), "{shown}");
    }

    #[test]
    fn a_foreign_device_has_no_owner() {
        let mut attached = attachment();
        attached.attachment.owner = NO_OWNER;
        assert_eq!(owner_and_name(&attached), "-");
    }
}
