//! The table of `list`.

use clap::ValueEnum;
use loopd_dbus::VolumeProperties;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::column::Column;
use super::property::{NOTHING, file, file_state, mount_points, owner, since, text, time_or_nothing, yes_no};
use super::size::human;
use crate::bus::attachment::AttachmentInfo;
use crate::bus::cleartext::CleartextInfo;
use crate::bus::partition::PartitionInfo;
use crate::message::escaped;

/// Between two columns.
const GAP: &str = "  ";
/// Starts and ends bold text on a terminal.
const BOLD: [&str; 2] = ["\u{1b}[1m", "\u{1b}[0m"];
/// The columns that are cut if a line is wider than the terminal, with the minimum width of each. If that
/// is not enough, the line stays wider.
const CUT: &[(Column, usize)] =
    &[(Column::File, 12), (Column::Mountpoints, 12), (Column::Partlabel, 6), (Column::Label, 6)];

/// The style of a table.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Print a header.
    pub legend: bool,
    /// Print the header in bold.
    pub bold: bool,
    /// The maximum width of a line; `None` for no limit.
    pub width: Option<u16>,
}

/// A row of the table, with its sub-rows.
#[derive(Clone, Debug, Default)]
pub struct Row {
    cells: Vec<String>,
    children: Vec<Row>,
}

impl Row {
    /// The row of this device, with those of its cleartext and its partitions.
    #[must_use]
    pub fn new(info: &AttachmentInfo, columns: &[Column]) -> Self {
        let cleartext = info.cleartext.iter().map(|cleartext| Self::of_cleartext(cleartext, columns));
        Self {
            cells: columns.iter().map(|column| cell(info, *column)).collect(),
            children: cleartext.chain(Self::of_partitions(info, columns)).collect(),
        }
    }

    /// The rows of the device's partitions.
    #[must_use]
    pub fn of_partitions(info: &AttachmentInfo, columns: &[Column]) -> Vec<Self> {
        let row = |partition: &PartitionInfo| Self {
            cells: columns.iter().map(|column| partition_cell(info, partition, *column)).collect(),
            children: partition
                .cleartext
                .iter()
                .map(|cleartext| Self::of_cleartext(cleartext, columns))
                .collect(),
        };
        info.partitions.iter().map(row).collect()
    }

    fn of_cleartext(info: &CleartextInfo, columns: &[Column]) -> Self {
        let cells = columns.iter().map(|column| cleartext_cell(info, *column)).collect();
        Self { cells, children: Vec::new() }
    }
}

/// Draws the table with a newline at the end; empty without rows.
#[must_use]
pub fn render(columns: &[Column], rows: &[Row], style: Style) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let legend: Option<Vec<String>> =
        style.legend.then(|| columns.iter().map(|column| header(*column)).collect());
    let mut lines = flatten(rows, columns);
    if let Some(width) = style.width {
        fit(columns, legend.as_deref(), &mut lines, width.into());
    }
    let widths = widths(columns.len(), legend.as_deref(), &lines);
    let bold = if style.bold { BOLD } else { [""; 2] };
    let legend = legend.iter().map(|names| draw(names, &widths, bold));
    legend.chain(lines.iter().map(|cells| draw(cells, &widths, [""; 2]))).collect()
}

/// A line of cells, each with something before and after its text. The last one is not padded.
fn draw(cells: &[String], widths: &[usize], [before, after]: [&str; 2]) -> String {
    let mut line = String::new();
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        line.extend([before, cell, after]);
        if index + 1 < cells.len() {
            line.push_str(&" ".repeat(width.saturating_sub(cell.width())));
            line.push_str(GAP);
        }
    }
    line + "\n"
}

/// The width of each column: that of its widest cell.
fn widths(columns: usize, legend: Option<&[String]>, lines: &[Vec<String>]) -> Vec<usize> {
    let width = |index: usize| {
        let cells = lines.iter().map(Vec::as_slice).chain(legend).map(|line| line[index].width());
        cells.max().unwrap_or_default()
    };
    (0..columns).map(width).collect()
}

/// A column's header.
fn header(column: Column) -> String {
    column.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The rows and sub-rows as lines, drawn as lsblk does.
fn flatten(rows: &[Row], columns: &[Column]) -> Vec<Vec<String>> {
    let name = columns.iter().position(|column| *column == Column::Device);
    let mut lines = Vec::new();
    for row in rows {
        lines.push(row.cells.clone());
        add_children(row, "", name, &mut lines);
    }
    lines
}

/// Adds the lines below a row. `indent`: the branches of the rows above; `name`: the column to draw them in.
fn add_children(row: &Row, indent: &str, name: Option<usize>, lines: &mut Vec<Vec<String>>) {
    for (index, child) in row.children.iter().enumerate() {
        let (branch, below) =
            if index + 1 == row.children.len() { ("└─", "  ") } else { ("├─", "│ ") };
        let mut cells = child.cells.clone();
        if let Some(name) = name {
            cells[name].insert_str(0, &format!("{indent}{branch}"));
        }
        lines.push(cells);
        add_children(child, &format!("{indent}{below}"), name, lines);
    }
}

/// Cuts the columns of [`CUT`] one after the other until the lines fit.
fn fit(columns: &[Column], legend: Option<&[String]>, lines: &mut [Vec<String>], limit: usize) {
    let mut widths = widths(columns.len(), legend, lines);
    for (column, shortest) in CUT {
        let needed = widths.iter().sum::<usize>() + GAP.len() * columns.len().saturating_sub(1);
        let excess = needed.saturating_sub(limit);
        let Some(index) = columns.iter().position(|shown| shown == column) else { continue };
        let width = widths[index].saturating_sub(excess).max(*shortest);
        if excess > 0 && width < widths[index] {
            widths[index] = width;
            lines.iter_mut().for_each(|line| line[index] = cut_start(&line[index], width));
        }
    }
}

/// The end of the text in at most this many terminal columns; paths differ at their end.
fn cut_start(text: &str, limit: usize) -> String {
    if text.width() <= limit {
        return text.to_owned();
    }
    let mut used = 1; // the ellipsis
    let mut start = text.len();
    for (index, character) in text.char_indices().rev() {
        used += character.width().unwrap_or_default();
        if used > limit {
            break;
        }
        start = index;
    }
    format!("…{}", &text[start..])
}

/// The cell of a device.
fn cell(info: &AttachmentInfo, column: Column) -> String {
    let AttachmentInfo { attachment, volume, .. } = info;
    match column {
        Column::Device => escaped(attachment.device.as_bytes()),
        Column::Number => attachment.number.to_string(),
        Column::Ro => yes_no(attachment.read_only),
        Column::Lifetime => text(&attachment.lifetime),
        Column::State => text(&attachment.state),
        Column::Filestate => file_state(info),
        Column::File => file(info),
        Column::Inode => attachment.backing_inode.to_string(),
        Column::Offset => attachment.offset.to_string(),
        Column::Sizelimit => attachment.size_limit.to_string(),
        Column::Blocksize => attachment.block_size.to_string(),
        Column::Dio => yes_no(attachment.direct_io),
        Column::Partscan => yes_no(attachment.partition_scan),
        Column::Autoclear => yes_no(attachment.autoclear),
        Column::Ref => text(&attachment.reference),
        Column::Managed => yes_no(attachment.managed),
        Column::Owner => owner(info),
        Column::Since => since(info),
        Column::Diskseq => attachment.disk_sequence.to_string(),
        Column::Start | Column::Pttype | Column::Parttype | Column::Partlabel | Column::Partuuid => {
            NOTHING.to_owned()
        }
        Column::Size
        | Column::Type
        | Column::Version
        | Column::Label
        | Column::Uuid
        | Column::Mountpoints => volume_cell(volume, column),
    }
}

/// The cell of a partition. Properties of the device are repeated only if they apply to the partition.
fn partition_cell(info: &AttachmentInfo, shown: &PartitionInfo, column: Column) -> String {
    let PartitionInfo { partition, volume, .. } = shown;
    match column {
        Column::Device => escaped(volume.device.as_bytes()),
        Column::Number => partition.number.to_string(),
        Column::Ro | Column::Blocksize => cell(info, column),
        Column::Start => partition.offset.to_string(),
        Column::Pttype => text(&partition.table),
        Column::Parttype => text(&partition.kind),
        Column::Partlabel => text(&partition.label),
        Column::Partuuid => text(&partition.uuid),
        _ => volume_cell(volume, column),
    }
}

/// The cell of a cleartext.
fn cleartext_cell(info: &CleartextInfo, column: Column) -> String {
    let CleartextInfo { cleartext, volume, .. } = info;
    match column {
        Column::Device => escaped(cleartext.device.as_bytes()),
        Column::Since => time_or_nothing(cleartext.since),
        _ => volume_cell(volume, column),
    }
}

/// The cell of a volume: a device, a partition or a cleartext.
fn volume_cell(volume: &VolumeProperties, column: Column) -> String {
    match column {
        Column::Size => human(volume.size),
        Column::Type => text(&volume.filesystem_type),
        Column::Version => text(&volume.filesystem_version),
        Column::Label => text(&volume.filesystem_label),
        Column::Uuid => text(&volume.filesystem_uuid),
        Column::Mountpoints => mount_points(volume),
        _ => NOTHING.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::properties::to_bus_path;

    use super::*;
    use crate::bus::attachment::FileState;
    use crate::bus::example::{self, partition};
    use crate::show::column;

    const COLUMNS: &[Column] = &[Column::Device, Column::Size, Column::Type, Column::File];
    const PLAIN: Style = Style { legend: true, bold: false, width: None };

    fn attached(number: u32, file: &[u8]) -> AttachmentInfo {
        let mut attached = example::attachment();
        attached.attachment.device = format!("/dev/loop{number}");
        attached.attachment.backing_file = to_bus_path(file);
        attached.partitions.clear();
        attached
    }

    fn table(files: &[&[u8]], style: Style) -> String {
        let rows: Vec<Row> =
            (9..).zip(files).map(|(number, file)| Row::new(&attached(number, file), COLUMNS)).collect();
        render(COLUMNS, &rows, style)
    }

    #[test]
    fn a_table_has_no_borders() {
        let files: &[&[u8]] = &[b"/a/x.img", b"/b\n\x1b[2J.img"];
        let expected = "\
DEVICE       SIZE  TYPE  FILE
/dev/loop9   64M   -     /a/x.img
/dev/loop10  64M   -     /b\\n\\u{1b}[2J.img
";
        assert_eq!(table(files, PLAIN), expected);
        let expected = "\
/dev/loop9   64M  -  /a/x.img
/dev/loop10  64M  -  /b\\n\\u{1b}[2J.img
";
        assert_eq!(table(files, Style { legend: false, ..PLAIN }), expected);
        assert_eq!(table(&[], PLAIN), "");
    }

    #[test]
    fn only_the_header_is_bold() {
        let shown = table(&[b"/a/x.img"], Style { bold: true, ..PLAIN });
        let (head, body) = shown.split_once('\n').unwrap();
        let bold = |name: &str| format!("\u{1b}[1m{name}\u{1b}[0m");
        let [device, size, kind, file] = ["DEVICE", "SIZE", "TYPE", "FILE"].map(bold);
        assert_eq!(head, format!("{device}      {size}  {kind}  {file}"));
        assert!(!body.contains('\u{1b}'), "{shown:?}");
    }

    #[test]
    fn long_paths_are_cut_at_the_start() {
        let long = format!("/home/{}/end.img", "x".repeat(100));
        let shown = table(&[long.as_bytes()], Style { width: Some(50), ..PLAIN });
        assert!(shown.lines().all(|line| line.width() <= 50), "{shown}");
        assert!(shown.ends_with("xx/end.img\n") && shown.contains(" …xx"), "{shown}");
        assert_eq!(shown.lines().count(), 2);
        assert!(table(&[long.as_bytes()], PLAIN).contains(&long));
    }

    #[test]
    fn device_nodes_are_never_cut() {
        let mut wide = attached(9, b"/a/a file with blanks.img");
        wide.volume.mount_points = vec![to_bus_path(b"/run/media/alice/a volume")];
        let columns = &[Column::Device, Column::Mountpoints, Column::File];
        let shown = render(columns, &[Row::new(&wide, columns)], Style { width: Some(30), ..PLAIN });
        let expected = "\
DEVICE      MOUNTPOINTS   FILE
/dev/loop9  …ce/a volume  … blanks.img
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn wide_characters_count_twice() {
        assert_eq!(cut_start("日本語.img", 8), "…語.img");
        assert_eq!(cut_start("abc", 3), "abc");
        assert_eq!(cut_start("abcd", 3), "…cd");
    }

    #[test]
    fn partitions_are_listed_below_their_device() {
        let columns: Vec<Column> =
            column::DEFAULT.split(',').map(|name| Column::from_str(name, true).unwrap()).collect();
        let mut disk =
            AttachmentInfo { partitions: vec![partition(12, 1), partition(12, 2)], ..example::attachment() };
        disk.attachment.read_only = true;
        disk.file_state = Some(FileState::Replaced);
        let second = &mut disk.partitions[1];
        second.volume = VolumeProperties { device: "/dev/loop0p2".to_owned(), ..VolumeProperties::default() };
        second.partition.label = "EFI system".to_owned();
        let expected = "\
DEVICE          SIZE  RO   TYPE  LABEL  MOUNTPOINTS        STATE     FILESTATE  FILE
/dev/loop0      64M   yes  -     -      -                  attached  replaced   /home/a/x.img
├─/dev/loop0p1  20M   yes  ext4  data   /run/media/a/data  -         -          -
└─/dev/loop0p2  0B    yes  -     -      -                  -         -          -
/dev/loop9      64M   no   -     -      -                  attached  present    /a
";
        let rows = [Row::new(&disk, &columns), Row::new(&attached(9, b"/a"), &columns)];
        assert_eq!(render(&columns, &rows, PLAIN), expected);
    }

    #[test]
    fn a_cleartext_is_listed_below_its_volume() {
        let columns =
            &[Column::Device, Column::Number, Column::Ro, Column::Size, Column::Type, Column::Since];
        let mut disk =
            AttachmentInfo { partitions: vec![partition(12, 1), partition(12, 2)], ..example::attachment() };
        disk.partitions.iter_mut().zip(1..).for_each(|(partition, number)| {
            partition.cleartext = Some(example::cleartext(Some(number)));
        });
        let mut whole = attached(9, b"/a");
        whole.cleartext = Some(example::cleartext(None));
        let expected = "\
DEVICE          NUMBER  RO  SIZE  TYPE  SINCE
/dev/loop0      0       no  64M   -     -
├─/dev/loop0p1  1       no  20M   ext4  -
│ └─/dev/dm-3   -       -   4M    xfs   2023-11-14T22:13:20Z
└─/dev/loop0p2  2       no  20M   ext4  -
  └─/dev/dm-3   -       -   4M    xfs   2023-11-14T22:13:20Z
/dev/loop9      0       no  64M   -     -
└─/dev/dm-3     -       -   4M    xfs   2023-11-14T22:13:20Z
";
        let rows = [Row::new(&disk, columns), Row::new(&whole, columns)];
        assert_eq!(render(columns, &rows, PLAIN), expected);
    }

    #[test]
    fn columns_of_partitions_are_shown() {
        let columns = &[
            Column::Number,
            Column::Start,
            Column::Pttype,
            Column::Parttype,
            Column::Partlabel,
            Column::Partuuid,
        ];
        let mut disk = example::attachment();
        disk.partitions[0].partition.label = "root\n".to_owned();
        let expected = "\
0  -        -    -                                     -       -
1  1048576  gpt  0fc63daf-8483-4772-8e79-3d69d8477de4  root\\n  …
";
        let shown = render(columns, &[Row::new(&disk, columns)], Style { legend: false, ..PLAIN });
        assert_eq!(shown, expected);
    }

    #[test]
    fn every_column_has_a_name_and_a_value() {
        for column in Column::value_variants() {
            assert!(!header(*column).is_empty());
            assert!(!cell(&example::attachment(), *column).is_empty(), "{column:?}");
            assert!(
                !partition_cell(&example::attachment(), &partition(12, 1), *column).is_empty(),
                "{column:?}"
            );
            assert!(!cleartext_cell(&example::cleartext(None), *column).is_empty(), "{column:?}");
        }
    }
}
