//! What has become of a backing file: its identity decides, since the kernel's path alone is ambiguous.

use loopd_dbus::AttachmentProperties;
use loopd_dbus::properties::{from_bus_path, to_bus_path};

use crate::bus::attachment::{AttachmentInfo, FileState};
use crate::inspector::{Found, Identity, inspect};
use crate::sysfs;

/// What the kernel appends to the path of an unlinked file. The name of a file may end like this, too.
pub const DELETED: &[u8] = b" (deleted)";

/// The path of a backing file as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedPath {
    /// The path, with the kernel's suffix if the file was unlinked.
    pub text: Vec<u8>,
    /// Whether it was read from the kernel now; loopd may have read it earlier.
    is_current: bool,
}

impl RecordedPath {
    /// The kernel's path, or the one that loopd has published if the device has changed or sysfs cannot be read.
    #[must_use]
    pub fn of(attachment: &AttachmentProperties) -> Self {
        let number = attachment.number;
        // The sequence is read last: it is still the same if the path is that of this attachment.
        match (sysfs::backing_file(number), sysfs::disk_sequence(number)) {
            (Some(text), Some(sequence)) if sequence == attachment.disk_sequence => {
                Self { text, is_current: true }
            }
            _ => Self { text: from_bus_path(&attachment.backing_file).to_vec(), is_current: false },
        }
    }

    /// The path without the suffix, if it has one.
    #[must_use]
    pub fn without_suffix(&self) -> Option<&[u8]> {
        self.text.strip_suffix(DELETED)
    }
}

/// Determines the state of each backing file, and replaces its path by the current one without the kernel's suffix.
/// Takes at most 2 seconds.
pub async fn add_file_states(attachments: &mut [AttachmentInfo]) {
    let recorded: Vec<RecordedPath> =
        attachments.iter().map(|info| RecordedPath::of(&info.attachment)).collect();
    let whole = recorded.iter().map(|path| path.text.as_slice());
    let shorter = recorded.iter().filter_map(RecordedPath::without_suffix);
    let found = inspect(&whole.chain(shorter).collect::<Vec<_>>()).await;
    let (whole, shorter) = found.split_at(recorded.len());
    let mut shorter = shorter.iter();
    for ((info, path), whole) in attachments.iter_mut().zip(&recorded).zip(whole) {
        let shorter = path.without_suffix().and_then(|_| shorter.next()).unwrap_or(whole);
        let (name, state) = resolve(&info.attachment, path, [*whole, *shorter]);
        info.attachment.backing_file = to_bus_path(name);
        info.file_state = state;
    }
}

/// The name of the file and its state, from what has its recorded path and that path without the suffix.
fn resolve<'a>(
    attachment: &AttachmentProperties,
    path: &'a RecordedPath,
    [whole, shorter]: [Found; 2],
) -> (&'a [u8], Option<FileState>) {
    let Some(identity) = identity(attachment).filter(|_| path.text.starts_with(b"/")) else {
        return (&path.text, None);
    };
    let replaced_unless = |file: Identity| {
        if file == identity { FileState::Present } else { FileState::Replaced }
    };
    match (path.without_suffix(), whole, shorter) {
        (_, Found::File(file), _) if file == identity => (&path.text, Some(FileState::Present)),
        (_, Found::Unknown, _) => (&path.text, None),
        (None, Found::File(_), _) => (&path.text, Some(FileState::Replaced)),
        (None, Found::Nothing, _) => {
            (&path.text, is_unlinked(attachment, path).then_some(FileState::Deleted))
        }
        (Some(name), _, Found::File(file)) => (name, Some(replaced_unless(file))),
        (Some(name), _, Found::Nothing) => (name, Some(FileState::Deleted)),
        (Some(name), _, Found::Unknown) => (name, None),
    }
}

/// Whether a file that is not at its path was unlinked. One without the kernel's suffix may be on a file system that is
/// mounted for other processes only.
fn is_unlinked(attachment: &AttachmentProperties, path: &RecordedPath) -> bool {
    // Looking at the path is what tells a network file system that the file is gone.
    !path.is_current || RecordedPath::of(attachment).without_suffix() == Some(&path.text)
}

/// `None` if loopd does not know it.
fn identity(attachment: &AttachmentProperties) -> Option<Identity> {
    let identity = Identity { device: attachment.backing_device, inode: attachment.backing_inode };
    (identity.inode != 0).then_some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example;

    const OURS: Found = Found::File(Identity { device: 1, inode: 2 });
    const OTHER: Found = Found::File(Identity { device: 1, inode: 3 });

    fn attachment() -> AttachmentProperties {
        let number = u32::MAX; // not a device of this machine
        let attachment = example::attachment().attachment;
        AttachmentProperties { number, backing_device: 1, backing_inode: 2, ..attachment }
    }

    fn resolved(text: &str, found: [Found; 2]) -> (String, Option<FileState>) {
        let path = RecordedPath { text: text.into(), is_current: false };
        let attachment = attachment();
        let (name, state) = resolve(&attachment, &path, found);
        (String::from_utf8(name.to_vec()).unwrap(), state)
    }

    #[test]
    fn the_identity_decides() {
        let state = |found| resolved("/a/x", [found, found]);
        assert_eq!(state(OURS), ("/a/x".to_owned(), Some(FileState::Present)));
        assert_eq!(state(OTHER), ("/a/x".to_owned(), Some(FileState::Replaced)));
        assert_eq!(state(Found::Nothing), ("/a/x".to_owned(), Some(FileState::Deleted)));
        assert_eq!(state(Found::Unknown), ("/a/x".to_owned(), None));
    }

    #[test]
    fn a_suffix_is_the_kernels_unless_the_file_is_really_called_so() {
        let state = |found| resolved("/a/x (deleted)", found);
        let (short, long) = ("/a/x".to_owned(), "/a/x (deleted)".to_owned());
        for shorter in [OTHER, Found::Nothing, Found::Unknown] {
            assert_eq!(state([OURS, shorter]), (long.clone(), Some(FileState::Present)), "{shorter:?}");
        }
        for whole in [OTHER, Found::Nothing] {
            assert_eq!(state([whole, Found::Nothing]), (short.clone(), Some(FileState::Deleted)));
            assert_eq!(state([whole, OTHER]), (short.clone(), Some(FileState::Replaced)));
            assert_eq!(state([whole, OURS]), (short.clone(), Some(FileState::Present)));
            assert_eq!(state([whole, Found::Unknown]), (short.clone(), None));
        }
        assert_eq!(state([Found::Unknown, Found::Nothing]), (long, None));
        let (name, _) = resolved("/a/x (deleted) (deleted)", [Found::Nothing; 2]);
        assert_eq!(name, "/a/x (deleted)");
    }

    #[test]
    fn an_unknown_identity_gives_no_state() {
        let path = RecordedPath { text: b"/a/x (deleted)".to_vec(), is_current: true };
        let unknown = AttachmentProperties { backing_inode: 0, ..attachment() };
        assert_eq!(resolve(&unknown, &path, [OTHER; 2]), (path.text.as_slice(), None));
        assert_eq!(resolved("", [Found::Nothing; 2]), (String::new(), None));
        assert_eq!(resolved("x", [OURS; 2]).1, None, "not a path of this process");
    }

    #[test]
    fn a_file_that_the_kernel_knows_is_not_deleted() {
        let path = RecordedPath { text: b"/a/x".to_vec(), is_current: true };
        assert_eq!(resolve(&attachment(), &path, [Found::Nothing; 2]).1, None);
    }

    #[test]
    fn the_published_path_counts_if_the_kernel_has_none() {
        let recorded = RecordedPath::of(&attachment());
        assert_eq!(recorded, RecordedPath { text: b"/home/a/x.img".to_vec(), is_current: false });
    }
}
