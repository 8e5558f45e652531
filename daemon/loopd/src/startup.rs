//! Starts the daemon, up to the point where it can take its name on the bus.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::names::BUS_NAME;
use loopd_engine::{Engine, Settings};
use tracing::warn;
use zbus::Connection;
use zbus::fdo::DBusProxy;

use crate::bus::{self, Authority, Callers, Clients, Context, Link, Publisher, Quotas};
use crate::exit::Failure;
use crate::lock::Lock;
use crate::platform::{self, Platform, SharedEngine};

/// How long to wait until devices are adopted, and then until all devices have been read.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(3);

/// A daemon that serves its objects and has no name yet.
pub struct Started {
    /// The connection that it serves on.
    pub connection: Connection,
    /// The attachments.
    pub engine: SharedEngine,
    /// The callers.
    pub callers: Arc<Callers>,
    /// The quotas of each uid.
    pub quotas: Quotas,
    _lock: Lock,
}

/// Connects to the bus, adopts the attachments of the previous daemon, and serves the objects.
///
/// # Errors
/// Another daemon is running, or a step failed.
pub async fn start(
    kernel: Platform,
    runtime_directory: &Path,
    settings: &Settings,
) -> Result<Started, Failure> {
    let clients = Clients::default();
    let Link { connection, descriptors, backlog } =
        bus::connect(&clients).await.map_err(|error| format!("cannot connect to the system bus: {error}"))?;
    let bus = bus::proxy(&connection).await.map_err(bus_failed)?;
    let lock = ensure_single_daemon(&bus, runtime_directory).await?;

    let bus_id = bus.get_id().await.map_err(bus_failed)?.to_string();
    let store = platform::store(&kernel, runtime_directory, bus_id)
        .map_err(|error| format!("cannot make the directories of the state files: {error}"))?;
    let mounter = platform::mounter(&kernel, &connection).await.map_err(bus_failed)?;
    let unlocker = platform::unlocker(&kernel, &connection).await.map_err(bus_failed)?;
    let (engine, events) = Engine::new(kernel, settings.clone(), store, mounter, unlocker);
    watch_clients(&connection, &engine, &clients).await.map_err(bus_failed)?;

    let quotas = Quotas::new(settings);
    let callers = Callers::new(bus, clients, quotas.calls.clone(), backlog);
    let authority = Authority::new(&connection, quotas.prompts.clone()).await.map_err(bus_failed)?;
    let context = Context::new(Arc::clone(&engine), authority, Arc::clone(&callers), descriptors);
    tokio::spawn(Publisher::new(connection.clone(), context.clone()).run(events));
    adopt_devices(&engine, &callers).await?;
    bus::serve_root(&connection, &context).await.map_err(bus_failed)?;
    Ok(Started { connection, engine, callers, quotas, _lock: lock })
}

/// Describes a failure of the bus.
pub fn bus_failed(error: impl Display) -> String {
    format!("the system bus failed: {error}")
}

/// Takes the lock, and checks that no other daemon owns the name.
async fn ensure_single_daemon(bus: &DBusProxy<'_>, runtime_directory: &Path) -> Result<Lock, Failure> {
    ensure_name_is_free(bus).await?;
    // A daemon without the name is stopping: wait until it releases the lock.
    let lock = Lock::take(runtime_directory).await.map_err(|error| error.to_string())?;
    ensure_name_is_free(bus).await?;
    Ok(lock)
}

async fn ensure_name_is_free(bus: &DBusProxy<'_>) -> Result<(), String> {
    let name = BUS_NAME.try_into().map_err(bus_failed)?;
    if bus.name_has_owner(name).await.map_err(bus_failed)? {
        return Err(format!("the name {BUS_NAME} has an owner: another loopd is running"));
    }
    Ok(())
}

async fn watch_clients(
    connection: &Connection,
    engine: &SharedEngine,
    clients: &Clients,
) -> zbus::Result<()> {
    let (engine, clients) = (Arc::clone(engine), clients.clone());
    let disconnected = move |client: &_| {
        // In this order: an attach that misses the first is ended by the second.
        clients.disconnected(client);
        engine.client_disconnected(client);
    };
    bus::watch_disconnects(connection, disconnected).await
}

/// Adopts the attachments of the previous daemon, and reads all devices.
///
/// # Errors
/// The mount table cannot be read: mounted devices would look unmounted.
async fn adopt_devices(engine: &SharedEngine, callers: &Arc<Callers>) -> Result<(), String> {
    let mounts = platform::mount_table().map_err(|error| format!("cannot read the mount table: {error}"))?;
    engine.mounts_changed(mounts);
    let (adopting, callers) = (Arc::clone(engine), Arc::clone(callers));
    with_timeout(async move {
        adopting.restore(move |client| callers.clone().is_connected(client)).await;
    })
    .await;
    let reading = Arc::clone(engine);
    with_timeout(async move { reading.resync().await }).await;
    engine.flush_events().await;
    Ok(())
}

/// Waits for a task, up to a timeout. The task continues after it.
async fn with_timeout(task: impl Future<Output = ()> + Send + 'static) {
    if tokio::time::timeout(DEVICE_TIMEOUT, tokio::spawn(task)).await.is_err() {
        warn!("a backing file does not respond; its device is adopted when it does");
    }
}
