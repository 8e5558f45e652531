//! Ends the attachments of a client that has disconnected, all in one pass: there may be a thousand.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::ClientId;
use crate::engine::Engine;
use crate::kernel::{DiskSequence, Kernel, QueuedHold, ReleaseQueue};
use crate::operation::audit;
use crate::record::Record;

/// After this time without a closed hold, one more thread closes the next ones: a backing file may hang.
const STALLED_AFTER: Duration = Duration::from_millis(20);

/// The most threads for one client. Each has a permit of the owner as well.
const MOST_THREADS: usize = 32;

/// How many attachments are locked before other tasks run.
const AT_ONCE: usize = 32;

/// The attachments of one owner that end together, and their locks.
struct Ending<K: Kernel> {
    holds: Vec<QueuedHold<K::Hold>>,
    locks: HashMap<DiskSequence, OwnedMutexGuard<()>>,
}

impl<K: Kernel> Engine<K> {
    /// Ends attachments whose client has disconnected. One with an operation in progress ends after that, unless it has
    /// another lifetime or client then.
    pub(super) fn spawn_end_of_client(self: &Arc<Self>, ids: Vec<DiskSequence>, client: ClientId) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            for (owner, ending) in engine.lock_ending(ids, &client).await {
                let engine = Arc::clone(&engine);
                tokio::spawn(async move { engine.end_together(owner, ending).await });
            }
        });
    }

    /// Locks the devices, and takes their holds.
    async fn lock_ending(
        self: &Arc<Self>,
        ids: Vec<DiskSequence>,
        client: &ClientId,
    ) -> BTreeMap<Option<u32>, Ending<K>> {
        let mut all: BTreeMap<Option<u32>, Ending<K>> = BTreeMap::new();
        for (index, id) in ids.into_iter().enumerate() {
            if index % AT_ONCE == AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
            let Some(attachment) = self.outline(id) else { continue };
            let Some((alone, queued)) = self.take_ending(id, client) else {
                self.spawn_end_of_lifetime(id, Some(client.clone()));
                continue;
            };
            audit("detached, since its client has disconnected", &attachment);
            let new = || Ending { holds: Vec::new(), locks: HashMap::new() };
            let of_owner = all.entry(attachment.owner()).or_insert_with(new);
            of_owner.holds.push(queued);
            of_owner.locks.insert(id, alone);
        }
        all
    }

    /// The lock and the hold of an attachment that ends with this client; `None` if an operation is in progress, it is
    /// unlocked, or there is no hold.
    fn take_ending(
        &self,
        id: DiskSequence,
        client: &ClientId,
    ) -> Option<(OwnedMutexGuard<()>, QueuedHold<K::Hold>)> {
        let mut state = self.state();
        let can_end =
            |record: &&mut Record<K>| record.ends_with(Some(client)) && record.cleartexts.is_empty();
        let record = state.records.get_mut(&id).filter(can_end)?;
        let alone = Arc::clone(&record.operation).try_lock_owned().ok()?;
        let hold = record.hold.take()?;
        let (number, disk_sequence) = (record.device.number, record.device.disk_sequence);
        Some((alone, QueuedHold { id, number, disk_sequence, hold }))
    }

    /// Closes the holds in one thread, and in one more whenever a backing file does not answer for some time.
    async fn end_together(self: &Arc<Self>, owner: Option<u32>, ending: Ending<K>) {
        let Ending { holds, mut locks } = ending;
        let queue = Arc::new(ReleaseQueue::new(holds));
        let mut threads = JoinSet::new();
        self.spawn_release(&mut threads, owner, &queue);
        let mut hung_at = Some(Instant::now() + self.settings().wait_for_users);
        while !threads.is_empty() {
            let may_add = !queue.is_empty() && threads.len() < MOST_THREADS;
            let stalled_at = may_add.then(|| Instant::now() + STALLED_AFTER);
            let is_stalled = tokio::select! {
                biased;
                _ended = threads.join_next() => false,
                () = queue.reported() => false,
                () = reach(stalled_at) => true,
                () = reach(hung_at) => {
                    hung_at = None;
                    locks.keys().for_each(|id| self.await_last_close(*id));
                    false
                }
            };
            let closed = queue.take_closed();
            if is_stalled && closed.is_empty() {
                self.spawn_release(&mut threads, owner, &queue);
            }
            for (id, detached) in closed {
                if detached {
                    self.remove_record(id)
                } else {
                    self.await_last_close(id)
                }
                drop(locks.remove(&id));
            }
        }
    }

    fn spawn_release(
        self: &Arc<Self>,
        threads: &mut JoinSet<()>,
        owner: Option<u32>,
        queue: &Arc<ReleaseQueue<K::Hold>>,
    ) {
        let (engine, queue) = (Arc::clone(self), Arc::clone(queue));
        threads.spawn(async move {
            let _permit = engine.background.acquire(owner).await;
            engine.kernel.release_queued(queue).await;
        });
    }
}

/// Waits until this time; without one indefinitely.
async fn reach(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
