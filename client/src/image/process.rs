//! The processes that procfs shows.

use std::fs;
use std::path::{Path, PathBuf};

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
}

impl Process {
    /// All processes, by pid.
    pub fn all() -> impl Iterator<Item = Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(Self { pid: entry.file_name().to_str()?.parse().ok()? }))
    }

    /// Its directory in procfs.
    #[must_use]
    pub fn directory(self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string())
    }

    /// Its program's name, which it can choose itself.
    #[must_use]
    pub fn name(self) -> String {
        let name = fs::read(self.directory().join("comm")).unwrap_or_default();
        String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
    }
}

/// The path of a mapped file in a line of `/proc/PID/maps`: addresses, permissions, offset, device, inode, and after
/// blanks the path.
#[must_use]
pub fn mapped_path(line: &[u8]) -> Option<&[u8]> {
    let start = line.iter().position(|byte| *byte == b'/')?;
    Some(&line[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_among_them() {
        let own = Process { pid: std::process::id() };
        assert!(Process::all().any(|process| process == own));
        assert!(!own.name().is_empty());
        assert_eq!(Process { pid: u32::MAX }.name(), "");
    }
}
