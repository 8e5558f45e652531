//! Other loop devices with the same bytes.

use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Device, Kernel};
use crate::observe::HUNG_AFTER;

impl<K: Kernel> Engine<K> {
    /// Claims every other device that shows some of these bytes of the device. See
    /// [`Kernel::claim_overlapping`].
    pub(super) async fn claim_others(
        self: &Arc<Self>,
        device: &Device,
        bytes: Range<u64>,
        operation: String,
    ) -> Result<K::Claims, Error> {
        let others = self.other_devices(device.number).await?;
        let claiming = self.kernel.claim_overlapping(device, bytes, others, operation.clone());
        tokio::time::timeout(HUNG_AFTER, claiming).await.unwrap_or_else(|_| {
            let reason = "whether another device with the same bytes is in use cannot be determined in time; try again \
                          later";
            Err(Error::Timeout { operation, reason: reason.to_owned() })
        })
    }

    /// All other loop devices that a file is attached to; `None` if the state of one cannot be read in time.
    ///
    /// # Errors
    /// `Kernel` if they cannot be listed.
    pub(super) async fn other_devices(
        self: &Arc<Self>,
        number: u32,
    ) -> Result<Vec<(u32, Option<Device>)>, Error> {
        let mut reads = JoinSet::new();
        let mut others = self.kernel.bound_numbers()?;
        others.retain(|other| *other != number);
        for other in others {
            let engine = Arc::clone(self);
            reads.spawn(async move {
                let known = engine.device_on(other);
                if known.is_some() {
                    return (other, known);
                }
                // A device whose state cannot be read stays unknown.
                let _result = engine.refresh_in_time(other).await;
                (other, engine.device_on(other))
            });
        }
        Ok(reads.join_all().await)
    }

    /// The device on this number, if its record is current.
    fn device_on(&self, number: u32) -> Option<Device> {
        let bound = self.kernel.peek(number).ok()?.bound;
        let state = self.state();
        let id = state.by_number.get(&number)?;
        let device = state.records.get(id).map(|record| record.device.clone());
        device.filter(|device| Some(device.disk_sequence) == bound)
    }
}
