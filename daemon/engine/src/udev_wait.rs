//! Waits for udev, also where it does not run, or is not heard.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{DiskSequence, Kernel};
use crate::record::Record;
use crate::warning::Silence;

/// After this time without the awaited event udev's database is looked at, and then after twice the time each.
const SILENT_AFTER: Duration = Duration::from_millis(700);

/// The same for a device of which nothing was heard before.
const SILENT_AGAIN_AFTER: Duration = Duration::from_millis(100);

impl<K: Kernel> Engine<K> {
    /// Waits until udev has probed an attachment and its partitions, if udev runs.
    ///
    /// # Errors
    /// `Timeout`. The attachment may have ended.
    pub(super) async fn await_probe(self: &Arc<Self>, id: DiskSequence) -> Result<(), Error> {
        if !self.kernel.udev_runs() {
            return Ok(());
        }
        let deadline = Instant::now() + self.settings().wait_for_udev;
        let ownership = self.outline(id).and_then(|found| found.ownership);
        let since = ownership.map_or(0, |ownership| ownership.since);
        self.await_udev(id, since, deadline, Record::is_processed).await
    }

    /// Waits until udev has processed enough of an attachment that `done` is true, or until it is clear that nothing
    /// will be heard of it: then the attachment has a warning. `since` is a time before that of the awaited
    /// events, in microseconds of `CLOCK_REALTIME`.
    ///
    /// # Errors
    /// `Timeout` if udev answers, and is not done at the deadline. The attachment may have ended.
    pub(super) async fn await_udev(
        self: &Arc<Self>,
        id: DiskSequence,
        since: u64,
        deadline: Instant,
        done: impl Fn(&Record<K>) -> bool,
    ) -> Result<(), Error> {
        let outcome = |record: Option<&Record<K>>| match record {
            None => Some(Err(Error::DetachedByOthers { id })),
            Some(record) if record.lifecycle.is_cancelled() => Some(Err(Error::AttachAbandoned)),
            Some(record) => done(record).then_some(Ok(())),
        };
        let mut patience = self.patience(id);
        loop {
            let until = deadline.min(Instant::now() + patience);
            if let Some(result) = self.wait_for_record(id, until, outcome).await {
                return result;
            }
            if self.is_done_without_event(id, since, patience, &done).await {
                return Ok(());
            }
            if until == deadline {
                return Err(self.udev_is_late(id));
            }
            patience = 2 * patience.max(SILENT_AFTER);
        }
    }

    /// How long to wait before udev is taken for silent.
    fn patience(&self, id: DiskSequence) -> Duration {
        let was_gone = self.state().hearing.is_gone;
        let is_gone = was_gone && !self.kernel.udev_answers();
        let mut state = self.state();
        state.hearing.is_gone = is_gone;
        if is_gone {
            return Duration::ZERO;
        }
        let is_silent = state.records.get(&id).is_some_and(|record| record.silence.is_some());
        if is_silent { SILENT_AGAIN_AFTER } else { SILENT_AFTER }
    }

    /// Whether udev's database shows that udev is done, or udev does not answer.
    async fn is_done_without_event(
        self: &Arc<Self>,
        id: DiskSequence,
        since: u64,
        patience: Duration,
        done: &impl Fn(&Record<K>) -> bool,
    ) -> bool {
        let silence = if self.take_stored(id, since).await && self.state().records.get(&id).is_some_and(done)
        {
            // An event that is lost or late is no silence.
            let heard =
                self.state().hearing.last.is_some_and(|last| last.elapsed() <= patience.max(SILENT_AFTER));
            if heard {
                return true;
            }
            Silence::NotHeard
        } else if self.kernel.udev_answers() {
            return false;
        } else {
            self.state().hearing.is_gone = true;
            Silence::NotRunning
        };
        warn!(disk_sequence = id.0, "udev is silent: {silence:?}");
        self.update_outline(id, |record| record.silence = Some(silence));
        true
    }

    /// Takes what udev has written into its database since then.
    async fn take_stored(self: &Arc<Self>, id: DiskSequence, since: u64) -> bool {
        let number = self.state().records.get(&id).map(|record| record.device.number);
        let Some((number, (unprocessed_of, unprocessed))) =
            number.and_then(|number| Some((number, self.unprocessed(number)?)))
        else {
            return false;
        };
        if unprocessed_of != id || !self.is_current(id, number).unwrap_or(false) {
            return false;
        }
        let found = self.kernel.stored_since(number, unprocessed, since).await;
        let is_any = !found.is_empty();
        self.take_processed(id, found);
        is_any
    }

    fn udev_is_late(&self, id: DiskSequence) -> Error {
        let state = self.state();
        let record = state.records.get(&id);
        Error::UdevTimeout {
            device: record.map(|record| record.device.node()).unwrap_or_default(),
            seconds: self.settings().wait_for_udev.as_secs_f32(),
            detached: !record.is_some_and(Record::is_published),
        }
    }
}
