//! A secret from a file or from standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

use super::secret::Secret;
use crate::message::{printable, reason};

/// The path that stands for standard input.
const STANDARD_INPUT: &str = "-";

/// Which bytes of a file are the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All but one newline at the end, as for a line typed on a terminal.
    Passphrase,
    /// Exact bytes.
    Key {
        /// Bytes to skip.
        offset: u64,
        /// The number of bytes; `None` for all.
        size: Option<u64>,
    },
}

/// Reads the secret. Blocks while a FIFO has no data.
///
/// # Errors
/// The file cannot be read, is a terminal, has no bytes, too few bytes or more than 8 MiB.
pub fn read(path: &Path, content: Content) -> anyhow::Result<Secret> {
    let shown = shown(path);
    let secret = open(path)
        .and_then(|file| read_content(file, content))
        .map_err(|error| anyhow::anyhow!("cannot read the passphrase from {shown}: {}", reason(&error)))?;
    anyhow::ensure!(!secret.is_empty(), "{shown} has no passphrase: it is empty");
    Ok(secret)
}

fn shown(path: &Path) -> String {
    if is_standard_input(path) { "standard input".to_owned() } else { printable(path.as_os_str().as_bytes()) }
}

/// Whether the path stands for standard input.
#[must_use]
pub fn is_standard_input(path: &Path) -> bool {
    path.as_os_str() == STANDARD_INPUT
}

fn open(path: &Path) -> io::Result<File> {
    let file = if is_standard_input(path) {
        File::from(io::stdin().as_fd().try_clone_to_owned()?)
    } else {
        OpenOptions::new().read(true).custom_flags(OFlag::O_NOCTTY.bits()).open(path)?
    };
    if file.is_terminal() {
        // It would show what is typed.
        return Err(io::Error::other(
            "it is a terminal; without this option loopctl asks, and hides what is typed",
        ));
    }
    Ok(file)
}

fn read_content(mut file: File, content: Content) -> io::Result<Secret> {
    match content {
        Content::Passphrase => {
            let mut secret = read_all(file)?;
            secret.remove_final_newline();
            Ok(secret)
        }
        Content::Key { offset, size: None } => {
            skip(&mut file, offset)?;
            read_all(file)
        }
        Content::Key { offset, size: Some(size) } => {
            skip(&mut file, offset)?;
            let secret = read_all(file.take(size))?;
            if (secret.bytes().len() as u64) < size {
                let found = secret.bytes().len();
                return Err(io::Error::other(format!(
                    "the key has {size} bytes, but the file ends after {found} of them"
                )));
            }
            Ok(secret)
        }
    }
}

fn read_all(mut file: impl Read) -> io::Result<Secret> {
    let mut secret = Secret::new();
    loop {
        match secret.append_from(|space| file.read(space)) {
            Ok(0) => return Ok(secret),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The last byte that fits has been read; the end may follow.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge && is_at_end(&mut file)? => {
                return Ok(secret);
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_at_end(file: &mut impl Read) -> io::Result<bool> {
    Ok(file.read(&mut [0])? == 0)
}

/// Skips bytes; of a FIFO by reading them.
fn skip(file: &mut File, offset: u64) -> io::Result<()> {
    if offset == 0 || file.seek(SeekFrom::Current(i64::try_from(offset).unwrap_or(i64::MAX))).is_ok() {
        return Ok(());
    }
    io::copy(&mut file.take(offset), &mut io::sink()).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::passphrase::secret::LONGEST;

    const ALL: Content = Content::Key { offset: 0, size: None };

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn error(path: &Path, content: Content) -> String {
        read(path, content).err().unwrap().to_string()
    }

    #[test]
    fn a_passphrase_ends_before_one_newline_and_a_key_has_all_bytes() {
        for (bytes, passphrase) in [
            (&b"secret"[..], &b"secret"[..]),
            (b"secret\n", b"secret"),
            (b"secret\n\n", b"secret\n"),
            (b"\0\xff \r\n", b"\0\xff \r"),
        ] {
            let file = file(bytes);
            assert_eq!(read(file.path(), Content::Passphrase).unwrap().bytes(), passphrase);
            assert_eq!(read(file.path(), ALL).unwrap().bytes(), bytes);
        }
    }

    #[test]
    fn an_empty_secret_is_an_error() {
        for (bytes, content) in [(&b""[..], ALL), (b"", Content::Passphrase), (b"\n", Content::Passphrase)] {
            let file = file(bytes);
            let text = error(file.path(), content);
            assert!(text.ends_with(" has no passphrase: it is empty"), "{text}");
        }
        assert_eq!(read(file(b"\n").path(), ALL).unwrap().bytes(), b"\n");
    }

    #[test]
    fn a_key_is_a_part_of_the_file() {
        let file = file(b"0123456789");
        let part = |offset, size| read(file.path(), Content::Key { offset, size });
        assert_eq!(part(2, Some(3)).unwrap().bytes(), b"234");
        assert_eq!(part(7, None).unwrap().bytes(), b"789");
        let text = error(file.path(), Content::Key { offset: 8, size: Some(3) });
        assert!(text.ends_with("the key has 3 bytes, but the file ends after 2 of them"), "{text}");
        assert!(part(10, None).err().unwrap().to_string().ends_with("it is empty"));
        assert!(part(u64::MAX, None).is_err());
    }

    #[test]
    fn a_fifo_is_read_to_its_end_and_skipped_by_reading() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let writer = {
            let path = path.clone();
            std::thread::spawn(move || std::fs::write(path, [&[b'x'; 9000][..], b"key"].concat()).unwrap())
        };
        assert_eq!(read(&path, Content::Key { offset: 9000, size: None }).unwrap().bytes(), b"key");
        writer.join().unwrap();
    }

    /// The program of the next test.
    #[test]
    fn child() {
        if let Some(path) = std::env::var_os("LOOPCTL_TEST_FIFO") {
            let _ = read(Path::new(&path), ALL);
        }
    }

    #[test]
    fn a_signal_ends_the_wait_for_a_fifo() {
        use std::os::unix::process::ExitStatusExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "passphrase::file::tests::child"])
            .env("LOOPCTL_TEST_FIFO", &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The open returns when the child has opened it; it then waits for data that never come.
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(2));
        drop(writer);
    }

    #[test]
    fn eight_mebibytes_are_accepted_and_no_more() {
        let mut limit = file(&vec![1; LONGEST]);
        assert_eq!(read(limit.path(), ALL).unwrap().bytes().len(), LONGEST);
        limit.write_all(&[1]).unwrap();
        assert!(error(limit.path(), ALL).ends_with("it has more than 8 MiB"));
        assert!(error(file(&vec![1; 9 << 20]).path(), ALL).ends_with("it has more than 8 MiB"));
        assert!(error(Path::new("/dev/zero"), ALL).ends_with("it has more than 8 MiB"));
    }

    #[test]
    fn unsuitable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        assert!(error(directory.path(), ALL).ends_with(": Is a directory"));
        let missing = error(Path::new("/nonexistent/\u{1b}[m"), ALL);
        assert_eq!(
            missing,
            "cannot read the passphrase from /nonexistent/\\u{1b}[m: No such file or directory"
        );
        let pty = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&pty.slave).unwrap();
        assert!(error(&path, Content::Passphrase).contains("it is a terminal"));
    }
}
