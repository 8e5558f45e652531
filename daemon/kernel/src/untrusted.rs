//! Marks for udev's rules (`63-untrusted-loop.rules`): which loop devices show what a user other than
//! root has chosen. udev reads them while it processes an event, also when no daemon runs.
//!
//! A mark is an empty file. `loopN` stands from before the attach until the disk sequence is known; it
//! becomes `seq-M`, and one of both is there at any moment. Marks of sequences that no device has any
//! more do no harm, since a sequence is never used twice; they are removed once in a while.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::warn;

use super::sysfs;
use loopd_engine::kernel::DiskSequence;

const SEQUENCE: &str = "seq-";
/// How many marks are made until those of ended attachments are removed.
const MANY: usize = 1024;

/// The directory of the marks.
pub struct Untrusted {
    directory: PathBuf,
    made: AtomicUsize,
}

/// A device that is about to show what a user has chosen.
pub struct Expected<'a> {
    untrusted: &'a Untrusted,
    mark: PathBuf,
    ended: bool,
}

impl Untrusted {
    /// The directory `untrusted` of the runtime directory. What a daemon was about to attach when it
    /// died is taken for untrusted.
    ///
    /// # Errors
    /// It cannot be made or read.
    pub fn open(runtime_directory: &Path) -> Result<Self> {
        let directory = runtime_directory.join("untrusted");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let untrusted = Self { directory, made: AtomicUsize::new(0) };
        for name in untrusted.names()? {
            let Some(number) = name.strip_prefix("loop").and_then(|number| number.parse().ok()) else {
                continue;
            };
            if sysfs::is_bound(number)
                && let Some(sequence) = sysfs::disk_sequence(number)
            {
                untrusted.mark(sequence)?;
            }
            fs::remove_file(untrusted.directory.join(name))?;
        }
        untrusted.sweep(&sysfs::disk_sequences());
        Ok(untrusted)
    }

    /// Marks the number, for as long as its disk sequence is not known.
    ///
    /// # Errors
    /// The mark cannot be made.
    pub fn expect(&self, number: u32) -> Result<Expected<'_>> {
        let mark = self.directory.join(format!("loop{number}"));
        make(&mark)?;
        if self.made.fetch_add(1, Ordering::Relaxed) >= MANY {
            self.made.store(0, Ordering::Relaxed);
            self.sweep(&sysfs::disk_sequences());
        }
        Ok(Expected { untrusted: self, mark, ended: false })
    }

    /// Marks a device.
    ///
    /// # Errors
    /// The mark cannot be made.
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

    /// Removes the marks of devices that are not among these. One that is made meanwhile is younger
    /// than all of these.
    fn sweep(&self, current: &HashSet<DiskSequence>) {
        let newest = current.iter().max().copied().unwrap_or_default();
        for name in self.names().unwrap_or_default() {
            let sequence =
                name.strip_prefix(SEQUENCE).and_then(|sequence| sequence.parse().ok()).map(DiskSequence);
            if sequence.is_some_and(|sequence| sequence < newest && !current.contains(&sequence)) {
                let _gone_already = fs::remove_file(self.directory.join(name));
            }
        }
    }
}

impl Expected<'_> {
    /// The device has this disk sequence.
    ///
    /// # Errors
    /// The mark cannot be changed.
    pub fn becomes(&mut self, sequence: DiskSequence) -> Result<()> {
        fs::rename(&self.mark, self.untrusted.of(sequence))?;
        self.ended = true;
        Ok(())
    }

    /// Leaves the mark with the number.
    pub fn stay(mut self) {
        self.ended = true;
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = fs::remove_file(&self.mark)
        {
            warn!("{} cannot be removed: {error}", self.mark.display());
        }
    }
}

fn make(mark: &Path) -> Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(mark).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(untrusted: &Untrusted) -> Vec<String> {
        let mut names = untrusted.names().unwrap();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_mark_is_there_from_before_the_attach() {
        let directory = tempfile::tempdir().unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        let mut expected = untrusted.expect(7).unwrap();
        assert_eq!(names(&untrusted), ["loop7"]);
        expected.becomes(DiskSequence(12)).unwrap();
        drop(expected);
        assert_eq!(names(&untrusted), ["seq-12"]);
        untrusted.expect(8).unwrap().stay();
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
    fn a_mark_that_cannot_be_made_is_an_error() {
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
        untrusted.sweep(&HashSet::from([DiskSequence(2), DiskSequence(3)]));
        assert_eq!(names(&untrusted), ["seq-2", "seq-3", "seq-9"]);
    }

    #[test]
    fn what_a_daemon_that_died_was_about_to_attach_is_not_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        drop(Untrusted::open(directory.path()).unwrap());
        // No machine has this number.
        fs::write(directory.path().join("untrusted/loop1048575"), "").unwrap();
        let untrusted = Untrusted::open(directory.path()).unwrap();
        assert_eq!(names(&untrusted), [""; 0], "nothing was attached");
    }
}
