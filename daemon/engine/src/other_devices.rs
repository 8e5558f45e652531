//! Other loop devices with the same bytes.

use std::ops::Range;
use std::sync::Arc;

use loopd_common::{Error, ErrorKind};
use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::kernel::{Device, Kernel};
use crate::observe::HUNG_AFTER;

impl<K: Kernel> Engine<K> {
    /// Claims every other device that shows some of these bytes of the device. See
    /// [`Kernel::claim_overlapping`].
    pub(super) async fn claim_others(
        self: &Arc<Self>,
        device: &Device,
        bytes: Range<u64>,
        asked: String,
    ) -> Result<K::Claims, Error> {
        let others = self.other_devices(device.number).await;
        let claiming = self.kernel.claim_overlapping(device, bytes, others, asked.clone());
        tokio::time::timeout(HUNG_AFTER, claiming).await.unwrap_or_else(|_| {
            let why = "whether another device with the same bytes is in use cannot be told in time";
            Err(Error::new(ErrorKind::Timeout, format!("{asked}: {why}; try again later")))
        })
    }

    /// All loop devices with something attached, other than this one; `None` if what that is cannot be told
    /// in time.
    pub(super) async fn other_devices(self: &Arc<Self>, number: u32) -> Vec<(u32, Option<Device>)> {
        let mut looks = JoinSet::new();
        let mut others = self.kernel.bound_numbers();
        others.retain(|other| *other != number);
        for other in others {
            let engine = Arc::clone(self);
            looks.spawn(async move {
                let known = engine.device_on(other);
                if known.is_some() {
                    return (other, known);
                }
                // One that cannot be looked at stays unknown.
                let _result = engine.refresh_in_time(other).await;
                (other, engine.device_on(other))
            });
        }
        looks.join_all().await
    }

    /// What is on this number now, as far as it is known.
    fn device_on(&self, number: u32) -> Option<Device> {
        let bound = self.kernel.peek(number).bound;
        let state = self.state();
        let id = state.by_number.get(&number)?;
        let device = state.records.get(id).map(|record| record.device.clone());
        device.filter(|device| Some(device.disk_sequence) == bound)
    }
}
