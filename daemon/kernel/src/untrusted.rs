//! Marks for udev's rules (`63-untrusted-loop.rules`) of the loop devices whose content a user other than root
//! has chosen. udev reads the marks while it processes an event, even if no daemon runs.
//!
//! A mark is an empty file. `loopN` exists from before the attach until the disk sequence is known, and is
//! then renamed to `seq-M`, so that one of the two exists at any time. Marks of ended attachments are harmless,
//! since a disk sequence is never used twice; they are removed from time to time.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use loopd_engine::Error;
use loopd_engine::kernel::DiskSequence;
use tracing::warn;

use crate::sysfs::loop_device;

const SEQUENCE: &str = "seq-";
/// After how many new marks those of ended attachments are removed.
const MANY: usize = 1024;

/// The error for a device that cannot be marked.
pub fn unmarked(source: std::io::Error) -> Error {
    Error::Io {
        operation: "tell udev that the device is a user's (in /run/loopd/untrusted)".to_owned(),
        source,
    }
}

/// The directory of the marks.
pub struct Untrusted {
    directory: PathBuf,
    made: AtomicUsize,
}

/// The mark of a number, removed when this is dropped.
pub struct Expected<'a> {
    untrusted: &'a Untrusted,
    mark: PathBuf,
    is_kept: bool,
}

impl Untrusted {
    /// Opens the directory `untrusted` of the runtime directory. Devices that the last daemon was attaching
    /// when it died are marked.
    ///
    /// # Errors
    /// The directory cannot be created or read.
    pub fn open(runtime_directory: &Path) -> Result<Self> {
        let directory = runtime_directory.join("untrusted");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let untrusted = Self { directory, made: AtomicUsize::new(0) };
        for name in untrusted.names()? {
            let Some(number) = name.strip_prefix("loop").and_then(|number| number.parse().ok()) else {
                continue;
            };
            if let Some(sequence) = loop_device::bound(number)? {
                untrusted.mark(sequence)?;
            }
            fs::remove_file(untrusted.directory.join(name))?;
        }
        untrusted.sweep(loop_device::disk_sequences);
        Ok(untrusted)
    }

    /// Marks the number until the disk sequence of its device is known.
    ///
    /// # Errors
    /// The mark cannot be created.
    pub fn expect(&self, number: u32) -> Result<Expected<'_>> {
        let mark = self.directory.join(format!("loop{number}"));
        make(&mark)?;
        if self.made.fetch_add(1, Ordering::Relaxed) >= MANY {
            self.made.store(0, Ordering::Relaxed);
            self.sweep(loop_device::disk_sequences);
        }
        Ok(Expected { untrusted: self, mark, is_kept: false })
    }

    /// Marks the number if the device is `untrusted`.
    ///
    /// # Errors
    /// The mark cannot be created.
    pub(crate) fn expect_if(
        &self,
        untrusted: bool,
        number: u32,
    ) -> std::result::Result<Option<Expected<'_>>, Error> {
        let expected = untrusted.then(|| self.expect(number)).transpose();
        expected.map_err(unmarked)
    }

    /// Marks a device.
    ///
    /// # Errors
    /// The mark cannot be created.
    pub fn mark(&self, sequence: DiskSequence) -> Result<()> {
        make(&self.of(sequence))
    }

    fn of(&self, sequence: DiskSequence) -> PathBuf {
        self.directory.join(format!("{SEQUENCE}{sequence}"))
    }

    fn names(&self) -> Result<Vec<String>> {
        fs::read_dir(&self.directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    /// Removes the marks of ended attachments. `current` reads the disk sequences of all devices. It is called
    /// only if there is a mark, after the marks are listed: it opens a file for each device. If it fails, all marks
    /// stay. A device that is attached in the meantime has a larger disk sequence than all of these.
    fn sweep(&self, current: impl FnOnce() -> Result<HashSet<DiskSequence>>) {
        let names = self.names().unwrap_or_default();
        let marked: Vec<DiskSequence> = names.iter().filter_map(|name| sequence(name)).collect();
        if marked.is_empty() {
            return;
        }
        let Ok(current) = current() else { return };
        let newest = current.iter().max().copied().unwrap_or_default();
        for sequence in marked {
            if sequence < newest && !current.contains(&sequence) {
                let _gone_already = fs::remove_file(self.of(sequence));
            }
        }
    }
}

impl Expected<'_> {
    /// Replaces the mark of the number by one of the disk sequence.
    ///
    /// # Errors
    /// The mark cannot be renamed.
    pub fn replace_by(&mut self, sequence: DiskSequence) -> Result<()> {
        fs::rename(&self.mark, self.untrusted.of(sequence))?;
        self.is_kept = true;
        Ok(())
    }

    /// Keeps the mark of the number.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = fs::remove_file(&self.mark)
        {
            warn!("{} cannot be removed: {error}", self.mark.display());
        }
    }
}

/// The disk sequence in the name of a mark.
fn sequence(name: &str) -> Option<DiskSequence> {
    name.strip_prefix(SEQUENCE)?.parse().ok().map(DiskSequence)
}

fn make(mark: &Path) -> Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(mark).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_descriptors::without_descriptors;

    fn names(untrusted: &Untrusted) -> Vec<String> {
        let mut names = untrusted.names().unwrap();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_mark_exists_before_the_disk_sequence_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        let mut expected = untrusted.expect(7).unwrap();
        assert_eq!(names(&untrusted), ["loop7"]);
        expected.replace_by(DiskSequence(12)).unwrap();
        drop(expected);
        assert_eq!(names(&untrusted), ["seq-12"]);
        untrusted.expect(8).unwrap().keep();
        assert_eq!(names(&untrusted), ["loop8", "seq-12"]);
    }

    #[test]
    fn an_attach_that_fails_leaves_no_mark() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        drop(untrusted.expect(7).unwrap());
        assert_eq!(names(&untrusted), [""; 0]);
    }

    #[test]
    fn a_mark_that_cannot_be_created_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        fs::remove_dir(directory.path().join("untrusted")).unwrap();
        assert!(untrusted.expect(7).is_err());
        assert!(untrusted.mark(DiskSequence(7)).is_err());
    }

    #[test]
    fn marks_of_ended_attachments_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        for sequence in [1, 2, 3, 9] {
            untrusted.mark(DiskSequence(sequence)).unwrap();
        }
        without_descriptors(|| untrusted.sweep(loop_device::disk_sequences));
        assert_eq!(names(&untrusted).len(), 4, "which devices exist is unknown");
        untrusted.sweep(|| Ok(HashSet::from([DiskSequence(2), DiskSequence(3)])));
        assert_eq!(names(&untrusted), ["seq-2", "seq-3", "seq-9"]);
    }

    #[test]
    fn devices_are_not_read_without_a_mark_to_compare() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        untrusted.expect(7).unwrap().keep();
        fs::write(directory.path().join("untrusted/seq-x"), "").unwrap();
        untrusted.sweep(|| panic!("the devices were read"));
        assert_eq!(names(&untrusted), ["loop7", "seq-x"]);
    }

    #[test]
    fn marks_of_numbers_that_are_not_bound_are_removed_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        drop(Untrusted::open(directory.path()).unwrap());
        // No machine has this number.
        fs::write(directory.path().join("untrusted/loop1048575"), "").unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        assert_eq!(names(&untrusted), [""; 0], "nothing was attached");
    }
}
