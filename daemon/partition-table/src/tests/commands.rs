//! Runs tools that make and read images.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::Image;

/// Skips a test if a tool is not installed.
macro_rules! need {
    ($test:literal, $($tool:literal),+) => {
        for tool in [$($tool),+] {
            if $crate::tests::commands::path_of(tool).is_none() {
                loopd_test_support::skipped($test, &format!("{tool} is not installed"));
                return;
            }
        }
    };
}
pub(super) use need;

pub fn path_of(tool: &str) -> Option<PathBuf> {
    let directories = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    directories.map(|directory| Path::new(directory).join(tool)).into_iter().find(|path| path.exists())
}

/// Runs a tool to its end in a directory, and returns its standard output.
pub fn run(directory: &TempDir, tool: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(path_of(tool).unwrap())
        .args(arguments)
        .current_dir(directory.path())
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (text, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {arguments:?}: {text}{errors}");
    text
}

pub struct OnDisk(pub File);

impl Image for OnDisk {
    fn size(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}
