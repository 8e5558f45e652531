//! The kernel's table of mounts, as this process sees it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The mount points, in the order in which they were mounted.
#[derive(Clone, Debug, Default)]
pub struct MountTable {
    points: Vec<PathBuf>,
}

impl MountTable {
    /// The table of now.
    ///
    /// # Errors
    /// procfs cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read("/proc/self/mountinfo")?))
    }

    fn parse(text: &[u8]) -> Self {
        let points = text.split(|byte| *byte == b'\n').filter_map(|line| {
            // ID, parent, device, root within the file system, mount point
            let point = line.split(|byte| *byte == b' ').nth(4)?;
            Some(OsString::from_vec(unescape(point)).into())
        });
        Self { points: points.collect() }
    }

    /// The mount that the path lies on, or is the top of.
    #[must_use]
    pub fn holding(&self, path: &Path) -> Option<&Path> {
        let above = self.points.iter().filter(|point| path.starts_with(point));
        above.max_by_key(|point| point.as_os_str().len()).map(PathBuf::as_path)
    }

    /// What is mounted below the mount point.
    pub fn below(&self, point: &Path) -> impl Iterator<Item = &Path> {
        self.points
            .iter()
            .map(PathBuf::as_path)
            .filter(move |other| *other != point && other.starts_with(point))
    }
}

/// The path without links. One that cannot be looked at, as below a file system that is damaged, stays
/// as it is written.
#[must_use]
pub fn resolve(path: &Path) -> PathBuf {
    fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

/// Takes back what the kernel does to blanks and line ends: a backslash and three octal digits.
fn unescape(escaped: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[3..];
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 7:0 / /run/media/a/data rw,nosuid,nodev shared:1 - ext4 /dev/loop0 rw
31 22 7:1 / /run/media/a/my\\040disk\\134 ro - iso9660 /dev/loop1 ro
32 30 0:50 / /run/media/a/data/sub rw - tmpfs none rw
";

    #[test]
    fn the_innermost_mount_holds_a_path() {
        let table = MountTable::parse(TABLE);
        for (path, point) in [
            ("/run/media/a/data", "/run/media/a/data"),
            ("/run/media/a/data/x/y", "/run/media/a/data"),
            ("/run/media/a/data/sub", "/run/media/a/data/sub"),
            ("/run/media/a/data2", "/"),
            ("/run/media/a/my disk\\/x", "/run/media/a/my disk\\"),
        ] {
            assert_eq!(table.holding(Path::new(path)), Some(Path::new(point)), "{path}");
        }
        assert_eq!(MountTable::default().holding(Path::new("/")), None);
    }

    #[test]
    fn what_is_mounted_below_is_found() {
        let table = MountTable::parse(TABLE);
        let below = |point: &'static str| table.below(Path::new(point)).collect::<Vec<_>>();
        assert_eq!(below("/run/media/a/data"), [Path::new("/run/media/a/data/sub")]);
        assert_eq!(below("/").len(), 3);
        assert_eq!(below("/run/media/a/data/sub").len(), 0);
    }

    #[test]
    fn the_machine_s_table_can_be_read() {
        let table = MountTable::read().unwrap();
        assert_eq!(table.holding(Path::new("/proc/self")), Some(Path::new("/proc")));
    }

    #[test]
    fn half_an_escape_is_none() {
        assert_eq!(unescape(br"a\040b\0"), br"a b\0");
        assert_eq!(unescape(br"\999\\"), br"\999\\");
        assert_eq!(unescape(b""), b"");
    }
}
