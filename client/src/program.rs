//! Runs programs that make file systems and encrypted volumes.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};

use crate::message::{escaped, reason};

/// Where administrators' programs are, which PATH of a user may lack.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// How many bytes of a program's error are shown.
const LONGEST_ERROR: usize = 2048;

/// A program and the package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// The name of the package in Debian; most distributions have the same.
    pub package: &'static str,
}

impl Program {
    /// Its path.
    ///
    /// # Errors
    /// It is not installed.
    pub fn find(self) -> anyhow::Result<PathBuf> {
        self.find_in(&std::env::var_os("PATH").unwrap_or_default())
    }

    fn find_in(self, path: &OsStr) -> anyhow::Result<PathBuf> {
        let Self { name, package } = self;
        let directories = std::env::split_paths(path).filter(|directory| directory.is_absolute());
        let mut all = directories.chain(SYSTEM_DIRECTORIES.map(PathBuf::from));
        let found =
            all.find_map(|directory| Some(directory.join(name)).filter(|program| is_executable(program)));
        found.ok_or_else(|| anyhow::anyhow!("{name} is not installed; install the package {package}"))
    }

    /// Runs it, and waits for it. It is killed if the future is dropped.
    ///
    /// # Errors
    /// It is not installed, or failed; the error has the start of what it printed to standard error.
    pub async fn run(self, arguments: &[OsString], stdin: Option<OwnedFd>) -> anyhow::Result<()> {
        let Self { name, .. } = self;
        let mut command = Command::new(self.find()?);
        command.args(arguments).stdin(stdin.map_or_else(Stdio::null, Stdio::from));
        // Messages are shown to the user as they are, so in the user's language.
        command.stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let cannot = |error: io::Error| anyhow::anyhow!("cannot run {name}: {}", reason(&error));
        let mut child = command.spawn().map_err(cannot)?;
        // The command holds the descriptor for standard input, whose other end waits for its end.
        drop(command);
        let printed = match child.stderr.take() {
            Some(stderr) => read_start(stderr).await,
            None => String::new(),
        };
        let status = child.wait().await.map_err(cannot)?;
        anyhow::ensure!(status.success(), "{name} failed: {}", failure(&printed, status));
        Ok(())
    }
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// The start of what it prints; the rest is dropped, so that the program does not wait for a reader.
async fn read_start(mut stderr: ChildStderr) -> String {
    let (mut start, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        let space = LONGEST_ERROR.saturating_sub(start.len());
        start.extend_from_slice(&buffer[..count.min(space)]);
    }
    let lines = start.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    lines.map(escaped).collect::<Vec<_>>().join("; ")
}

fn failure(printed: &str, status: ExitStatus) -> String {
    if printed.is_empty() { status.to_string() } else { printed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: Program = Program { name: "sh", package: "dash" };

    fn run(script: &str) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(SHELL.run(&["-c".into(), script.into()], None))
    }

    #[test]
    fn the_package_of_a_missing_program_is_named() {
        let missing = Program { name: "mkfs.nonexistent", package: "nonexistent-tools" };
        let text = missing.find().unwrap_err().to_string();
        assert_eq!(text, "mkfs.nonexistent is not installed; install the package nonexistent-tools");
        // Not relative to the working directory.
        assert!(Program { name: "Cargo.toml", ..missing }.find_in(OsStr::new(":.")).is_err());
    }

    #[test]
    fn programs_for_administrators_are_found_without_path() {
        let program = Program { name: "mkfs.ext4", package: "e2fsprogs" };
        assert!(program.find_in(OsStr::new("/nonexistent")).unwrap().ends_with("sbin/mkfs.ext4"));
    }

    #[test]
    fn a_failure_has_what_was_printed() {
        run("echo ignored").unwrap();
        let text = run("printf 'no\\033[m\\n\\n  space \\n' >&2; exit 1").unwrap_err().to_string();
        assert_eq!(text, "sh failed: no\\u{1b}[m; space");
        assert_eq!(run("exit 3").unwrap_err().to_string(), "sh failed: exit status: 3");
        let long = run("yes x >&2 & sleep 0.2; kill $!; exit 1").unwrap_err().to_string();
        assert!(long.len() < 2 * LONGEST_ERROR, "{}", long.len());
    }
}
