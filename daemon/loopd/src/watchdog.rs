//! Notifies the service manager's watchdog as long as the daemon answers a call of its own.

use std::time::Duration;

use loopd_dbus::names::{MANAGER, ROOT_PATH};
use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tracing::warn;
use zbus::Connection;

use crate::platform::{Engine, SharedEngine};
use crate::systemd::notify;

/// Runs until the daemon stops; returns at once if the service manager has set no watchdog.
pub async fn run(connection: Connection, engine: SharedEngine) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut interval = tokio::time::interval((period / 2).max(Duration::from_millis(1)));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        // If this hangs or fails, the service manager kills the daemon.
        match call_self(&connection, &engine).await {
            Ok(()) => notify::notify(&[NotifyState::Watchdog]),
            Err(error) => warn!("the daemon does not answer its own call: {error}"),
        }
    }
}

/// Takes the path of a call: the bus, the object server, the engine and the publisher.
async fn call_self(connection: &Connection, engine: &Engine) -> zbus::Result<()> {
    let own = connection.unique_name().cloned();
    let version = (MANAGER, "Version");
    let properties = Some("org.freedesktop.DBus.Properties");
    connection.call_method(own, ROOT_PATH, properties, "Get", &version).await?;
    engine.flush_events().await;
    Ok(())
}
