//! Tells the service manager that the daemon still answers, after it has answered itself.

use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::names::{MANAGER, ROOT_PATH};
use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tracing::warn;
use zbus::Connection;

use crate::service_manager;
use loopd_engine::Engine;
use loopd_kernel::Linux;

/// Runs for as long as the daemon does. Without a watchdog it ends, and nothing wakes up.
pub async fn run(connection: Connection, engine: Arc<Engine<Linux>>) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut feeding = tokio::time::interval((period / 2).max(Duration::from_millis(1)));
    feeding.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        feeding.tick().await;
        // Where this never ends, or fails, the service manager ends us.
        match round_trip(&connection, &engine).await {
            Ok(()) => service_manager::notify(&[NotifyState::Watchdog]),
            Err(error) => warn!("the daemon does not answer itself: {error}"),
        }
    }
}

/// The way of a call: over the bus, through the object server, the engine and the publisher.
async fn round_trip(connection: &Connection, engine: &Engine<Linux>) -> zbus::Result<()> {
    let own = connection.unique_name().cloned();
    let version = (MANAGER, "Version");
    let properties = Some("org.freedesktop.DBus.Properties");
    connection.call_method(own, ROOT_PATH, properties, "Get", &version).await?;
    engine.flush_events().await;
    Ok(())
}
