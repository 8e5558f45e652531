//! Scans of devices that events ask for.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::Engine;
use crate::kernel::Kernel;
use crate::scan_queue::ScanKind;

/// The time between the end of a look and the next one of the same kind at the same number.
const APART: Duration = Duration::from_millis(50);

/// How long to leave udev to its work before looking whether it has ended.
const UDEV_AT_WORK: Duration = Duration::from_millis(50);

impl<K: Kernel> Engine<K> {
    /// Has a number looked at, once for all that ask for it in the meantime.
    pub(super) fn request_scan(self: &Arc<Self>, number: u32, look: ScanKind) {
        if !self.scans.begin(number, look) {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                engine.scan(number, look).await;
                tokio::time::sleep(APART).await;
                if engine.scans.end(number, look) {
                    return;
                }
            }
        });
    }

    pub(super) async fn scan(self: &Arc<Self>, number: u32, look: ScanKind) {
        if look == ScanKind::Database {
            self.await_idle_udev().await;
        }
        let _leave = self.background.take(self.owner_of(number)).await;
        match look {
            ScanKind::Device => self.refresh(number).await,
            ScanKind::Partitions => self.recover_partitions(number).await,
            ScanKind::Database => {
                self.recover_partitions(number).await;
                self.recover_processed(number).await;
            }
            ScanKind::Everything => {
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
