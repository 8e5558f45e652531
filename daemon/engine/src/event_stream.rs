//! The engine's events in their order, each saved before it is published.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::event::Event;
use crate::state_writer::StateWriter;

/// The engine's events in their order. The state file of an attachment is written when its event is taken: outside
/// of the engine's locks, before the event is published, and before a call is answered that waits for it
/// ([`Engine::flush_events`](crate::Engine::flush_events)).
pub struct EventStream {
    events: UnboundedReceiver<Event>,
    state_writer: Arc<StateWriter>,
}

impl EventStream {
    pub(super) fn new(events: UnboundedReceiver<Event>, state_writer: Arc<StateWriter>) -> Self {
        Self { events, state_writer }
    }

    /// The next event; `None` once the engine is dropped.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await?;
        self.state_writer.follow(&event);
        Some(event)
    }
}
