//! The lines of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The file with the mounts of the process's mount namespace. It reports `POLLPRI` when a mount is added or removed.
pub const FILE: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Major and minor number of the device; only the kernel sets them. Major 0: a file system without a
    /// block device of its own.
    pub device: (u32, u32),
    /// The mount point.
    pub point: PathBuf,
    /// The type of the file system.
    pub file_system: &'a [u8],
    /// The source: for most file systems a text that the user has chosen.
    pub source: Vec<u8>,
}

/// Parses the file: the mounts, in the order in which they were made. Invalid lines are skipped.
pub fn mounts(text: &[u8]) -> impl Iterator<Item = Mount<'_>> {
    text.split(|byte| *byte == b'\n').filter_map(mount)
}

/// A line consists of: ID, parent, device, root within the file system, mount point, options, optional
/// fields, `-`, type, source, options of the file system.
fn mount(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = device_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
    let point = PathBuf::from(OsString::from_vec(unescaped(fields.nth(1)?)));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let file_system = fields.next().unwrap_or_default();
    let source = unescaped(fields.next().unwrap_or_default());
    Some(Mount { device, point, file_system, source })
}

/// Parses `MAJOR:MINOR`.
#[must_use]
pub fn device_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Decodes the kernel's octal escapes of space, tab, newline and backslash.
pub(crate) fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = if *first == b'\\' { tail.first_chunk().and_then(octal) } else { None };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

fn octal(digits: &[u8; 3]) -> Option<u8> {
    digits.iter().try_fold(0_u8, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(text: &[u8]) -> Vec<PathBuf> {
        mounts(text).map(|mount| mount.point).collect()
    }

    #[test]
    fn fields_are_parsed() {
        let text = b"23 1 7:3 / /mnt/c rw,nosuid shared:7 master:1 - ext4 /dev/loop3 rw\n";
        let expected = Mount {
            device: (7, 3),
            point: "/mnt/c".into(),
            file_system: b"ext4",
            source: b"/dev/loop3".to_vec(),
        };
        assert_eq!(mounts(text).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn escapes_are_decoded() {
        let text = b"22 1 7:3 / /mnt/a\\040b\\134 rw - ext4 none rw\n";
        assert_eq!(points(text), [PathBuf::from("/mnt/a b\\")]);
        for kept in ["\\04", "\\", "\\08b", "\\+12", "\\777", "\\  "] {
            assert_eq!(unescaped(kept.as_bytes()), kept.as_bytes());
        }
    }

    #[test]
    fn invalid_lines_are_skipped() {
        let text = b"nonsense\n\n22 1 x:3 / /a rw - ext4 none rw\n22 1 7:3 /\n22 1 0:5 / /b rw";
        assert_eq!(points(text), [PathBuf::from("/b")]);
    }
}
