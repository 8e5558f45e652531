//! `loopctl monitor`.

mod events;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use loopd_dbus::names::{BUS_NAME, ROOT_PATH};
use loopd_dbus::proxy::Interaction;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use zbus::message::{Message, Sequence, Type};
use zbus::names::OwnedUniqueName;
use zbus::wire::{DynamicType, ObjectPath, OwnedObjectPath};
use zbus::{Connection, MessageStream, Optional, fdo};

use self::events::{Event, Kind, Tracker};
use crate::bus::connection::Bus;
use crate::bus::error::explain;
use crate::bus::objects::{Interfaces, Properties, managed_objects};
use crate::cli::Monitor;
use crate::message::message;
use crate::show::stdout::{plain_json, print};

const BUS_DRIVER: &str = "org.freedesktop.DBus";
const BUS_DRIVER_PATH: &str = "/org/freedesktop/DBus";
/// How many signals may wait. An image with the most partitions causes 256 at once.
const MAX_WAITING: usize = 1024;

/// Prints the events until SIGINT or SIGTERM.
pub async fn run(args: Monitor) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = watch(args.json) => result,
        _ = interrupt.recv() => Ok(0),
        _ = terminate.recv() => Ok(0),
    }
}

async fn watch(json: bool) -> anyhow::Result<u8> {
    let bus = Bus::open(Interaction::Forbidden).await?;
    let mut signals = signals(&bus.connection);
    let mut watcher = Watcher::start(bus.connection).await?;
    if watcher.owner.is_none() {
        message("loopd is not running; waiting for it");
    }
    while let Some(signal) = signals.waiting.recv().await {
        let mut events = watcher.handle(&signal).await;
        if signals.lost.swap(false, Ordering::Relaxed) {
            events.extend(watcher.recover().await);
        }
        for event in &events {
            let line = line(event, json)?;
            // On another thread: a reader that has stopped reading must not prevent the exit.
            tokio::task::spawn_blocking(move || print(&line)).await??;
        }
    }
    anyhow::bail!("the system message bus closed the connection")
}

fn line(event: &Event, json: bool) -> serde_json::Result<String> {
    let mut line = if json { plain_json(&serde_json::to_string(event)?) } else { event.line() };
    line.push('\n');
    Ok(line)
}

/// The signals on the connection, in order.
struct Signals {
    waiting: mpsc::Receiver<Message>,
    /// Whether a signal was dropped because too many were waiting.
    lost: Arc<AtomicBool>,
}

/// Receives signals in a separate task: a signal left in the connection's queue would block the replies
/// behind it.
fn signals(connection: &Connection) -> Signals {
    let mut stream = MessageStream::from(connection);
    let (sender, waiting) = mpsc::channel(MAX_WAITING);
    let lost = Arc::new(AtomicBool::new(false));
    let is_lost = Arc::clone(&lost);
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            if message.message_type() == Type::Signal && sender.try_send(message).is_err() {
                is_lost.store(true, Ordering::Relaxed);
            }
        }
    });
    Signals { waiting, lost }
}

struct Watcher {
    connection: Connection,
    tracker: Tracker,
    /// The owner of loopd's name. Signals of any other sender are ignored.
    owner: Option<OwnedUniqueName>,
    /// Messages received before this are older than `owner`.
    owner_known: Sequence,
    /// Messages received before this are already reflected in `tracker`.
    objects_known: Sequence,
}

impl Watcher {
    async fn start(connection: Connection) -> anyhow::Result<Self> {
        add_match_rules(&connection).await.map_err(explain)?;
        let mut watcher = Self {
            connection,
            tracker: Tracker::default(),
            owner: None,
            owner_known: Sequence::default(),
            objects_known: Sequence::default(),
        };
        watcher.read_owner().await.map_err(explain)?;
        watcher.read_objects().await;
        Ok(watcher)
    }

    async fn read_owner(&mut self) -> zbus::Result<()> {
        match call_bus(&self.connection, "GetNameOwner", &(BUS_NAME,)).await {
            Ok(reply) => {
                self.owner_known = reply.recv_position();
                self.owner = Some(reply.body().deserialize()?);
                Ok(())
            }
            Err(zbus::Error::FDO(error)) if matches!(*error, fdo::Error::NameHasNoOwner(_)) => {
                self.owner = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the owner and all objects again after signals were lost; returns the events that were missed.
    async fn recover(&mut self) -> Vec<Event> {
        let before = self.owner.clone();
        if self.read_owner().await.is_err() {
            // The connection is closed: no signal follows.
            return Vec::new();
        }
        let changed = self.owner != before;
        let mut events: Vec<Event> = changed.then(|| self.daemon_event()).into_iter().collect();
        events.extend(self.read_objects().await);
        events
    }

    fn daemon_event(&self) -> Event {
        Event::of_daemon(if self.owner.is_some() { Kind::DaemonStarted } else { Kind::DaemonStopped })
    }

    /// Reads all objects; returns the events that were missed.
    async fn read_objects(&mut self) -> Vec<Event> {
        // By the unique name: a call to the well-known name would start the daemon.
        let Some(owner) = self.owner.clone() else { return Vec::new() };
        let objects = match managed_objects(&self.connection, owner.as_str()).await {
            Ok((position, objects)) => {
                self.objects_known = position;
                objects
            }
            // The daemon exited; NameOwnerChanged follows.
            Err(_) => return Vec::new(),
        };
        self.tracker.replace(&objects)
    }

    async fn handle(&mut self, message: &Message) -> Vec<Event> {
        let header = message.header();
        let (Some(sender), Some(member)) = (header.sender(), header.member()) else { return Vec::new() };
        let position = message.recv_position();
        if sender.as_str() == BUS_DRIVER {
            let is_new = member.as_str() == "NameOwnerChanged" && position > self.owner_known;
            return if is_new { self.owner_changed(message).await } else { Vec::new() };
        }
        let is_daemon = self.owner.as_ref().is_some_and(|owner| owner.as_str() == sender.as_str());
        if !is_daemon || position < self.objects_known {
            return Vec::new();
        }
        let path = header.path().map(ObjectPath::as_str).unwrap_or_default();
        // A malformed signal is ignored.
        self.object_changed(path, member.as_str(), message).ok().flatten().into_iter().collect()
    }

    async fn owner_changed(&mut self, message: &Message) -> Vec<Event> {
        type NameOwnerChanged = (String, Optional<OwnedUniqueName>, Optional<OwnedUniqueName>);
        let Ok((name, _, new)) = message.body().deserialize::<NameOwnerChanged>() else { return Vec::new() };
        if name != BUS_NAME {
            return Vec::new();
        }
        self.owner = new.into();
        let mut events = vec![self.daemon_event()];
        events.extend(self.read_objects().await);
        events
    }

    fn object_changed(&mut self, path: &str, member: &str, message: &Message) -> zbus::Result<Option<Event>> {
        let body = message.body();
        Ok(match member {
            "InterfacesAdded" => {
                let (path, interfaces): (OwnedObjectPath, Interfaces) = body.deserialize()?;
                self.tracker.added(path.as_str(), &interfaces)
            }
            "InterfacesRemoved" => {
                let (path, interfaces): (OwnedObjectPath, Vec<String>) = body.deserialize()?;
                self.tracker.removed(path.as_str(), &interfaces)
            }
            "PropertiesChanged" => {
                let (interface, changed, invalidated): (String, Properties, Vec<String>) =
                    body.deserialize()?;
                self.tracker.changed(path, &interface, &changed, &invalidated)
            }
            _ => None,
        })
    }
}

async fn add_match_rules(connection: &Connection) -> zbus::Result<()> {
    // With loopd's name as the sender: the bus matches the current owner, and starts nothing.
    let objects = format!("type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'");
    let name = format!("type='signal',sender='{BUS_DRIVER}',member='NameOwnerChanged',arg0='{BUS_NAME}'");
    for rule in [objects, name] {
        call_bus(connection, "AddMatch", &(rule,)).await?;
    }
    Ok(())
}

async fn call_bus<B>(connection: &Connection, method: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + DynamicType,
{
    connection.call_method(Some(BUS_DRIVER), BUS_DRIVER_PATH, Some(BUS_DRIVER), method, body).await
}
