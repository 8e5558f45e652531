//! What other programs have done since the last event: a list of all devices is of this moment.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::kernel::{Device, Difference, DiskSequence, Kernel};
use crate::limiter::Limiter;

/// How long a list waits for devices whose backing files hang: they stay as they were known.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

impl<K: Kernel> Engine<K> {
    /// Takes over what other programs have attached, detached, changed and mounted, before udev's events come. Costs a
    /// few reads of sysfs for each device, in a thread, and more only for those that differ. Calls at the same time
    /// share one look, so that a flood of them costs the time of one processor at most.
    pub async fn catch_up(self: &Arc<Self>) {
        let called = Instant::now();
        let mut last_begun = self.last_look.lock().await;
        if last_begun.is_some_and(|begun| begun > called) {
            return;
        }
        *last_begun = Some(Instant::now());
        self.look().await;
    }

    async fn look(self: &Arc<Self>) {
        let known: Vec<Device> = self.state().records.values().map(|record| record.device.clone()).collect();
        let differences = self.kernel.differences(known).await;
        let (mut tasks, limiter) = (JoinSet::new(), Limiter::new());
        for (number, difference) in differences {
            match difference {
                Difference::Renamed(path) => self.take_path(number, path),
                Difference::Other => {
                    let (engine, limiter) = (Arc::clone(self), Arc::clone(&limiter));
                    let refresh = async move {
                        let _is_unreadable = engine.refresh_in_time(number).await;
                    };
                    tasks.spawn(async move { limiter.run(refresh).await });
                }
            }
        }
        let _some_hang = tokio::time::timeout(PATIENCE, tasks.join_all()).await;
        self.refresh_mounts();
        let unlocked: Vec<DiskSequence> = {
            let state = self.state();
            let unlocked = state.records.iter().filter(|(_, record)| !record.cleartexts.is_empty());
            unlocked.map(|(id, _)| *id).collect()
        };
        unlocked.into_iter().for_each(|id| self.reap_cleartexts(id));
    }

    /// The backing file was renamed or deleted.
    fn take_path(self: &Arc<Self>, number: u32, path: Vec<u8>) {
        let Ok(peek) = self.kernel.peek(number) else { return };
        if let Some(id) = self.reconcile(number, peek.bound) {
            self.update_outline(id, |record| record.device.backing_file = path);
        }
    }
}
