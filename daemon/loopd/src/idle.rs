//! Exit on idle. The next call starts the daemon again, and no call is lost in between.

use std::sync::Arc;
use std::time::Duration;

use futures_lite::StreamExt;
use sd_notify::NotifyState;
use tokio::sync::watch;
use tracing::{debug, info};
use zbus::message::Type;
use zbus::{Connection, MessageStream};

use crate::bus::{self, Callers};
use crate::exit::Exit;
use crate::platform::SharedEngine;
use crate::systemd::notify;

/// Watches whether the daemon is idle.
pub struct Idle {
    connection: Connection,
    engine: SharedEngine,
    callers: Arc<Callers>,
    /// The number of received calls.
    received_calls: watch::Receiver<u64>,
    /// How long the daemon must be idle before it exits; zero disables the exit.
    timeout: watch::Receiver<Duration>,
}

impl Idle {
    /// Counts received calls from now on.
    pub fn new(
        connection: &Connection,
        engine: &SharedEngine,
        callers: &Arc<Callers>,
        timeout: watch::Receiver<Duration>,
    ) -> Self {
        Self {
            connection: connection.clone(),
            engine: Arc::clone(engine),
            callers: Arc::clone(callers),
            received_calls: count_calls(connection),
            timeout,
        }
    }

    /// Waits until the daemon is idle for the timeout, and releases its name.
    ///
    /// # Errors
    /// The connection failed, or another daemon has taken the name.
    pub async fn run(mut self) -> zbus::Result<Exit> {
        loop {
            self.wait_until_idle().await;
            let before = *self.received_calls.borrow();
            // In this order: after `STOPPING=1` a new start waits for the end of this daemon, which still
            // answers the calls that the bus has delivered.
            notify::notify(&[NotifyState::Stopping]);
            bus::release_name(&self.connection).await?;
            self.callers.backlog_cleared().await;
            tokio::task::yield_now().await;
            if *self.received_calls.borrow() == before {
                info!("exit on idle");
                return Ok(Exit::Done);
            }
            if notify::is_available() {
                return Ok(self.answer_late_calls().await);
            }
            debug!("a call arrived during the exit on idle");
            bus::take_name(&self.connection).await?;
        }
    }

    /// Waits until nothing is attached and no call is received for the timeout.
    async fn wait_until_idle(&mut self) {
        loop {
            self.callers.idle().await;
            self.engine.nothing_attached().await;
            self.received_calls.mark_unchanged();
            let timeout = *self.timeout.borrow_and_update();
            let timed_out = async {
                match timeout {
                    Duration::ZERO => std::future::pending().await,
                    timeout => tokio::time::sleep(timeout).await,
                }
            };
            tokio::select! {
                () = timed_out => if self.is_idle().await { return },
                Ok(()) = self.received_calls.changed() => {}
                Ok(()) = self.timeout.changed() => {}
            }
        }
    }

    async fn is_idle(&self) -> bool {
        let idle = async {
            self.callers.idle().await;
            self.engine.nothing_attached().await;
        };
        tokio::time::timeout(Duration::ZERO, idle).await.is_ok()
    }

    /// Answers the calls that were received while the name was released.
    async fn answer_late_calls(&self) -> Exit {
        self.callers.drain().await;
        if self.is_idle().await { Exit::Done } else { Exit::Restart }
    }
}

/// Counts the calls received from others. The task must not block: a message stream that is not polled stops the
/// whole connection.
fn count_calls(connection: &Connection) -> watch::Receiver<u64> {
    let (count, calls) = watch::channel(0);
    let mut messages = MessageStream::from(connection);
    let own = connection.unique_name().cloned();
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            let header = message.header();
            // The watchdog calls the daemon itself.
            let is_own = own.as_ref().is_some_and(|own| header.sender() == Some(&own.as_ref()));
            if message.message_type() == Type::MethodCall && !is_own {
                count.send_modify(|count| *count += 1);
            }
        }
    });
    calls
}
