//! Scans of devices after events.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::Engine;
use crate::kernel::Kernel;
use crate::scan_queue::ScanKind;

/// The time between a scan and the next one of the same kind of the same number.
const APART: Duration = Duration::from_millis(50);

/// How long to wait before checking again whether udev is idle.
const UDEV_BUSY: Duration = Duration::from_millis(50);

impl<K: Kernel> Engine<K> {
    /// Requests a scan of a number. Requests that arrive before it begins are one scan.
    pub(super) fn request_scan(self: &Arc<Self>, number: u32, kind: ScanKind) {
        if !self.scans.begin(number, kind) {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                engine.scan(number, kind).await;
                tokio::time::sleep(APART).await;
                if engine.scans.end(number, kind) {
                    return;
                }
            }
        });
    }

    pub(super) async fn scan(self: &Arc<Self>, number: u32, kind: ScanKind) {
        if kind == ScanKind::Database {
            self.await_idle_udev().await;
        }
        let _permit = self.background.acquire(self.owner_of(number)).await;
        match kind {
            ScanKind::Device => self.refresh(number).await,
            ScanKind::Partitions => self.recover_partitions(number).await,
            ScanKind::Database => {
                self.recover_partitions(number).await;
                self.recover_processed(number).await;
                self.refresh_cleartexts(number);
            }
            ScanKind::Everything => {
                self.refresh(number).await;
                self.recover_partitions(number).await;
                self.recover_processed(number).await;
                self.refresh_cleartexts(number);
            }
        }
    }

    /// The owner of the attachment on the number.
    pub(super) fn owner_of(&self, number: u32) -> Option<u32> {
        let state = self.state();
        let record = state.records.get(state.by_number.get(&number)?)?;
        record.ownership.as_ref().map(|ownership| ownership.uid)
    }

    async fn await_idle_udev(&self) {
        let deadline = Instant::now() + self.settings().wait_for_udev;
        while Instant::now() < deadline {
            tokio::time::sleep(UDEV_BUSY).await;
            if self.kernel.udev_is_idle() {
                return;
            }
        }
    }
}
