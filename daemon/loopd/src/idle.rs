//! Ends the daemon when nobody needs it. The next call starts it again, and none is lost between.

use std::sync::Arc;
use std::time::Duration;

use futures_lite::StreamExt;
use sd_notify::NotifyState;
use tokio::sync::watch;
use tracing::{debug, info};
use zbus::message::Type;
use zbus::{Connection, MessageStream};

use crate::bus;
use crate::caller::Callers;
use crate::service_manager;
use loopd_engine::Engine;
use loopd_kernel::Linux;

/// How the daemon may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// There is nothing left to do.
    Done,
    /// A call came too late to stay and made something to be kept: the next daemon takes it up.
    Restart,
}

/// What tells that the daemon is needed.
pub struct Idle {
    connection: Connection,
    engine: Arc<Engine<Linux>>,
    callers: Arc<Callers>,
    /// How many calls have arrived.
    calls: watch::Receiver<u64>,
    /// How long to wait; zero is for ever.
    patience: watch::Receiver<Duration>,
}

impl Idle {
    /// Counts the calls from now on.
    pub fn new(
        connection: &Connection,
        engine: &Arc<Engine<Linux>>,
        callers: &Arc<Callers>,
        patience: watch::Receiver<Duration>,
    ) -> Self {
        Self {
            connection: connection.clone(),
            engine: Arc::clone(engine),
            callers: Arc::clone(callers),
            calls: count_calls(connection),
            patience,
        }
    }

    /// Resolves when the daemon is to end.
    ///
    /// # Errors
    /// The connection failed, or another daemon has taken the name meanwhile.
    pub async fn run(mut self) -> zbus::Result<Exit> {
        loop {
            self.unneeded().await;
            let before = *self.calls.borrow();
            // In this order, as the service manager wants it: what starts us from now on waits for
            // our end, while what the bus has handed over already is still answered.
            service_manager::notify(&[NotifyState::Stopping]);
            bus::release_name(&self.connection).await?;
            self.callers.backlog_cleared().await;
            tokio::task::yield_now().await;
            if *self.calls.borrow() == before {
                info!("nothing to do");
                return Ok(Exit::Done);
            }
            if service_manager::is_there() {
                return Ok(self.too_late().await);
            }
            debug!("a call came in the last moment");
            bus::take_name(&self.connection).await?;
        }
    }

    /// Resolves when for long enough nothing was attached and no call came.
    async fn unneeded(&mut self) {
        loop {
            self.callers.idle().await;
            self.engine.nothing_attached().await;
            self.calls.mark_unchanged();
            let patience = *self.patience.borrow_and_update();
            let over = async {
                match patience {
                    Duration::ZERO => std::future::pending().await,
                    patience => tokio::time::sleep(patience).await,
                }
            };
            tokio::select! {
                () = over => if self.is_unneeded().await { return },
                Ok(()) = self.calls.changed() => {}
                Ok(()) = self.patience.changed() => {}
            }
        }
    }

    async fn is_unneeded(&self) -> bool {
        let unneeded = async {
            self.callers.idle().await;
            self.engine.nothing_attached().await;
        };
        tokio::time::timeout(Duration::ZERO, unneeded).await.is_ok()
    }

    /// Answers what came in the last moment.
    async fn too_late(&self) -> Exit {
        self.callers.answered().await;
        if self.is_unneeded().await { Exit::Done } else { Exit::Restart }
    }
}

/// A stream that nobody polls hangs the connection: its task does nothing that waits.
fn count_calls(connection: &Connection) -> watch::Receiver<u64> {
    let (count, calls) = watch::channel(0);
    let mut messages = MessageStream::from(connection);
    let own = connection.unique_name().cloned();
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            let header = message.header();
            // The watchdog's own calls do not count.
            let is_own = own.as_ref().is_some_and(|own| header.sender() == Some(&own.as_ref()));
            if message.message_type() == Type::MethodCall && !is_own {
                count.send_modify(|count| *count += 1);
            }
        }
    });
    calls
}
