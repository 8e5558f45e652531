//! The columns of losetup's table.

use super::failure::Failure;

/// A column by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Name,
    Autoclear,
    BackFile,
    BackIno,
    BackMajMin,
    BackMaj,
    BackMin,
    MajMin,
    Maj,
    Min,
    Offset,
    PartScan,
    Ref,
    Ro,
    SizeLimit,
    Dio,
    LogSec,
}

/// The type of a column's values in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Json {
    /// "…"
    String,
    /// 5
    Number,
    /// true, of 1
    Boolean,
}

/// Every column, in the order of `--output-all`.
pub const ALL: [Column; 17] = [
    Column::Name,
    Column::Autoclear,
    Column::BackFile,
    Column::BackIno,
    Column::BackMajMin,
    Column::BackMaj,
    Column::BackMin,
    Column::MajMin,
    Column::Maj,
    Column::Min,
    Column::Offset,
    Column::PartScan,
    Column::Ref,
    Column::Ro,
    Column::SizeLimit,
    Column::Dio,
    Column::LogSec,
];

/// The columns of `--list`.
pub const DEFAULT: [Column; 8] = [
    Column::Name,
    Column::SizeLimit,
    Column::Offset,
    Column::Autoclear,
    Column::Ro,
    Column::BackFile,
    Column::Dio,
    Column::LogSec,
];

impl Column {
    /// Its header.
    #[must_use]
    pub const fn header(self) -> &'static str {
        match self {
            Self::Name => "NAME",
            Self::Autoclear => "AUTOCLEAR",
            Self::BackFile => "BACK-FILE",
            Self::BackIno => "BACK-INO",
            Self::BackMajMin => "BACK-MAJ:MIN",
            Self::BackMaj => "BACK-MAJ",
            Self::BackMin => "BACK-MIN",
            Self::MajMin => "MAJ:MIN",
            Self::Maj => "MAJ",
            Self::Min => "MIN",
            Self::Offset => "OFFSET",
            Self::PartScan => "PARTSCAN",
            Self::Ref => "REF",
            Self::Ro => "RO",
            Self::SizeLimit => "SIZELIMIT",
            Self::Dio => "DIO",
            Self::LogSec => "LOG-SEC",
        }
    }

    /// Its description.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Name => "the device",
            Self::Autoclear => "whether the last close detaches it",
            Self::BackFile => "the backing file",
            Self::BackIno => "inode of the backing file",
            Self::BackMajMin => "device number of the backing file's file system, as major:minor",
            Self::BackMaj => "its major number",
            Self::BackMin => "its minor number",
            Self::MajMin => "device number, as major:minor",
            Self::Maj => "major number",
            Self::Min => "minor number",
            Self::Offset => "offset in the backing file, in bytes",
            Self::PartScan => "whether the kernel scans for partitions",
            Self::Ref => "reference",
            Self::Ro => "whether it is read-only",
            Self::SizeLimit => "maximum size in bytes; 0 is up to the end of the backing file",
            Self::Dio => "whether direct I/O bypasses the page cache of the backing file",
            Self::LogSec => "logical block size, in bytes",
        }
    }

    /// Whether its values are right-aligned.
    #[must_use]
    pub const fn is_right(self) -> bool {
        !matches!(self.json(), Json::String)
    }

    /// The type of its values in JSON.
    #[must_use]
    pub const fn json(self) -> Json {
        match self {
            Self::Name
            | Self::BackFile
            | Self::BackMajMin
            | Self::BackMaj
            | Self::BackMin
            | Self::MajMin
            | Self::Ref => Json::String,
            Self::BackIno | Self::Maj | Self::Min | Self::Offset | Self::SizeLimit | Self::LogSec => {
                Json::Number
            }
            Self::Autoclear | Self::PartScan | Self::Ro | Self::Dio => Json::Boolean,
        }
    }

    /// The minimum width that libsmartcols uses without a header, if a value has more than one character.
    #[must_use]
    pub const fn minimum_width(self) -> usize {
        match self {
            Self::BackMajMin | Self::BackMaj | Self::BackMin => 6,
            Self::Offset | Self::SizeLimit => 5,
            Self::BackIno | Self::LogSec => 4,
            Self::MajMin => 3,
            _ => 1,
        }
    }
}

/// Parses a list of columns; a list with a leading + is appended to the given columns.
///
/// # Errors
/// An unknown column; losetup prints no message for an empty name.
pub fn parse(list: &[u8], given: Vec<Column>) -> Result<Vec<Column>, Failure> {
    let (mut columns, mut rest) = match list.strip_prefix(b"+") {
        Some(added) => (given, added),
        None => (Vec::new(), list),
    };
    loop {
        // losetup treats a trailing comma as part of the last name.
        let comma = rest.iter().position(|byte| *byte == b',').filter(|comma| comma + 1 < rest.len());
        let name = &rest[..comma.unwrap_or(rest.len())];
        if name.is_empty() {
            return Err(Failure::silent());
        }
        let column = ALL.iter().find(|column| column.header().as_bytes().eq_ignore_ascii_case(name));
        let unknown = || Failure::new([b"unknown column: ", rest].concat());
        columns.push(*column.ok_or_else(unknown)?);
        match comma {
            Some(comma) => rest = &rest[comma + 1..],
            None => return Ok(columns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_parsed() {
        let parse =
            |list: &str| parse(list.as_bytes(), vec![Column::Dio]).map_err(|failure| failure.to_string());
        assert_eq!(parse("name,RO"), Ok(vec![Column::Name, Column::Ro]));
        assert_eq!(parse("+NAME,NAME"), Ok(vec![Column::Dio, Column::Name, Column::Name]));
        for (list, rest) in
            [("NAME,foo,RO", "foo,RO"), ("NAME,", "NAME,"), (" NAME", " NAME"), ("++RO", "+RO")]
        {
            assert_eq!(parse(list), Err(format!("unknown column: {rest}")));
        }
        for list in ["", "+", ",NAME", "NAME,,RO"] {
            assert_eq!(parse(list), Err(String::new()), "{list}");
        }
    }

    #[test]
    fn all_has_every_column_once() {
        for (index, column) in ALL.iter().enumerate() {
            assert_eq!(*column as usize, index);
        }
    }
}
