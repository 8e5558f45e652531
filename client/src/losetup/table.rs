//! losetup's table, exactly as libsmartcols draws it.

use loopd_common::text::is_deceptive;
use unicode_width::UnicodeWidthStr;

use super::column::{Column, Json};

/// The format of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Print a header.
    pub headings: bool,
    /// No alignment.
    pub raw: bool,
    /// Print JSON.
    pub json: bool,
}

impl Default for Format {
    fn default() -> Self {
        Self { headings: true, raw: false, json: false }
    }
}

/// A row: the value of each column, or `None`.
pub type Row = Vec<Option<Vec<u8>>>;

/// Draws the table. Without `is_utf8`, characters beyond ASCII are escaped.
#[must_use]
pub fn draw(columns: &[Column], rows: &[Row], format: Format, is_utf8: bool) -> Vec<u8> {
    if format.json {
        return json(columns, rows);
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let mut lines: Vec<Vec<String>> = Vec::new();
    if format.headings {
        lines.push(columns.iter().map(|column| column.header().to_owned()).collect());
    }
    let show = |value: &Option<Vec<u8>>| match value {
        None => String::new(),
        Some(bytes) if format.raw => escape_blanks(bytes),
        Some(bytes) => escape_control(bytes, is_utf8),
    };
    lines.extend(rows.iter().map(|row| row.iter().map(show).collect()));
    let widths: Vec<usize> = match format.raw {
        true => vec![0; columns.len()],
        false => columns.iter().enumerate().map(|(at, column)| width(&lines, at, *column)).collect(),
    };
    lines.iter().map(|line| aligned(line, columns, &widths)).collect::<String>().into_bytes()
}

fn width(lines: &[Vec<String>], at: usize, column: Column) -> usize {
    match lines.iter().map(|line| line[at].width()).max().unwrap_or_default() {
        narrow @ (0 | 1) => narrow,
        wide => wide.max(column.minimum_width()),
    }
}

/// Joins the values of a line. The last one is not padded, and if it is empty, only its separator is printed.
fn aligned(line: &[String], columns: &[Column], widths: &[usize]) -> String {
    let mut text = String::new();
    for (at, (value, column)) in line.iter().zip(columns).enumerate() {
        let is_last = at + 1 == line.len();
        let gap = " ".repeat(widths[at].saturating_sub(value.width()));
        let (before, after) = if column.is_right() { (gap.as_str(), "") } else { ("", gap.as_str()) };
        match is_last {
            true if value.is_empty() => {}
            true => text.extend([before, value]),
            false => text.extend([before, value, after, " "]),
        }
    }
    text + "\n"
}

/// A value without spaces: everything except printable ASCII is escaped, and so are backslashes.
fn escape_blanks(bytes: &[u8]) -> String {
    let escaped = |byte: u8| match byte {
        b'\\' => escape(byte),
        byte if byte.is_ascii_graphic() => char::from(byte).to_string(),
        byte => escape(byte),
    };
    bytes.iter().copied().map(escaped).collect()
}

/// A value for the terminal: control characters are escaped, and text that looks like an escape.
fn escape_control(bytes: &[u8], is_utf8: bool) -> String {
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        let mut characters = chunk.valid().chars().peekable();
        while let Some(character) = characters.next() {
            let is_escape = character == '\\' && characters.peek() == Some(&'x');
            let is_shown = !is_deceptive(character) && (is_utf8 || character.is_ascii());
            if is_shown && !is_escape {
                shown.push(character);
            } else {
                let mut buffer = [0; 4];
                shown.extend(character.encode_utf8(&mut buffer).bytes().map(escape));
            }
        }
        shown.extend(chunk.invalid().iter().copied().map(escape));
    }
    shown
}

fn escape(byte: u8) -> String {
    format!("\\x{byte:02x}")
}

fn json(columns: &[Column], rows: &[Row]) -> Vec<u8> {
    let object = |row: &Row| {
        let members = row.iter().zip(columns).map(|(value, column)| {
            let key = column.header().to_ascii_lowercase();
            [format!("         \"{key}\": ").into_bytes(), json_value(value.as_deref(), *column)].concat()
        });
        let members = members.collect::<Vec<_>>().join(&b",\n"[..]);
        [&b"{\n"[..], &members, b"\n      }"].concat()
    };
    let objects = rows.iter().map(object).collect::<Vec<_>>().join(&b","[..]);
    let indent: &[u8] = if rows.is_empty() { b"" } else { b"      " };
    [&b"{\n   \"loopdevices\": [\n"[..], indent, &objects, b"\n   ]\n}\n"].concat()
}

fn json_value(value: Option<&[u8]>, column: Column) -> Vec<u8> {
    match (value, column.json()) {
        (None, _) => b"null".to_vec(),
        (Some(value), Json::Number) => value.to_vec(),
        (Some(value), Json::Boolean) => value.ne(b"0").to_string().into_bytes(),
        (Some(value), Json::String) => quoted(value),
    }
}

/// Bytes that are not UTF-8 are not escaped, as in libsmartcols.
fn quoted(bytes: &[u8]) -> Vec<u8> {
    let mut text = vec![b'"'];
    for byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend([b'\\', *byte]),
            b'\x08' => text.extend(b"\\b"),
            b'\x0c' => text.extend(b"\\f"),
            b'\n' => text.extend(b"\\n"),
            b'\r' => text.extend(b"\\r"),
            b'\t' => text.extend(b"\\t"),
            0..=0x1f => text.extend(format!("\\u{byte:04x}").bytes()),
            _ => text.push(*byte),
        }
    }
    text.push(b'"');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::losetup::column;

    const COLUMNS: &[Column] = &[Column::Name, Column::Offset, Column::BackFile, Column::LogSec];

    fn row(name: &str, offset: Option<u64>, file: Option<&[u8]>) -> Row {
        vec![
            Some(name.as_bytes().to_vec()),
            offset.map(|offset| offset.to_string().into_bytes()),
            file.map(<[u8]>::to_vec),
            offset.map(|_| b"512".to_vec()),
        ]
    }

    fn drawn(rows: &[Row], format: Format) -> String {
        String::from_utf8_lossy(&draw(COLUMNS, rows, format, true)).into_owned()
    }

    #[test]
    fn columns_have_the_width_of_their_widest_value() {
        let rows = [row("/dev/loop1", Some(1_048_576), Some(b"/a b")), row("/dev/loop10", None, None)];
        let expected = [
            "NAME         OFFSET BACK-FILE LOG-SEC",
            "/dev/loop1  1048576 /a b          512",
            "/dev/loop10                   ",
            "",
        ];
        assert_eq!(drawn(&rows, Format::default()), expected.join("\n"));
        assert_eq!(drawn(&[], Format::default()), "");
    }

    #[test]
    fn some_columns_have_a_minimum_width_without_header() {
        let format = Format { headings: false, ..Format::default() };
        assert_eq!(drawn(&[row("/dev/loop1", Some(0), Some(b"/a"))], format), "/dev/loop1 0 /a  512\n");
        assert_eq!(drawn(&[row("/dev/loop1", Some(10), Some(b"/a"))], format), "/dev/loop1    10 /a  512\n");
    }

    #[test]
    fn raw_values_contain_no_spaces() {
        let format = Format { raw: true, ..Format::default() };
        let rows = [row("/dev/loop1", Some(0), Some("/a b\\ü".as_bytes())), row("/dev/loop2", None, None)];
        let expected =
            "NAME OFFSET BACK-FILE LOG-SEC\n/dev/loop1 0 /a\\x20b\\x5c\\xc3\\xbc 512\n/dev/loop2   \n";
        assert_eq!(drawn(&rows, format), expected);
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape_control(b"/a\nb\x1b[2J\xff \\x41 \\a", true), "/a\\x0ab\\x1b[2J\\xff \\x5cx41 \\a");
        assert_eq!(escape_control("ü\u{202e}".as_bytes(), true), "ü\\xe2\\x80\\xae");
        assert_eq!(escape_control("ü".as_bytes(), false), "\\xc3\\xbc");
    }

    #[test]
    fn json_values_are_typed() {
        let format = Format { json: true, ..Format::default() };
        let expected = "{
   \"loopdevices\": [
      {
         \"name\": \"/dev/loop1\",
         \"offset\": 0,
         \"back-file\": \"/a\\n\\\"b\\\\\\u0001\",
         \"log-sec\": 512
      },{
         \"name\": \"/dev/loop2\",
         \"offset\": null,
         \"back-file\": null,
         \"log-sec\": null
      }
   ]
}
";
        let rows = [row("/dev/loop1", Some(0), Some(b"/a\n\"b\\\x01")), row("/dev/loop2", None, None)];
        assert_eq!(drawn(&rows, format), expected);
        assert_eq!(drawn(&[], format), "{\n   \"loopdevices\": [\n\n   ]\n}\n");
        let flag = draw(&[Column::Ro], &[vec![Some(b"1".to_vec())]], format, true);
        assert!(String::from_utf8_lossy(&flag).contains("\"ro\": true"));
    }

    #[test]
    fn minimum_widths_do_not_exceed_the_header() {
        for column in column::ALL {
            assert!(column.minimum_width() <= column.header().len());
        }
    }
}
