//! loopd: attaches files to loop devices for those who may not do so themselves.
//!
//! Starts and stops the tasks, nothing else. `docs/architecture.md` names each of them and what it
//! waits for.

#![forbid(unsafe_code)]

mod accounts;
mod arguments;
mod authority;
mod bus;
mod caller;
mod clients;
mod config;
mod idle;
mod lock;
mod log;
mod mount;
mod service_manager;
mod store;
mod vault;
mod watchdog;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures_lite::StreamExt;
use loopd_engine::{ClientId, Engine, Quota, Settings};
use loopd_kernel::{Linux, Untrusted, mounts, udev};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};
use zbus::fdo::DBusProxy;
use zbus::{Connection, MatchRule, MessageStream};

use arguments::Arguments;
use authority::Authority;
use bus::{Link, Publisher, Room};
use caller::Callers;
use clients::Clients;
use idle::{Exit, Idle};
use lock::Lock;
use loopd_dbus::names::BUS_NAME;
use loopd_dbus::transport::{Backlog, Descriptors};
use mount::HostMounts;
use store::Files;
use vault::Vault;

/// The exit status of a daemon that would end so again: `EX_CONFIG` of sysexits(3).
const UNFIT: u8 = 78;
/// The exit status of a daemon that is to be started again at once: `EX_TEMPFAIL`.
const RESTART: u8 = 75;
/// How many calls of the kernel may block at once. All users other than root together can have fewer than
/// 700 (`Limits` of calls, `Background`, `Accounts`): the rest is left to root and to the daemon.
const THREADS: usize = 1024;
/// How long calls that were given up may take to undo what they did.
const UNDO: Duration = Duration::from_millis(500);
/// How long devices may take to be taken up, and then to be looked at, before the daemon serves.
const STOCK: Duration = Duration::from_secs(3);
/// How long calls under way may take to end after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let configuration = match arguments::read(std::env::args_os().skip(1)) {
        Arguments::Run(configuration) => configuration,
        Arguments::Check(configuration) => return check(&configuration),
        Arguments::Print(text) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Arguments::Wrong(message) => {
            eprintln!("loopd: {message}");
            return ExitCode::from(2);
        }
    };
    log::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        // Threads for ioctls: small stacks, and gone soon after a burst.
        .thread_stack_size(256 * 1024)
        .thread_keep_alive(Duration::from_secs(1))
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(configuration));
            // A thread may hang in an ioctl on a hung file: do not wait for it.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(Failure::Passing(format!("no runtime: {error}"))),
    };
    match result {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::Restart) => ExitCode::from(RESTART),
        Err(Failure::Passing(message)) => {
            error!("{message}");
            ExitCode::FAILURE
        }
        Err(Failure::Lasting(message)) => {
            error!("{message}");
            ExitCode::from(UNFIT)
        }
    }
}

/// Why the daemon ended.
enum Failure {
    /// Another start may go better.
    Passing(String),
    /// It needs someone to change something first.
    Lasting(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Passing(message)
    }
}

/// Says whether the configuration can be read.
fn check(configuration: &config::Source) -> ExitCode {
    match configuration.read().and_then(|_| configuration.files()) {
        Ok(files) => {
            if files.is_empty() {
                println!("there is no configuration: the defaults hold");
            }
            files.iter().for_each(|file| println!("{}: ok", file.display()));
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

async fn run(configuration: config::Source) -> Result<Exit, Failure> {
    let signals = Signals::receive().map_err(|error| format!("signals cannot be received: {error}"))?;
    let runtime_folder = store::runtime_folder().map_err(|error| format!("no runtime folder: {error}"))?;
    let settings = configuration.read_or_last_good(&runtime_folder).map_err(Failure::Lasting)?.settings();
    let untrusted = Untrusted::open(&runtime_folder)
        .map_err(|error| format!("what udev is not to trust cannot be marked: {error}"))?;
    let kernel = Linux::open(Box::new(Vault::open()), untrusted)
        .map_err(|error| Failure::Lasting(error.to_string()))?;
    // Events are listened to before anything is looked at, so that none falls in between.
    let monitor = udev::Monitor::listen().map_err(|error| format!("cannot listen to udev: {error}"))?;
    let mount_watch = mounts::Watch::open().map_err(|error| format!("cannot watch mounts: {error}"))?;
    let clients = Clients::default();
    let Link { connection, descriptors, backlog } =
        bus::connect(&clients).await.map_err(|error| format!("no system bus: {error}"))?;
    let bus = bus::proxy(&connection).await.map_err(bus_failed)?;
    let _lock = alone(&bus, &runtime_folder).await?;

    let store = Files::open(&runtime_folder, bus.get_id().await.map_err(bus_failed)?.to_string())
        .map_err(|error| format!("what a restart needs cannot be kept: {error}"))?;
    let mounter = HostMounts::new(&connection).await.map_err(bus_failed)?;
    let (engine, events) = Engine::new(kernel, settings.clone(), Box::new(store), Box::new(mounter));
    let bounds = Bounds::new(&settings);
    watch_clients(&connection, &engine, &clients).await.map_err(bus_failed)?;
    let room =
        furnish(&connection, &engine, &clients, &bounds, (descriptors, backlog)).await.map_err(bus_failed)?;
    let callers = Arc::clone(&room.callers);
    tokio::spawn(Publisher::new(connection.clone(), room.clone()).run(events));
    take_stock(&engine, &callers).await?;

    bus::serve(&connection, &room).await.map_err(bus_failed)?;
    let (patience, idle_after) = watch::channel(settings.idle_exit);
    let idle = Idle::new(&connection, &engine, &callers, idle_after);
    bus::take_name(&connection).await.map_err(|error| {
        format!(
            "cannot take the name {BUS_NAME} ({error}); does another loopd run, is the bus policy installed?"
        )
    })?;
    tokio::spawn(follow(
        configuration,
        runtime_folder,
        signals.hangup,
        Arc::clone(&engine),
        bounds,
        patience,
    ));
    tokio::spawn(watchdog::run(connection.clone(), Arc::clone(&engine)));
    service_manager::notify(&[NotifyState::Ready]);
    info!(version = env!("CARGO_PKG_VERSION"), "ready");

    let stopped = tokio::select! {
        () = monitor.run(observer(&engine)) => Err("udev's socket failed".to_owned()),
        () = mount_watch.run(|table| engine.mounts_changed(table)) => Err("the mount table failed".to_owned()),
        () = connection.closed() => Err("the system bus is gone".to_owned()),
        exit = idle.run() => exit.map_err(|error| format!("the system bus failed: {error}")),
        () = drained((signals.terminate, signals.interrupt), &connection, &room) => Ok(Exit::Done),
    };
    service_manager::notify(&[NotifyState::Stopping]);
    info!("stopping");
    // The kernel keeps our sockets open for as long as a thread hangs, and callers would wait in vain.
    let _is_closed = connection.close().await;
    stopped.map_err(Failure::Passing)
}

fn bus_failed(error: impl Display) -> String {
    format!("the system bus failed: {error}")
}

/// Makes sure that no other daemon is at work.
async fn alone(bus: &DBusProxy<'_>, runtime_folder: &Path) -> Result<Lock, Failure> {
    let is_taken = async || bus.name_has_owner(BUS_NAME.try_into()?).await;
    let taken = || Failure::Passing(format!("the name {BUS_NAME} is taken: another loopd runs"));
    if is_taken().await.map_err(bus_failed)? {
        return Err(taken());
    }
    // Without the name an earlier daemon is about to end: its lock is waited for.
    let lock = Lock::take(runtime_folder).await.map_err(|error| error.to_string())?;
    if is_taken().await.map_err(bus_failed)? { Err(taken()) } else { Ok(lock) }
}

/// Takes up what an earlier daemon has left, and looks at everything else.
///
/// # Errors
/// The mount table cannot be read: what is mounted would pass for unmounted.
async fn take_stock(engine: &Arc<Engine<Linux>>, callers: &Arc<Callers>) -> Result<(), Failure> {
    let mounts = mounts::read();
    engine.mounts_changed(mounts.map_err(|error| format!("the mount table cannot be read: {error}"))?);
    let (restoring, callers) = (Arc::clone(engine), Arc::clone(callers));
    unless_it_hangs(async move {
        restoring.restore(move |client| callers.clone().still_has(client)).await;
    })
    .await;
    let looking = Arc::clone(engine);
    unless_it_hangs(async move { looking.resync().await }).await;
    engine.flush_events().await;
    Ok(())
}

/// Waits for this, but not for ever; it goes on all the same.
async fn unless_it_hangs(work: impl Future<Output = ()> + Send + 'static) {
    if tokio::time::timeout(STOCK, tokio::spawn(work)).await.is_err() {
        warn!("a backing file seems to hang; its device is taken up when it answers");
    }
}

/// What each uid may have at once, beside attachments.
struct Bounds {
    calls: Quota,
    prompts: Quota,
}

impl Bounds {
    fn new(settings: &Settings) -> Self {
        Self {
            calls: Quota::new("calls under way", "wait for them", settings.calls),
            prompts: Quota::new("prompts open", "answer them", settings.prompts),
        }
    }
}

/// Reads the configuration again at each SIGHUP. One that cannot be read changes nothing.
async fn follow(
    configuration: config::Source,
    runtime_folder: PathBuf,
    mut hangup: Signal,
    engine: Arc<Engine<Linux>>,
    bounds: Bounds,
    patience: watch::Sender<Duration>,
) {
    while hangup.recv().await.is_some() {
        match configuration.read_and_keep(&runtime_folder) {
            Ok(config) => {
                let settings = config.settings();
                bounds.calls.set_limits(settings.calls);
                bounds.prompts.set_limits(settings.prompts);
                patience.send_replace(settings.idle_exit);
                engine.configure(settings);
                info!("the configuration was read again");
            }
            Err(message) => warn!("the configuration stays as it was: {message}"),
        }
    }
}

/// Makes what the objects on the bus need.
async fn furnish(
    connection: &Connection,
    engine: &Arc<Engine<Linux>>,
    clients: &Clients,
    bounds: &Bounds,
    (descriptors, backlog): (Descriptors, Backlog),
) -> zbus::Result<Room> {
    let bus = bus::proxy(connection).await?;
    Ok(Room {
        engine: Arc::clone(engine),
        authority: Arc::new(Authority::new(connection, bounds.prompts.clone()).await?),
        callers: Callers::new(bus, clients.clone(), bounds.calls.clone(), backlog),
        objects: bus::Objects::default(),
        answers: bus::Answers::default(),
        descriptors,
    })
}

/// A stream that nobody polls hangs the connection: its task does nothing that waits.
async fn watch_clients(
    connection: &Connection,
    engine: &Arc<Engine<Linux>>,
    clients: &Clients,
) -> zbus::Result<()> {
    let rule = MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender("org.freedesktop.DBus")
        .interface("org.freedesktop.DBus")
        .member("NameOwnerChanged")
        .arg(2, "")
        .build()?;
    let mut signals = MessageStream::for_match_rule(rule, connection, None).await?;
    let (engine, clients) = (Arc::clone(engine), clients.clone());
    tokio::spawn(async move {
        while let Some(Ok(signal)) = signals.next().await {
            let body = signal.body();
            let Ok((name, _, _)) = body.deserialize::<(&str, &str, &str)>() else { continue };
            if name.starts_with(':') {
                let client = ClientId(name.to_owned());
                // In this order: an attach that does not see the first is found by the second.
                clients.vanished(&client);
                engine.client_disconnected(&client);
            }
        }
    });
    Ok(())
}

fn observer(engine: &Arc<Engine<Linux>>) -> impl FnMut(udev::Notice) {
    let engine = Arc::clone(engine);
    move |notice| match notice {
        udev::Notice::Uevent(uevent) => engine.observe(*uevent),
        udev::Notice::Lost => {
            warn!("events of udev were lost; everything is looked at again");
            engine.events_lost();
        }
    }
}

/// What the daemon is asked by signals.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn receive() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

/// Resolves after SIGTERM or SIGINT, when every call that has arrived is answered; at once after a
/// second one. Later calls wait for the next daemon, where the bus starts one.
async fn drained((mut terminate, mut interrupt): (Signal, Signal), connection: &Connection, room: &Room) {
    let mut asked = async || {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    asked().await;
    service_manager::notify(&[NotifyState::Stopping]);
    let answered = async {
        if let Err(error) = bus::release_name(connection).await {
            warn!("the bus keeps the name: {error}");
        }
        room.callers.answered().await;
    };
    tokio::select! {
        () = asked() => warn!("asked twice to stop: calls under way are given up"),
        answered = tokio::time::timeout(DRAIN, answered) => match answered {
            Ok(()) => return,
            Err(_) => warn!("calls under way did not end in time and are given up"),
        }
    }
    room.engine.abort_calls();
    // What hangs in the kernel is left to the next daemon.
    let _hangs = tokio::time::timeout(UNDO, room.callers.answered()).await;
}
