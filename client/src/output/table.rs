//! The table of `list`, and how each property is written for people.

use std::time::{Duration, UNIX_EPOCH};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Table, presets};
use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::{NO_OWNER, from_bus_path};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::cli::Column;
use crate::output::escaped;
use crate::partition::Partition;
use crate::size::human;
use crate::target::Attached;

/// What stands for nothing, so that a line always has as many words as columns.
const NOTHING: &str = "-";
/// Blanks between two columns.
const GAP: u16 = 2;
/// The columns that are cut where a line would not fit, each to no fewer letters than these: less
/// would say nothing. The line is then longer than the terminal is wide.
const CUT: &[(Column, usize)] =
    &[(Column::File, 12), (Column::Mountpoints, 12), (Column::Partlabel, 6), (Column::Label, 6)];

/// How a table is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Whether there is a header.
    pub legend: bool,
    /// Whether the header is bold.
    pub bold: bool,
    /// The terminal's width in letters; what does not fit is cut. `None` cuts nothing.
    pub width: Option<u16>,
}

/// A line of the table, and the lines below it that belong to it.
#[derive(Clone, Debug, Default)]
pub struct Row {
    cells: Vec<String>,
    parts: Vec<Row>,
}

impl Row {
    /// The line of this device, and those of its partitions.
    #[must_use]
    pub fn new(attached: &Attached, columns: &[Column]) -> Self {
        Self {
            cells: columns.iter().map(|column| cell(attached, *column)).collect(),
            parts: Self::of_partitions(attached, columns),
        }
    }

    /// The lines of the device's partitions.
    #[must_use]
    pub fn of_partitions(attached: &Attached, columns: &[Column]) -> Vec<Self> {
        let part = |partition: &Partition| Self {
            cells: columns.iter().map(|column| part_cell(attached, partition, *column)).collect(),
            parts: Vec::new(),
        };
        attached.partitions.iter().map(part).collect()
    }
}

/// The width in letters of the terminal that standard output is; `None` where it is none, or does not
/// know how wide it is.
#[must_use]
pub fn terminal_width() -> Option<u16> {
    terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0)
}

/// Draws the table, with a newline at the end; nothing where there are no rows.
#[must_use]
pub fn render(columns: &[Column], rows: &[Row], style: Style) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let names: Vec<String> = columns.iter().map(|column| header(*column)).collect();
    let mut lines = flatten(rows, columns);
    if let Some(width) = style.width {
        let legend = if style.legend { names.as_slice() } else { &[] };
        fit(columns, legend, &mut lines, width.into());
    }
    let mut table = Table::new();
    // Without this comfy-table would look at the terminal by itself.
    table.load_style(presets::NOTHING).force_no_tty();
    if style.legend {
        table.set_header(names.iter().map(|name| styled(name, style.bold)).collect::<Vec<_>>());
    }
    if style.bold {
        table.enforce_styling().style_text_only();
    }
    table.add_rows(lines);
    let last = columns.len().saturating_sub(1);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index == last { 0 } else { GAP }));
    }
    table.trim_fmt() + "\n"
}

fn styled(name: &str, bold: bool) -> Cell {
    let cell = Cell::new(name);
    if bold { cell.add_attribute(Attribute::Bold) } else { cell }
}

/// A column's header.
fn header(column: Column) -> String {
    column.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The rows with their parts below them, drawn as lsblk does.
fn flatten(rows: &[Row], columns: &[Column]) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for row in rows {
        lines.push(row.cells.clone());
        for (index, part) in row.parts.iter().enumerate() {
            let branch = if index + 1 == row.parts.len() { "└─" } else { "├─" };
            let mut cells = part.cells.clone();
            if let Some(name) = columns.iter().position(|column| *column == Column::Device) {
                cells[name].insert_str(0, branch);
            }
            lines.push(cells);
        }
    }
    lines
}

/// Cuts what can be cut, one column after the other, until the lines fit.
fn fit(columns: &[Column], legend: &[String], lines: &mut [Vec<String>], room: usize) {
    let mut widths: Vec<usize> = (0..columns.len())
        .map(|index| {
            let cells = lines.iter().map(|line| &line[index]).chain(legend.get(index));
            cells.map(|cell| cell.width()).max().unwrap_or_default()
        })
        .collect();
    for (column, shortest) in CUT {
        let needed = widths.iter().sum::<usize>() + usize::from(GAP) * columns.len().saturating_sub(1);
        let excess = needed.saturating_sub(room);
        let Some(index) = columns.iter().position(|shown| shown == column) else { continue };
        let width = widths[index].saturating_sub(excess).max(*shortest);
        if excess > 0 && width < widths[index] {
            widths[index] = width;
            lines.iter_mut().for_each(|line| line[index] = cut_start(&line[index], width));
        }
    }
}

/// The end of the text, in at most so many letters of the terminal: the end tells paths apart.
fn cut_start(text: &str, room: usize) -> String {
    if text.width() <= room {
        return text.to_owned();
    }
    let mut used = 1; // the ellipsis
    let mut start = text.len();
    for (index, character) in text.char_indices().rev() {
        used += character.width().unwrap_or_default();
        if used > room {
            break;
        }
        start = index;
    }
    format!("…{}", &text[start..])
}

/// What a column shows of a device.
fn cell(attached: &Attached, column: Column) -> String {
    let Attached { attachment, volume, .. } = attached;
    match column {
        Column::Device => escaped(attachment.device.as_bytes()),
        Column::Number => attachment.number.to_string(),
        Column::Ro => yes_no(attachment.read_only),
        Column::Lifetime => text(&attachment.lifetime),
        Column::State => text(&attachment.state),
        Column::File => file(attached),
        Column::Inode => attachment.backing_inode.to_string(),
        Column::Offset => attachment.offset.to_string(),
        Column::Sizelimit => attachment.size_limit.to_string(),
        Column::Blocksize => attachment.block_size.to_string(),
        Column::Dio => yes_no(attachment.direct_io),
        Column::Partscan => yes_no(attachment.partition_scan),
        Column::Autoclear => yes_no(attachment.autoclear),
        Column::Ref => text(&attachment.reference),
        Column::Managed => yes_no(attachment.managed),
        Column::Owner => owner(attached),
        Column::Since => since(attached),
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

/// What a column shows of a partition. What is not its own is that of its device where it holds for
/// the partition as well; the rest stands in the line above.
fn part_cell(attached: &Attached, shown: &Partition, column: Column) -> String {
    let Partition { partition, volume, .. } = shown;
    match column {
        Column::Device => escaped(volume.device.as_bytes()),
        Column::Number => partition.number.to_string(),
        Column::Ro | Column::Blocksize => cell(attached, column),
        Column::Start => partition.offset.to_string(),
        Column::Pttype => text(&partition.table),
        Column::Parttype => text(&partition.kind),
        Column::Partlabel => text(&partition.label),
        Column::Partuuid => text(&partition.uuid),
        _ => volume_cell(volume, column),
    }
}

/// What a column shows of that on which a file system may be.
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

/// yes or no.
#[must_use]
pub fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// A text from outside; - where there is none.
#[must_use]
pub fn text(value: &str) -> String {
    if value.is_empty() { NOTHING.to_owned() } else { escaped(value.as_bytes()) }
}

/// The backing file's path.
#[must_use]
pub fn file(attached: &Attached) -> String {
    path(&attached.attachment.backing_file)
}

/// The mount points, separated by commas.
#[must_use]
pub fn mount_points(volume: &VolumeProperties) -> String {
    let points: Vec<String> = volume.mount_points.iter().map(|bytes| path(bytes)).collect();
    if points.is_empty() { NOTHING.to_owned() } else { points.join(",") }
}

/// The owner's uid.
#[must_use]
pub fn owner(attached: &Attached) -> String {
    match attached.attachment.owner {
        NO_OWNER => NOTHING.to_owned(),
        uid => uid.to_string(),
    }
}

/// When it was attached, in UTC.
#[must_use]
pub fn since(attached: &Attached) -> String {
    match attached.attachment.since {
        0 => NOTHING.to_owned(),
        microseconds => time(microseconds),
    }
}

/// Microseconds since 1970 as a date and time in UTC (RFC 3339).
#[must_use]
pub fn time(microseconds: u64) -> String {
    /// The last second of the year 9999: RFC 3339 cannot write what comes after it.
    const LAST: u64 = 253_402_300_799;
    let seconds = (microseconds / 1_000_000).min(LAST);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

fn path(bytes: &[u8]) -> String {
    let bytes = from_bus_path(bytes);
    if bytes.is_empty() { NOTHING.to_owned() } else { escaped(bytes) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use loopd_dbus::properties::to_bus_path;

    use super::*;
    use crate::cli::{Cli, List, Verb};
    use crate::output::json::tests::{example, partition};

    const COLUMNS: &[Column] = &[Column::Device, Column::Size, Column::Type, Column::File];
    const PLAIN: Style = Style { legend: true, bold: false, width: None };

    fn attached(number: u32, file: &[u8]) -> Attached {
        let mut attached = example();
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
        assert!(head.contains("\u{1b}[1m") && !body.contains('\u{1b}'), "{shown:?}");
    }

    #[test]
    fn long_paths_are_cut_at_their_start() {
        let long = format!("/home/{}/end.img", "x".repeat(100));
        let shown = table(&[long.as_bytes()], Style { width: Some(50), ..PLAIN });
        assert!(shown.lines().all(|line| line.width() <= 50), "{shown}");
        assert!(shown.ends_with("xx/end.img\n") && shown.contains(" …xx"), "{shown}");
        assert_eq!(shown.lines().count(), 2);
        assert!(table(&[long.as_bytes()], PLAIN).contains(&long));
    }

    #[test]
    fn names_of_devices_are_never_cut() {
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
    fn wide_letters_count_twice() {
        assert_eq!(cut_start("日本語.img", 8), "…語.img");
        assert_eq!(cut_start("abc", 3), "abc");
        assert_eq!(cut_start("abcd", 3), "…cd");
    }

    #[test]
    fn parts_hang_below_their_device() {
        let Ok(Verb::List(List { columns, .. })) =
            Cli::try_parse_from(["loopctl", "list"]).map(|cli| cli.verb)
        else {
            panic!()
        };
        let mut disk = Attached { partitions: vec![partition(12, 1), partition(12, 2)], ..example() };
        disk.attachment.read_only = true;
        let second = &mut disk.partitions[1];
        second.volume = VolumeProperties { device: "/dev/loop0p2".to_owned(), ..VolumeProperties::default() };
        second.partition.label = "EFI system".to_owned();
        let expected = "\
DEVICE          SIZE  RO   TYPE  LABEL  MOUNTPOINTS        STATE     FILE
/dev/loop0      64M   yes  -     -      -                  attached  /home/a/x.img
├─/dev/loop0p1  20M   yes  ext4  data   /run/media/a/data  -         -
└─/dev/loop0p2  0B    yes  -     -      -                  -         -
/dev/loop9      64M   no   -     -      -                  attached  /a
";
        let rows = [Row::new(&disk, &columns), Row::new(&attached(9, b"/a"), &columns)];
        assert_eq!(render(&columns, &rows, PLAIN), expected);
    }

    #[test]
    fn partitions_have_columns_of_their_own() {
        let columns = &[
            Column::Number,
            Column::Start,
            Column::Pttype,
            Column::Parttype,
            Column::Partlabel,
            Column::Partuuid,
        ];
        let mut disk = example();
        disk.partitions[0].partition.label = "root\n".to_owned();
        let expected = "\
0  -        -    -                                     -       -
1  1048576  gpt  0fc63daf-8483-4772-8e79-3d69d8477de4  root\\n  …
";
        let shown = render(columns, &[Row::new(&disk, columns)], Style { legend: false, ..PLAIN });
        assert_eq!(shown, expected);
    }

    #[test]
    fn times_are_utc_and_never_too_late() {
        assert_eq!(time(1_700_000_000_999_999), "2023-11-14T22:13:20Z");
        assert_eq!(time(u64::MAX), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn every_column_has_a_name_and_a_value() {
        for column in Column::value_variants() {
            assert!(!header(*column).is_empty());
            assert!(!cell(&example(), *column).is_empty(), "{column:?}");
            assert!(!part_cell(&example(), &partition(12, 1), *column).is_empty(), "{column:?}");
        }
    }
}
