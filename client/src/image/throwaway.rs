//! A writable view of a file whose changes are discarded: an unnamed copy of the file.
//!
//! The copy shares the file's blocks if the file system can do that (a reflink), and otherwise has the
//! file's data without its holes. It has no directory entry, so the kernel deletes it when its last
//! descriptor is closed.

mod copy;
mod progress;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use loopd_common::limits::REFERENCE_LENGTH;
use nix::errno::Errno;

use self::progress::Progress;
use super::backing_file::open_backing_file;
use crate::message::{escaped, printable, reason};
use crate::show::size::human;

/// Larger copies need the user's confirmation.
const CONFIRM_ABOVE: u64 = 1 << 30;

/// Makes the copy, in the file's directory by default. A large copy needs confirmation.
///
/// # Errors
/// The file cannot be read, there is no space for the copy, or the user declined. No copy is left then.
pub fn make(path: &Path, directory: Option<&Path>, is_confirmed: bool) -> anyhow::Result<File> {
    let shown = printable(path.as_os_str().as_bytes());
    let original = open_backing_file(path, true)?;
    anyhow::ensure!(
        original.metadata()?.is_file(),
        "cannot make a throwaway view of {shown}: it is a block device; name a regular file"
    );
    let directory = match directory {
        Some(directory) => directory.to_owned(),
        None => {
            directory_of(path).map_err(|error| anyhow::anyhow!("cannot find {shown}: {}", reason(&error)))?
        }
    };
    let copy = unnamed_file(&directory)?;
    if rustix::fs::ioctl_ficlone(&copy, &original).is_ok() {
        return Ok(copy);
    }
    let failed = |error: io::Error| failure(&shown, &directory, &error);
    let plan = copy::Plan::of(&original).map_err(failed)?;
    let confirmation = Confirmation::for_copy(plan.bytes(), is_confirmed);
    confirmation.ask(
        &question(plan.bytes(), &shown, &directory),
        is_answerable(),
        &mut io::stdin().lock(),
    )?;
    ensure_space(&copy, plan.bytes(), &directory)?;
    let mut progress = Progress::new(plan.bytes());
    let copied = plan.execute(&original, &copy, |bytes| progress.advance(bytes));
    drop(progress);
    copied.map_err(failed)?;
    Ok(copy)
}

/// The reference of a throwaway view: the file's name, since the copy has none.
#[must_use]
pub fn reference(path: &Path) -> String {
    let name = path.file_name().unwrap_or(OsStr::new(""));
    let mut name = escaped(name.as_bytes());
    let end = (0..=REFERENCE_LENGTH).rev().find(|end| name.is_char_boundary(*end));
    name.truncate(end.unwrap_or_default());
    name
}

/// The directory of the file itself, if the path is a symbolic link in another one.
///
/// # Errors
/// The file does not exist.
pub fn directory_of(path: &Path) -> io::Result<PathBuf> {
    let real = fs::canonicalize(path)?;
    Ok(real.parent().unwrap_or(Path::new("/")).to_owned())
}

fn unnamed_file(directory: &Path) -> anyhow::Result<File> {
    tempfile::tempfile_in(directory).map_err(|error| {
        anyhow::anyhow!(
            "cannot keep a throwaway copy in {}: {}; choose a directory that you may write to with --throwaway-dir",
            printable(directory.as_os_str().as_bytes()),
            reason(&error)
        )
    })
}

fn failure(shown: &str, directory: &Path, error: &io::Error) -> anyhow::Error {
    let remedy = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::EDQUOT) => "; choose another directory with --throwaway-dir",
        _ => "",
    };
    let directory = printable(directory.as_os_str().as_bytes());
    anyhow::anyhow!("cannot copy {shown} to an unnamed file in {directory}: {}{remedy}", reason(error))
}

fn ensure_space(copy: &File, bytes: u64, directory: &Path) -> anyhow::Result<()> {
    // If this fails, the copy itself will fail with ENOSPC.
    let Ok(space) = rustix::fs::fstatvfs(copy) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    anyhow::ensure!(
        bytes <= free,
        "the throwaway copy takes {}, and {} has {} free; choose another directory with --throwaway-dir",
        human(bytes),
        printable(directory.as_os_str().as_bytes()),
        human(free)
    );
    Ok(())
}

fn question(bytes: u64, shown: &str, directory: &Path) -> String {
    let directory = printable(directory.as_os_str().as_bytes());
    format!("{directory} cannot share the blocks of {shown}, so {} would be copied", human(bytes))
}

fn is_answerable() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Whether a copy needs the user's confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confirmation {
    Given,
    Needed,
}

impl Confirmation {
    fn for_copy(bytes: u64, is_confirmed: bool) -> Self {
        if is_confirmed || bytes <= CONFIRM_ABOVE { Self::Given } else { Self::Needed }
    }

    fn ask(self, question: &str, is_answerable: bool, answers: &mut impl BufRead) -> anyhow::Result<()> {
        if self == Self::Given {
            return Ok(());
        }
        anyhow::ensure!(is_answerable, "{question}; add --yes to allow it");
        eprint!("loopctl: {question}. Continue? [y/N] ");
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        let is_yes = ["y", "yes"].contains(&answer.trim().to_lowercase().as_str());
        anyhow::ensure!(is_yes, "nothing was copied");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn error_of(path: &Path, directory: Option<&Path>) -> String {
        make(path, directory, false).unwrap_err().to_string()
    }

    #[test]
    fn changes_of_the_copy_leave_the_file_and_the_directory_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        let mut copy = make(&path, None, false).unwrap();
        let mut read = String::new();
        copy.read_to_string(&mut read).unwrap();
        assert_eq!(read, "before");
        copy.rewind().unwrap();
        copy.write_all(b"after!").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(copy.metadata().unwrap().nlink(), 0);
        assert_eq!(copy.metadata().unwrap().dev(), directory.path().metadata().unwrap().dev());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_directory_can_be_chosen_and_an_unsuitable_one_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        fs::write(&path, "x").unwrap();
        make(&path, Some(Path::new("/dev/shm")), false).unwrap();
        let text = error_of(&path, Some(Path::new("/proc")));
        assert!(text.starts_with("cannot keep a throwaway copy in /proc: "), "{text}");
        assert!(text.ends_with("--throwaway-dir"), "{text}");
        let text = error_of(directory.path(), None);
        assert!(text.contains("it is a directory"), "{text}");
    }

    #[test]
    fn the_copy_is_in_the_directory_of_the_file_and_not_of_a_link() {
        let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = directory.path().join("x.img");
        fs::write(&path, "x").unwrap();
        let link = other.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(directory_of(&link).unwrap(), fs::canonicalize(directory.path()).unwrap());
    }

    #[test]
    fn large_copies_need_a_confirmation() {
        assert_eq!(Confirmation::for_copy(CONFIRM_ABOVE, false), Confirmation::Given);
        assert_eq!(Confirmation::for_copy(CONFIRM_ABOVE + 1, true), Confirmation::Given);
        let needed = Confirmation::for_copy(CONFIRM_ABOVE + 1, false);
        assert_eq!(needed, Confirmation::Needed);
        needed.ask("large", true, &mut "Yes\n".as_bytes()).unwrap();
        needed.ask("large", true, &mut "y".as_bytes()).unwrap();
        for no in ["", "\n", "n\n", "yess\n"] {
            assert_eq!(
                needed.ask("large", true, &mut no.as_bytes()).unwrap_err().to_string(),
                "nothing was copied"
            );
        }
        let refused = needed.ask("large", false, &mut "y\n".as_bytes()).unwrap_err().to_string();
        assert_eq!(refused, "large; add --yes to allow it");
    }

    #[test]
    fn a_copy_that_does_not_fit_is_refused_before_it_is_made() {
        let copy = tempfile::tempfile().unwrap();
        ensure_space(&copy, 0, Path::new("/tmp")).unwrap();
        let text = ensure_space(&copy, u64::MAX, Path::new("/tmp")).unwrap_err().to_string();
        assert!(text.starts_with("the throwaway copy takes 16E, and /tmp has "), "{text}");
    }

    #[test]
    fn a_reference_is_the_file_name_cut_to_63_bytes() {
        assert_eq!(reference(Path::new("/a/b/disk.img")), "disk.img");
        assert_eq!(reference(Path::new("/")), "");
        let long = reference(Path::new(&"ü".repeat(40)));
        assert_eq!(long, "ü".repeat(31));
    }
}
