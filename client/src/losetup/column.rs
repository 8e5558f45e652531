//! The columns of losetup's table.

use super::failure::Failure;

/// A column, named as in its header.
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

    /// What it shows.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Name => "the device",
            Self::Autoclear => "whether the last close detaches it",
            Self::BackFile => "the backing file",
            Self::BackIno => "inode of the backing file",
            Self::BackMajMin => "device that the backing file is on, as major:minor",
            Self::BackMaj => "its major number",
            Self::BackMin => "its minor number",
            Self::MajMin => "device number, as major:minor",
            Self::Maj => "major number",
            Self::Min => "minor number",
            Self::Offset => "where the device starts in the backing file, in bytes",
            Self::PartScan => "whether the kernel looks for partitions",
            Self::Ref => "reference",
            Self::Ro => "whether it is read-only",
            Self::SizeLimit => "bytes at most; 0 is up to the end of the backing file",
            Self::Dio => "whether the page cache of the backing file is bypassed",
            Self::LogSec => "logical block size, in bytes",
        }
    }

    /// Whether its values stand at the right.
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

    /// The width that libsmartcols gives it where a value has more than one letter and there is no
    /// header.
    #[must_use]
    pub const fn usual_width(self) -> usize {
        match self {
            Self::BackMajMin | Self::BackMaj | Self::BackMin => 6,
            Self::Offset | Self::SizeLimit => 5,
            Self::BackIno | Self::LogSec => 4,
            Self::MajMin => 3,
            _ => 1,
        }
    }
}

/// Reads a list of columns; one that starts with + is added to those that there are.
///
/// # Errors
/// A name that no column has; losetup says nothing of an empty one.
pub fn read(list: &[u8], before: Vec<Column>) -> Result<Vec<Column>, Failure> {
    let (mut columns, mut rest) = match list.strip_prefix(b"+") {
        Some(added) => (before, added),
        None => (Vec::new(), list),
    };
    loop {
        // A comma at the very end is taken for a part of the last name.
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
    fn lists_are_read() {
        let read =
            |list: &str| read(list.as_bytes(), vec![Column::Dio]).map_err(|failure| failure.to_string());
        assert_eq!(read("name,RO"), Ok(vec![Column::Name, Column::Ro]));
        assert_eq!(read("+NAME,NAME"), Ok(vec![Column::Dio, Column::Name, Column::Name]));
        for (list, rest) in
            [("NAME,foo,RO", "foo,RO"), ("NAME,", "NAME,"), (" NAME", " NAME"), ("++RO", "+RO")]
        {
            assert_eq!(read(list), Err(format!("unknown column: {rest}")));
        }
        for list in ["", "+", ",NAME", "NAME,,RO"] {
            assert_eq!(read(list), Err(String::new()), "{list}");
        }
    }

    #[test]
    fn all_has_every_column_once() {
        for (place, column) in ALL.iter().enumerate() {
            assert_eq!(*column as usize, place);
        }
    }
}
