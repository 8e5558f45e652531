//! What other programs have done since the last event: a list of all devices is of this moment.

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::kernel::{Device, Difference, Kernel};
use crate::limiter::Limiter;

impl<K: Kernel> Engine<K> {
    /// Takes over what other programs have attached, detached, changed and mounted, before udev's events come. Costs a
    /// few reads of sysfs for each device, in a thread, and more only for those that differ. A device whose
    /// backing file hangs stays as it was known.
    pub async fn catch_up(self: &Arc<Self>) {
        let known: Vec<Device> = self.state().records.values().map(|record| record.device.clone()).collect();
        let differences = self.kernel.differences(known).await;
        let (mut tasks, limiter) = (JoinSet::new(), Limiter::new());
        for (number, difference) in differences {
            match difference {
                Difference::Renamed(path) => self.take_path(number, path),
                Difference::Other => {
                    let (engine, limiter) = (Arc::clone(self), Arc::clone(&limiter));
                    let refresh = async move {
                        let _hangs_or_is_unreadable = engine.refresh_in_time(number).await;
                    };
                    tasks.spawn(async move { limiter.run(refresh).await });
                }
            }
        }
        tasks.join_all().await;
        self.refresh_mounts();
    }

    /// The backing file was renamed or deleted.
    fn take_path(self: &Arc<Self>, number: u32, path: Vec<u8>) {
        let bound = self.kernel.peek(number).bound;
        if let Some(id) = self.reconcile(number, bound) {
            self.update_outline(id, |record| record.device.backing_file = path);
        }
    }
}
