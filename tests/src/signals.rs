//! Records the daemon's signals.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use futures_util::StreamExt as _;
use loopd_dbus::names::ROOT_PATH;
use zbus::message::Sequence;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedVariant};

use crate::process::eventually;

/// A signal about an object below `/org/loopd1`.
#[derive(Debug)]
pub struct Event {
    /// Its position among the messages that the connection received.
    pub position: Sequence,
    /// The object.
    pub path: OwnedObjectPath,
    /// What happened.
    pub what: What,
}

/// What happened to an object.
#[derive(Debug)]
pub enum What {
    /// Interfaces were added.
    Added(Vec<String>),
    /// Interfaces were removed.
    Removed(Vec<String>),
    /// Properties of one of its interfaces have new values.
    Changed {
        /// The interface.
        interface: String,
        /// The new values.
        values: HashMap<String, OwnedVariant>,
    },
}

/// A record of signals.
#[derive(Debug)]
pub struct Signals {
    events: Arc<Mutex<Vec<Event>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Signals {
    /// Starts to record the signals on this connection.
    ///
    /// # Errors
    /// The bus refuses the match rule.
    pub async fn record(connection: &Connection) -> Result<Self> {
        let rule =
            MatchRule::builder().msg_type(zbus::message::Type::Signal).path_namespace(ROOT_PATH).build()?;
        let mut stream = MessageStream::for_match_rule(rule, connection, None).await?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&events);
        let task = tokio::spawn(async move {
            while let Some(message) = stream.next().await {
                if let Some(event) = message.ok().and_then(|message| read(&message)) {
                    record.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
            }
        });
        Ok(Self { events, task })
    }

    /// Searches the recorded signals.
    pub fn find<T>(&self, mut wanted: impl FnMut(&Event) -> Option<T>) -> Option<T> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).iter().find_map(&mut wanted)
    }

    /// Waits for a matching signal.
    ///
    /// # Errors
    /// None comes.
    pub async fn wait_for<T>(&self, what: &str, mut wanted: impl FnMut(&Event) -> Option<T>) -> Result<T> {
        let mut found = None;
        let waited = eventually(what, async || {
            found = self.find(&mut wanted);
            Ok(found.is_some())
        });
        waited.await.map_err(|error| anyhow::anyhow!("{error}; there was {:#?}", self.events))?;
        found.ok_or_else(|| anyhow::anyhow!("{what}: nothing"))
    }

    /// Waits until the object has the interface.
    ///
    /// # Errors
    /// It does not get it.
    pub async fn added(&self, path: &OwnedObjectPath, interface: &str) -> Result<Sequence> {
        self.wait_for(&format!("{path} gets {interface}"), |event| match &event.what {
            What::Added(names) if event.path == *path && names.iter().any(|name| name == interface) => {
                Some(event.position)
            }
            _ => None,
        })
        .await
    }

    /// Waits until the object has lost the interface.
    ///
    /// # Errors
    /// It keeps it.
    pub async fn removed(&self, path: &OwnedObjectPath, interface: &str) -> Result<Sequence> {
        self.wait_for(&format!("{path} loses {interface}"), |event| match &event.what {
            What::Removed(names) if event.path == *path && names.iter().any(|name| name == interface) => {
                Some(event.position)
            }
            _ => None,
        })
        .await
    }

    /// Waits until a property of the object has a matching new value.
    ///
    /// # Errors
    /// It does not get one.
    pub async fn changed(
        &self,
        path: &OwnedObjectPath,
        property: &str,
        mut fits: impl FnMut(&OwnedVariant) -> bool,
    ) -> Result<()> {
        self.wait_for(&format!("{property} of {path} changes"), |event| match &event.what {
            What::Changed { values, .. } if event.path == *path => {
                values.get(property).is_some_and(&mut fits).then_some(())
            }
            _ => None,
        })
        .await
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn read(message: &Message) -> Option<Event> {
    let header = message.header();
    let body = message.body();
    let (path, what) = match header.member()?.as_str() {
        "InterfacesAdded" => {
            let (path, interfaces): (OwnedObjectPath, HashMap<String, HashMap<String, OwnedVariant>>) =
                body.deserialize().ok()?;
            (path, What::Added(interfaces.into_keys().collect()))
        }
        "InterfacesRemoved" => {
            let (path, interfaces): (OwnedObjectPath, Vec<String>) = body.deserialize().ok()?;
            (path, What::Removed(interfaces))
        }
        "PropertiesChanged" => {
            let (interface, values, _invalidated): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                body.deserialize().ok()?;
            (header.path()?.to_owned().into(), What::Changed { interface, values })
        }
        _ => return None,
    };
    Some(Event { position: message.recv_position(), path, what })
}
