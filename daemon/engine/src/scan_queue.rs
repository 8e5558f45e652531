//! Requested scans of devices: a burst of events causes one scan, not one for each event.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ScanKind {
    /// The device.
    Device,
    /// Its partitions.
    Partitions,
    /// What udev has stored, once it is idle.
    Database,
    /// All of it, after events were lost.
    Everything,
}

/// The looks in progress, each with whether it was asked for again since it began.
#[derive(Debug, Default)]
pub(super) struct ScanQueue {
    in_progress: Mutex<HashMap<(u32, ScanKind), bool>>,
}

impl ScanQueue {
    fn in_progress(&self) -> MutexGuard<'_, HashMap<(u32, ScanKind), bool>> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if nobody is looking, so that the caller has to; else whoever is looking does it again.
    pub(super) fn begin(&self, number: u32, look: ScanKind) -> bool {
        match self.in_progress().entry((number, look)) {
            Entry::Occupied(mut again) => {
                again.insert(true);
                false
            }
            Entry::Vacant(free) => {
                free.insert(false);
                true
            }
        }
    }

    /// Ends a look; false if it has to be done again.
    pub(super) fn end(&self, number: u32, look: ScanKind) -> bool {
        let mut in_progress = self.in_progress();
        match in_progress.get_mut(&(number, look)) {
            Some(again @ true) => {
                *again = false;
                false
            }
            _ => {
                in_progress.remove(&(number, look));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_asked_for_in_the_meantime_are_one() {
        let looks = ScanQueue::default();
        assert!(looks.begin(1, ScanKind::Device));
        assert!(looks.begin(2, ScanKind::Device) && looks.begin(1, ScanKind::Partitions), "these are others");
        for _ in 0..100 {
            assert!(!looks.begin(1, ScanKind::Device));
        }
        assert!(!looks.end(1, ScanKind::Device), "it is done once more");
        assert!(looks.end(1, ScanKind::Device), "and then no more");
        assert!(looks.begin(1, ScanKind::Device));
    }
}
