//! The lines of `/proc/swaps` (`proc_swaps(5)`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::mountinfo::unescaped;

/// The file with the swap areas in use.
pub const FILE: &str = "/proc/swaps";

/// Parses the file: the paths of the block devices, without those of files. Invalid lines are skipped.
pub fn devices(text: &[u8]) -> impl Iterator<Item = PathBuf> {
    text.split(|byte| *byte == b'\n').skip(1).filter_map(device)
}

/// A line consists of: path, type, size, used, priority.
fn device(line: &[u8]) -> Option<PathBuf> {
    let mut fields = line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|field| !field.is_empty());
    let path = fields.next()?;
    (fields.next()? == b"partition").then(|| PathBuf::from(OsString::from_vec(unescaped(path))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_files_are_not() {
        let text = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/loop0p1                            partition\t20476\t\t0\t\t-2\n\
            /swap\\040file                            file\t\t20476\t\t0\t\t-3\n\
            nonsense\n\
            /dev/my\\040disk partition 1 0 -4\n";
        let found: Vec<_> = devices(text).collect();
        assert_eq!(found, [PathBuf::from("/dev/loop0p1"), PathBuf::from("/dev/my disk")]);
        assert_eq!(devices(b"").count(), 0);
    }
}
