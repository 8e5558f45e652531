//! Stops the daemon on SIGTERM and SIGINT.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::warn;
use zbus::Connection;

use crate::bus::{self, Callers};
use crate::platform::Engine;
use crate::systemd::notify;

/// How long calls in progress may take after the first signal.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long cancelled calls may take to undo their effects.
const UNDO_TIMEOUT: Duration = Duration::from_millis(500);

/// The signals that stop the daemon.
pub struct Termination {
    terminate: Signal,
    interrupt: Signal,
}

impl Termination {
    /// Handles the signals from now on.
    ///
    /// # Errors
    /// A handler cannot be installed.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn receive(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }

    /// Waits for a signal, then until all received calls have been answered. A second signal or a timeout
    /// cancels them. Later calls start the next daemon, if the bus can activate it.
    pub async fn drain(mut self, connection: &Connection, engine: &Engine, callers: &Arc<Callers>) {
        self.receive().await;
        notify::notify(&[NotifyState::Stopping]);
        let answered = async {
            if let Err(error) = bus::release_name(connection).await {
                warn!("cannot release the bus name: {error}");
            }
            callers.drain().await;
        };
        tokio::select! {
            () = self.receive() => warn!("second signal: cancelling the calls in progress"),
            answered = tokio::time::timeout(DRAIN_TIMEOUT, answered) => match answered {
                Ok(()) => return,
                Err(_) => warn!("calls in progress did not end in time: cancelling them"),
            }
        }
        engine.abort_calls();
        // Calls that hang in the kernel are left to the next daemon.
        let _hangs = tokio::time::timeout(UNDO_TIMEOUT, callers.drain()).await;
    }
}
