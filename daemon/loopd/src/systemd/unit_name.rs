//! Names of mount units (`systemd.unit(5)`, "String escaping").

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The name of the mount unit of a directory, given by an absolute path without `.` and `..`.
pub fn of_mount(path: &Path) -> String {
    format!("{}.mount", of_path(path))
}

/// Escapes a path for a unit name.
pub fn of_path(path: &Path) -> String {
    let parts = path.as_os_str().as_bytes().split(|byte| *byte == b'/').filter(|part| !part.is_empty());
    let name = parts.collect::<Vec<_>>().join(&b'/');
    if name.is_empty() { "-".to_owned() } else { escape(&name) }
}

/// Escapes a string for a unit name.
pub fn escaped(text: &str) -> String {
    escape(text.as_bytes())
}

fn escape(bytes: &[u8]) -> String {
    let mut name = String::new();
    for (position, byte) in bytes.iter().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if position == 0 => name.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => name.push(char::from(*byte)),
            _ => name.push_str(&format!("\\x{byte:02x}")),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::process::Command;

    use super::*;

    const PATHS: [&[u8]; 12] = [
        b"/",
        b"/run/media/alice/data",
        b"/run/media/alice/My Disk-1",
        b"/.hidden/x",
        b"/a/.b",
        b"//a///b/",
        b"/run/media/a.b/100%n",
        b"/run/media/alice/a\\b",
        b"/run/media/alice/'quoted' \"twice\"",
        "/run/media/älice/Bücher".as_bytes(),
        b"/a/\xff\x01",
        b"/a:b_c@d",
    ];

    #[test]
    fn special_bytes_are_escaped() {
        let of = |path: &[u8]| of_mount(Path::new(OsStr::from_bytes(path)));
        let expected = [
            "-.mount",
            "run-media-alice-data.mount",
            "run-media-alice-My\\x20Disk\\x2d1.mount",
            "\\x2ehidden-x.mount",
            "a-.b.mount",
            "a-b.mount",
            "run-media-a.b-100\\x25n.mount",
            "run-media-alice-a\\x5cb.mount",
            "run-media-alice-\\x27quoted\\x27\\x20\\x22twice\\x22.mount",
            "run-media-\\xc3\\xa4lice-B\\xc3\\xbccher.mount",
            "a-\\xff\\x01.mount",
            "a:b_c\\x40d.mount",
        ];
        assert_eq!(PATHS.map(of), expected);
    }

    /// systemd-escape rejects paths that are not UTF-8; loopd makes no units for those.
    #[test]
    fn names_agree_with_systemd_escape() {
        for path in PATHS.iter().filter(|path| std::str::from_utf8(path).is_ok()) {
            let mut tool = Command::new("systemd-escape");
            let Ok(output) = tool.args(["--path", "--"]).arg(OsStr::from_bytes(path)).output() else {
                return loopd_test_support::skipped("unit_name", "systemd-escape is not installed");
            };
            assert!(output.status.success(), "{path:?}");
            let path = Path::new(OsStr::from_bytes(path));
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), of_path(path));
        }
    }

    #[test]
    fn a_safe_name_fits_into_a_unit_name() {
        bolero::check!().with_type::<Vec<u8>>().for_each(|label| {
            let name = loopd_engine::safe_name(label).unwrap_or_default();
            assert!(escaped(&name).len() <= loopd_engine::LONGEST_ESCAPED_NAME, "{name:?}");
        });
    }
}
