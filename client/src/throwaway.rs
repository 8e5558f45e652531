//! A writable view of a file whose changes vanish: a copy of it that has no name.
//!
//! The copy shares the file's blocks where the file system can do that (a reflink), and else has the
//! file's data without its holes. No folder has an entry for it, so it is gone with its last user,
//! however that ends.

mod copy;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use nix::errno::Errno;

use crate::cli::ThrowawayArgs;
use crate::command::attach;
use crate::output::{escaped, printable, reason};
use crate::size::human;

/// More bytes than these are copied only where the user says so.
const ASKED_ABOVE: u64 = 1 << 30;
/// Fewer bytes than these are copied before anybody could read a progress bar.
const SHOWN_ABOVE: u64 = 64 << 20;
/// What the kernel keeps of a reference.
const REFERENCE_LENGTH: usize = 63;

/// Makes the copy, beside the file unless the arguments name another folder.
///
/// # Errors
/// The file cannot be read, there is no room for the copy, or the user does not want it. Nothing is
/// left behind then.
pub fn make(path: &Path, args: &ThrowawayArgs) -> anyhow::Result<File> {
    let shown = printable(path.as_os_str().as_bytes());
    let original = attach::open_backing_file(path, true)?;
    anyhow::ensure!(
        original.metadata()?.is_file(),
        "cannot make a throwaway view of {shown}: it is a block device; name a regular file"
    );
    let folder = match &args.throwaway_dir {
        Some(folder) => folder.clone(),
        None => {
            folder_of(path).map_err(|error| anyhow::anyhow!("cannot find {shown}: {}", reason(&error)))?
        }
    };
    let copy = nameless(&folder)?;
    if rustix::fs::ioctl_ficlone(&copy, &original).is_ok() {
        return Ok(copy);
    }
    let failed = |error: io::Error| failure(&shown, &folder, &error);
    let plan = copy::Plan::of(&original).map_err(failed)?;
    let permission = Permission::given(plan.bytes(), args.yes);
    permission.or_ask(&question(plan.bytes(), &shown, &folder), is_answerable(), &mut io::stdin().lock())?;
    ensure_room(&copy, plan.bytes(), &folder)?;
    let bar = progress_bar(plan.bytes());
    let copied = plan.carry_out(&original, &copy, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    copied.map_err(failed)?;
    Ok(copy)
}

/// What losetup shows as REF of a throwaway view: the copy has no name, so it is the file's.
#[must_use]
pub fn reference(path: &Path) -> String {
    let name = path.file_name().unwrap_or(OsStr::new(""));
    let mut name = escaped(name.as_bytes());
    let end = (0..=REFERENCE_LENGTH).rev().find(|end| name.is_char_boundary(*end));
    name.truncate(end.unwrap_or_default());
    name
}

/// The folder that the file really lies in, also where a link in another one leads to it.
///
/// # Errors
/// The file is not there.
pub fn folder_of(path: &Path) -> io::Result<PathBuf> {
    let real = fs::canonicalize(path)?;
    Ok(real.parent().unwrap_or(Path::new("/")).to_owned())
}

fn nameless(folder: &Path) -> anyhow::Result<File> {
    tempfile::tempfile_in(folder).map_err(|error| {
        anyhow::anyhow!(
            "cannot keep a throwaway copy in {}: {}; choose a folder that you may write to with --throwaway-dir",
            printable(folder.as_os_str().as_bytes()),
            reason(&error)
        )
    })
}

fn failure(shown: &str, folder: &Path, error: &io::Error) -> anyhow::Error {
    let remedy = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::EDQUOT) => "; choose another folder with --throwaway-dir",
        _ => "",
    };
    let folder = printable(folder.as_os_str().as_bytes());
    anyhow::anyhow!("cannot copy {shown} to a file without a name in {folder}: {}{remedy}", reason(error))
}

fn ensure_room(copy: &File, bytes: u64, folder: &Path) -> anyhow::Result<()> {
    // Where it cannot be told, the copy itself will tell.
    let Ok(room) = rustix::fs::fstatvfs(copy) else { return Ok(()) };
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    anyhow::ensure!(
        bytes <= free,
        "the throwaway copy takes {}, and {} has {} left; choose another folder with --throwaway-dir",
        human(bytes),
        printable(folder.as_os_str().as_bytes()),
        human(free)
    );
    Ok(())
}

fn question(bytes: u64, shown: &str, folder: &Path) -> String {
    let folder = printable(folder.as_os_str().as_bytes());
    format!("{folder} cannot share the blocks of {shown}, and {} of it would be copied", human(bytes))
}

fn is_answerable() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Whether a copy of so many bytes needs the user's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    Given,
    Wanted,
}

impl Permission {
    fn given(bytes: u64, yes: bool) -> Self {
        if yes || bytes <= ASKED_ABOVE { Self::Given } else { Self::Wanted }
    }

    fn or_ask(self, question: &str, is_answerable: bool, answers: &mut impl BufRead) -> anyhow::Result<()> {
        if self == Self::Given {
            return Ok(());
        }
        anyhow::ensure!(is_answerable, "{question}; say --yes to have that done");
        eprint!("loopctl: {question}. Go on? [y/N] ");
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        let is_yes = ["y", "yes"].contains(&answer.trim().to_lowercase().as_str());
        anyhow::ensure!(is_yes, "nothing was copied");
        Ok(())
    }
}

/// On standard error, and only where that is a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    if bytes <= SHOWN_ABOVE {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("copying {bar:30} {bytes} of {total_bytes}, {eta} left");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn arguments(folder: Option<&Path>) -> ThrowawayArgs {
        ThrowawayArgs { throwaway: true, throwaway_dir: folder.map(Path::to_owned), yes: false }
    }

    fn text(path: &Path, args: &ThrowawayArgs) -> String {
        make(path, args).unwrap_err().to_string()
    }

    #[test]
    fn changes_of_the_copy_are_not_the_file_s_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.img");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        let mut copy = make(&path, &arguments(None)).unwrap();
        let mut read = String::new();
        copy.read_to_string(&mut read).unwrap();
        assert_eq!(read, "before");
        copy.rewind().unwrap();
        copy.write_all(b"after!").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(copy.metadata().unwrap().nlink(), 0);
        assert_eq!(copy.metadata().unwrap().dev(), folder.path().metadata().unwrap().dev());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_folder_can_be_chosen_and_one_that_is_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.img");
        fs::write(&path, "x").unwrap();
        make(&path, &arguments(Some(Path::new("/dev/shm")))).unwrap();
        let said = text(&path, &arguments(Some(Path::new("/proc"))));
        assert!(said.starts_with("cannot keep a throwaway copy in /proc: "), "{said}");
        assert!(said.ends_with("--throwaway-dir"), "{said}");
        let said = text(folder.path(), &arguments(None));
        assert!(said.contains("it is a folder"), "{said}");
    }

    #[test]
    fn the_copy_is_beside_the_file_and_not_beside_a_link() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = folder.path().join("x.img");
        fs::write(&path, "x").unwrap();
        let link = other.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(folder_of(&link).unwrap(), fs::canonicalize(folder.path()).unwrap());
    }

    #[test]
    fn large_copies_need_a_yes() {
        assert_eq!(Permission::given(ASKED_ABOVE, false), Permission::Given);
        assert_eq!(Permission::given(ASKED_ABOVE + 1, true), Permission::Given);
        let wanted = Permission::given(ASKED_ABOVE + 1, false);
        assert_eq!(wanted, Permission::Wanted);
        wanted.or_ask("large", true, &mut "Yes\n".as_bytes()).unwrap();
        wanted.or_ask("large", true, &mut "y".as_bytes()).unwrap();
        for no in ["", "\n", "n\n", "yess\n"] {
            assert_eq!(
                wanted.or_ask("large", true, &mut no.as_bytes()).unwrap_err().to_string(),
                "nothing was copied"
            );
        }
        let refused = wanted.or_ask("large", false, &mut "y\n".as_bytes()).unwrap_err().to_string();
        assert_eq!(refused, "large; say --yes to have that done");
    }

    #[test]
    fn a_copy_that_does_not_fit_is_refused_before_it_is_made() {
        let copy = tempfile::tempfile().unwrap();
        ensure_room(&copy, 0, Path::new("/tmp")).unwrap();
        let said = ensure_room(&copy, u64::MAX, Path::new("/tmp")).unwrap_err().to_string();
        assert!(said.starts_with("the throwaway copy takes 16E, and /tmp has "), "{said}");
    }

    #[test]
    fn a_reference_is_the_file_s_name_as_far_as_it_goes() {
        assert_eq!(reference(Path::new("/a/b/disk.img")), "disk.img");
        assert_eq!(reference(Path::new("/")), "");
        let long = reference(Path::new(&"ü".repeat(40)));
        assert_eq!(long, "ü".repeat(31));
    }
}
