//! Finds the devices of a file that had a path before: it has been deleted or replaced since.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use loopd_dbus::ListOptions;
use loopd_dbus::properties::{NO_OWNER, from_bus_path};
use loopd_dbus::proxy::Manager;
use nix::unistd::getuid;

use super::file_state::{DELETED, RecordedPath, add_file_states};
use crate::bus::attachment::{AttachmentInfo, list};
use crate::message::{escaped, printable};

/// The devices that an error names.
const MOST_NAMED: usize = 8;

/// Whose attachments may be meant. A user can choose the path of a file that they attach, in a mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// Those of all users; those of other users only if there is no other one.
    All,
    /// The user's own.
    Own,
}

/// The attachment of the earlier file with this path.
///
/// # Errors
/// There are several, or the call failed.
pub async fn find(manager: &Manager, path: &Path, owners: Owners) -> anyhow::Result<Option<AttachmentInfo>> {
    let wanted = Wanted::new(path);
    let mut candidates = list(manager, &ListOptions { all: true, ..ListOptions::default() }).await?;
    candidates.retain(|info| wanted.may_be(info));
    add_file_states(&mut candidates).await;
    candidates.retain(|info| wanted.is_name_of(info));
    match <[AttachmentInfo; 1]>::try_from(select(candidates, owners, getuid().as_raw())) {
        Ok([info]) => Ok(Some(info)),
        Err(found) if found.is_empty() => Ok(None),
        Err(found) => Err(several(path, &found)),
    }
}

/// The paths that an argument stands for.
struct Wanted(Vec<PathBuf>);

impl Wanted {
    /// With and without following a link.
    fn new(path: &Path) -> Self {
        let mut paths = vec![absolute(path)];
        paths.extend(fs::canonicalize(path).ok().filter(|real| *real != paths[0]));
        Self(paths)
    }

    fn is(&self, text: &[u8]) -> bool {
        self.0.iter().any(|path| path.as_os_str().as_bytes() == text)
    }

    /// Whether the recorded path can be meant. Only such files are looked at.
    fn may_be(&self, info: &AttachmentInfo) -> bool {
        let recorded = RecordedPath::of(&info.attachment);
        self.is(&recorded.text) || recorded.without_suffix().is_some_and(|text| self.is(text))
    }

    /// A path that ends with the suffix names no file if it is unknown whether the suffix is the kernel's.
    fn is_name_of(&self, info: &AttachmentInfo) -> bool {
        let name = from_bus_path(&info.attachment.backing_file);
        let is_ambiguous = info.file_state.is_none() && name.ends_with(DELETED);
        self.is(name) && !is_ambiguous
    }
}

/// The own attachments. If all may be meant: also foreign devices; and if there are neither, all of them.
fn select(mut found: Vec<AttachmentInfo>, owners: Owners, uid: u32) -> Vec<AttachmentInfo> {
    let is_own = |info: &AttachmentInfo| match owners {
        Owners::All => [uid, NO_OWNER].contains(&info.attachment.owner),
        Owners::Own => info.attachment.owner == uid,
    };
    if owners == Owners::Own || found.iter().any(is_own) {
        found.retain(is_own);
    }
    found
}

fn several(path: &Path, found: &[AttachmentInfo]) -> anyhow::Error {
    let shown = printable(path.as_os_str().as_bytes());
    let nodes = found.iter().map(|info| escaped(info.attachment.device.as_bytes())).take(MOST_NAMED);
    let rest = found.len().saturating_sub(MOST_NAMED);
    let rest = iter::once(format!("{rest} more")).filter(|_| rest > 0);
    let nodes: Vec<String> = nodes.chain(rest).collect();
    anyhow::anyhow!(
        "several devices are attached from earlier files of the path {shown}: {}; name the device node of one",
        nodes.join(", ")
    )
}

/// The path as the kernel would show it, of a file that may be deleted.
fn absolute(path: &Path) -> PathBuf {
    let directory = match path.parent() {
        Some(directory) if directory.as_os_str().is_empty() => Path::new("."),
        Some(directory) => directory,
        None => Path::new("/"),
    };
    match (fs::canonicalize(directory), path.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::properties::to_bus_path;

    use super::*;
    use crate::bus::attachment::FileState;
    use crate::bus::example;

    fn candidate(number: u32, name: &str, state: Option<FileState>) -> AttachmentInfo {
        let mut info = example::attachment();
        info.attachment.device = format!("/dev/loop{number}");
        info.attachment.number = number;
        info.attachment.backing_file = to_bus_path(name.as_bytes());
        info.file_state = state;
        info
    }

    #[test]
    fn a_name_and_the_same_with_the_suffix_are_two_files() {
        use FileState::{Deleted, Present, Replaced};
        let all = [
            candidate(1, "/a/x", Some(Deleted)),
            candidate(2, "/a/x", Some(Replaced)),
            candidate(3, "/a/x (deleted)", Some(Present)),
            candidate(4, "/a/x (deleted)", None),
            candidate(5, "/a/x", None),
        ];
        let chosen = |wanted: &str| -> Vec<u32> {
            let wanted = Wanted(vec![wanted.into()]);
            all.iter().filter(|info| wanted.is_name_of(info)).map(|info| info.attachment.number).collect()
        };
        assert_eq!(chosen("/a/x"), [1, 2, 5]);
        assert_eq!(chosen("/a/x (deleted)"), [3]);
        assert_eq!(chosen("/a/y"), [0; 0]);
    }

    #[test]
    fn own_and_foreign_devices_are_preferred() {
        let of = |owner| {
            let mut info = candidate(owner, "/a/x", None);
            info.attachment.owner = owner;
            info
        };
        let selected = |owners, all: &[u32]| {
            let found = select(all.iter().map(|owner| of(*owner)).collect(), owners, 1000);
            found.iter().map(|info| info.attachment.owner).collect::<Vec<_>>()
        };
        let all = [1001, 1000, NO_OWNER];
        assert_eq!(selected(Owners::All, &all), [1000, NO_OWNER]);
        assert_eq!(selected(Owners::All, &[1001, 1002]), [1001, 1002]);
        assert_eq!(selected(Owners::Own, &all), [1000]);
        assert_eq!(selected(Owners::Own, &[1001]), [0; 0]);
    }

    #[test]
    fn several_devices_are_named() {
        let devices = |count| (0..count).map(|number| candidate(number, "/a/x", None)).collect::<Vec<_>>();
        let text = several(Path::new("x\n"), &devices(2)).to_string();
        let expected = "several devices are attached from earlier files of the path x\\n: /dev/loop0, \
                        /dev/loop1; name the device node of one";
        assert_eq!(text, expected);
        assert!(several(Path::new("x"), &devices(10)).to_string().contains("/dev/loop7, 2 more;"));
    }

    #[test]
    fn paths_become_absolute_through_links() {
        let directory = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(directory.path()).unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(absolute(&real.join("link/gone.img")), real.join("gone.img"));
        assert_eq!(absolute(Path::new("gone.img")), std::env::current_dir().unwrap().join("gone.img"));
        assert_eq!(absolute(Path::new("/nonexistent/a/b")), Path::new("/nonexistent/a/b"));
        fs::write(real.join("file"), b"").unwrap();
        std::os::unix::fs::symlink("file", real.join("to file")).unwrap();
        assert_eq!(Wanted::new(&real.join("to file")).0, [real.join("to file"), real.join("file")]);
        assert_eq!(Wanted::new(&real.join("file")).0, [real.join("file")]);
    }
}
