//! Requested scans of devices: a burst of events causes one scan, not one for each event.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ScanKind {
    /// The device.
    Device,
    /// Its partitions.
    Partitions,
    /// udev's database, once udev is idle.
    Database,
    /// Everything, after events were lost.
    Everything,
}

/// The scans in progress, each with whether it was requested again since it began.
#[derive(Debug, Default)]
pub(super) struct ScanQueue {
    in_progress: Mutex<HashMap<(u32, ScanKind), bool>>,
}

impl ScanQueue {
    fn in_progress(&self) -> MutexGuard<'_, HashMap<(u32, ScanKind), bool>> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if no scan is in progress, so that the caller has to begin one. Otherwise the one in progress is repeated.
    pub(super) fn begin(&self, number: u32, kind: ScanKind) -> bool {
        match self.in_progress().entry((number, kind)) {
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

    /// Ends a scan; false if it has to be repeated.
    pub(super) fn end(&self, number: u32, kind: ScanKind) -> bool {
        let mut in_progress = self.in_progress();
        match in_progress.get_mut(&(number, kind)) {
            Some(again @ true) => {
                *again = false;
                false
            }
            _ => {
                in_progress.remove(&(number, kind));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_during_a_scan_are_one_scan() {
        let scans = ScanQueue::default();
        assert!(scans.begin(1, ScanKind::Device));
        assert!(scans.begin(2, ScanKind::Device) && scans.begin(1, ScanKind::Partitions), "these are others");
        for _ in 0..100 {
            assert!(!scans.begin(1, ScanKind::Device));
        }
        assert!(!scans.end(1, ScanKind::Device), "it is repeated once");
        assert!(scans.end(1, ScanKind::Device), "and not again");
        assert!(scans.begin(1, ScanKind::Device));
    }
}
