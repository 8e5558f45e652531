//! Looks at devices that events ask for: one after a burst of events, not one for each.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Engine;
use crate::kernel::Kernel;

/// The time between the end of a look and the next one of the same kind at the same number.
const APART: Duration = Duration::from_millis(50);
/// How long to leave udev to its work before looking whether it has ended.
const UDEV_AT_WORK: Duration = Duration::from_millis(50);

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Look {
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
pub(super) struct Looks {
    in_progress: Mutex<HashMap<(u32, Look), bool>>,
}

impl Looks {
    fn in_progress(&self) -> MutexGuard<'_, HashMap<(u32, Look), bool>> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if nobody is looking, so that the caller has to; else whoever is looking does it again.
    fn begin(&self, number: u32, look: Look) -> bool {
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
    fn end(&self, number: u32, look: Look) -> bool {
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

impl<K: Kernel> Engine<K> {
    /// Has a number looked at, once for all that ask for it in the meantime.
    pub(super) fn ask_for_look(self: &Arc<Self>, number: u32, look: Look) {
        if !self.looks_asked_for.begin(number, look) {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                engine.look(number, look).await;
                tokio::time::sleep(APART).await;
                if engine.looks_asked_for.end(number, look) {
                    return;
                }
            }
        });
    }

    pub(super) async fn look(self: &Arc<Self>, number: u32, look: Look) {
        if look == Look::Database {
            self.await_idle_udev().await;
        }
        let _leave = self.background.take(self.owner_of(number)).await;
        match look {
            Look::Device => self.refresh(number).await,
            Look::Partitions => self.recover_partitions(number).await,
            Look::Database => {
                self.recover_partitions(number).await;
                self.recover_processed(number).await;
            }
            Look::Everything => {
                self.refresh(number).await;
                self.recover_partitions(number).await;
                self.recover_processed(number).await;
            }
        }
    }

    /// The uid whose attachment the number stands for.
    pub(super) fn owner_of(&self, number: u32) -> Option<u32> {
        let state = self.state();
        let record = state.records.get(state.by_number.get(&number)?)?;
        record.ownership.as_ref().map(|ownership| ownership.uid)
    }

    async fn await_idle_udev(&self) {
        let deadline = Instant::now() + self.settings().wait_for_udev;
        while Instant::now() < deadline {
            tokio::time::sleep(UDEV_AT_WORK).await;
            if self.kernel.udev_is_idle() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_asked_for_in_the_meantime_are_one() {
        let looks = Looks::default();
        assert!(looks.begin(1, Look::Device));
        assert!(looks.begin(2, Look::Device) && looks.begin(1, Look::Partitions), "these are others");
        for _ in 0..100 {
            assert!(!looks.begin(1, Look::Device));
        }
        assert!(!looks.end(1, Look::Device), "it is done once more");
        assert!(looks.end(1, Look::Device), "and then no more");
        assert!(looks.begin(1, Look::Device));
    }
}
