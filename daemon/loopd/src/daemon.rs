//! The daemon, from its start to its end.

use std::sync::Arc;

use loopd_dbus::names::BUS_NAME;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::info;
use zbus::Connection;

use crate::exit::{Exit, Failure};
use crate::idle::Idle;
use crate::platform;
use crate::reload::Reload;
use crate::shutdown::Termination;
use crate::startup::{self, Started};
use crate::systemd::notify;
use crate::{bus, config, watchdog};

/// Starts the daemon and runs it until it ends.
///
/// # Errors
/// It cannot be started, or something that it needs failed.
pub async fn run(configuration: config::Source) -> Result<Exit, Failure> {
    let signals = Signals::listen().map_err(|error| format!("cannot handle signals: {error}"))?;
    let directory = platform::runtime_directory()
        .map_err(|error| format!("cannot make the runtime directory: {error}"))?;
    let settings = configuration.read_or_last_good(&directory).map_err(Failure::Permanent)?.settings();
    let kernel = platform::open(&directory)?;
    // Before any device is read, so that no event is missed.
    let kernel_events = platform::Events::listen(&kernel)?;
    let started = startup::start(kernel, &directory, &settings).await?;
    let Started { connection, engine, callers, quotas, .. } = &started;

    let (idle_timeout, idle_timeout_receiver) = watch::channel(settings.idle_exit);
    let idle = Idle::new(connection, engine, callers, idle_timeout_receiver);
    take_name(connection).await?;
    let reload =
        Reload { configuration, directory, engine: Arc::clone(engine), quotas: quotas.clone(), idle_timeout };
    tokio::spawn(reload.run(signals.hangup));
    tokio::spawn(watchdog::run(connection.clone(), Arc::clone(engine)));
    notify::notify(&[NotifyState::Ready]);
    info!(version = env!("CARGO_PKG_VERSION"), "ready");

    let result = tokio::select! {
        failure = kernel_events.run(engine) => Err(failure),
        () = connection.closed() => Err("the connection to the system bus is closed".to_owned()),
        exit = idle.run() => exit.map_err(startup::bus_failed),
        () = signals.termination.drain(connection, engine, callers) => Ok(Exit::Done),
    };
    stop(connection).await;
    result.map_err(Failure::Temporary)
}

/// The signals of the daemon.
struct Signals {
    termination: Termination,
    hangup: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { termination: Termination::listen()?, hangup: signal(SignalKind::hangup())? })
    }
}

async fn take_name(connection: &Connection) -> Result<(), String> {
    bus::take_name(connection).await.map_err(|error| {
        format!(
            "cannot own the name {BUS_NAME}: {error}; is another loopd running, is the bus policy installed?"
        )
    })
}

async fn stop(connection: &Connection) {
    notify::notify(&[NotifyState::Stopping]);
    info!("stopping");
    // A thread that hangs keeps the socket open, so that callers would wait for replies.
    let _is_closed = connection.clone().close().await;
}
