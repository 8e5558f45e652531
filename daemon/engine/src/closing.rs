//! When the cleartexts of an attachment are closed: like its device, at the last close or on request.

use std::sync::Arc;

use loopd_common::State;
use tracing::warn;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{DiskSequence, Kernel, Mapping};
use crate::snapshot::Snapshot;
use crate::unlocker::Closing;

/// A cleartext, and when it is closed.
pub(super) struct Closable {
    partition: Option<u32>,
    mapping: Mapping,
    /// Whether it has a hold.
    is_held: bool,
    /// Whether it was locked lazily.
    closing: bool,
}

impl Closable {
    const fn closing(&self) -> Closing {
        if self.is_held || self.closing { Closing::AtLastClose } else { Closing::OnRequest }
    }
}

impl<K: Kernel> Engine<K> {
    /// The cleartexts that end with the attachment: not those that were locked lazily, unless a lazy detach is taken
    /// back.
    fn closable(&self, attachment: &Snapshot) -> Vec<Closable> {
        let state = self.state();
        let Some(record) = state.records.get(&attachment.id) else { return Vec::new() };
        let all = record.cleartexts.iter().map(|(partition, cleartext)| Closable {
            partition: *partition,
            mapping: cleartext.mapping.clone(),
            is_held: cleartext.hold.is_some(),
            closing: cleartext.closing,
        });
        all.filter(|found| !found.closing || attachment.state == State::Detaching).collect()
    }

    /// Sets when the cleartexts are closed. Returns how it was, for [`Engine::restore_closing`] or
    /// [`Engine::commit_closing`].
    ///
    /// # Errors
    /// `Kernel`, `Timeout`. Nothing has changed.
    pub(super) async fn set_closing(
        self: &Arc<Self>,
        attachment: &Snapshot,
        closing: Closing,
    ) -> Result<Vec<Closable>, Error> {
        let before = self.closable(attachment);
        for (index, cleartext) in before.iter().enumerate() {
            if let Err(error) = self.set_closing_of(attachment.id, cleartext, closing).await {
                self.restore_closing(attachment.id, &before[..=index]).await;
                return Err(error);
            }
        }
        Ok(before)
    }

    async fn set_closing_of(
        self: &Arc<Self>,
        id: DiskSequence,
        cleartext: &Closable,
        closing: Closing,
    ) -> Result<(), Error> {
        if closing == Closing::AtLastClose
            && !cleartext.is_held
            && !self.hold_cleartext(id, cleartext.partition, &cleartext.mapping).await?
        {
            return Ok(());
        }
        if cleartext.closing() == closing {
            return Ok(());
        }
        self.tell_unlocker(&cleartext.mapping, closing).await
    }

    async fn tell_unlocker(&self, mapping: &Mapping, closing: Closing) -> Result<(), Error> {
        let timeout = self.settings().wait_for_mount;
        self.unlocker.set_closing(mapping.name.clone(), closing, timeout).await
    }

    /// Restores when cleartexts are closed.
    pub(super) async fn restore_closing(self: &Arc<Self>, id: DiskSequence, before: &[Closable]) {
        for cleartext in before {
            if let Err(error) = self.tell_unlocker(&cleartext.mapping, cleartext.closing()).await {
                warn!(cleartext = cleartext.mapping.node(), "{error}");
            }
            let is_new = !cleartext.is_held;
            if let Some(hold) = is_new.then(|| self.take_cleartext_hold(id, cleartext.partition)).flatten() {
                self.kernel.release(hold).await;
            }
        }
        self.reap_cleartexts(id);
    }

    /// Ends a change of when cleartexts are closed: those that are closed on request need no hold.
    pub(super) async fn commit_closing(
        self: &Arc<Self>,
        id: DiskSequence,
        before: Vec<Closable>,
        closing: Closing,
    ) {
        for cleartext in before {
            self.update(id, |record| {
                let known = record.cleartexts.get_mut(&cleartext.partition);
                known.into_iter().for_each(|known| known.closing = false);
            });
            let hold = match closing {
                Closing::OnRequest => self.take_cleartext_hold(id, cleartext.partition),
                Closing::AtLastClose => None,
            };
            if let Some(hold) = hold {
                self.kernel.release(hold).await;
            }
        }
        self.reap_cleartexts(id);
    }

    /// Makes the cleartexts that are closed on request close with their last user.
    ///
    /// # Errors
    /// `Kernel`, `Timeout`.
    pub(super) async fn defer_cleartexts(self: &Arc<Self>, attachment: &Snapshot) -> Result<(), Error> {
        for cleartext in self.closable(attachment) {
            if cleartext.closing() == Closing::OnRequest {
                self.tell_unlocker(&cleartext.mapping, Closing::AtLastClose).await?;
                self.begin_closing(attachment.id, cleartext.partition);
            }
        }
        self.reap_cleartexts(attachment.id);
        Ok(())
    }

    /// Makes the cleartexts that are held close with their last user.
    pub(super) async fn release_cleartexts(self: &Arc<Self>, id: DiskSequence) {
        let partitions: Vec<Option<u32>> = {
            let state = self.state();
            let record = state.records.get(&id);
            record.map(|record| record.cleartexts.keys().copied().collect()).unwrap_or_default()
        };
        for partition in partitions {
            if let Some(hold) = self.begin_closing(id, partition) {
                self.kernel.release(hold).await;
            }
        }
        self.reap_cleartexts(id);
    }

    /// Makes the kernel close a cleartext when its record says: the last daemon may have died before that.
    pub(super) fn spawn_closing(self: &Arc<Self>, id: DiskSequence, partition: Option<u32>) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let Ok(_alone) = engine.lock_device(id).await else { return };
            let recorded = {
                let state = engine.state();
                let record = state.records.get(&id);
                let cleartext = record.and_then(|record| record.cleartexts.get(&partition));
                cleartext.map(|cleartext| {
                    let is_held = cleartext.hold.is_some();
                    (cleartext.mapping.clone(), is_held || cleartext.closing)
                })
            };
            let Some((mapping, ends_itself)) = recorded else { return };
            let closing = if ends_itself { Closing::AtLastClose } else { Closing::OnRequest };
            if let Err(error) = engine.tell_unlocker(&mapping, closing).await {
                warn!(cleartext = mapping.node(), "{error}");
            }
            engine.reap_cleartexts(id);
        });
    }

    /// Closes a mapping that the last daemon made and never returned.
    pub(super) fn spawn_close_unfinished(self: &Arc<Self>, mapping: Mapping) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = engine.tell_unlocker(&mapping, Closing::AtLastClose).await {
                warn!(cleartext = mapping.node(), "{error}");
            }
        });
    }
}
