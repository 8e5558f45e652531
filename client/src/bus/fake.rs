//! loopd with one image, for tests: a private connection without a bus. It records the calls that change something.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::StreamExt;
use loopd_dbus::ErrorKind;
use loopd_dbus::names::{ATTACHMENT, CLEARTEXT, PARTITION, VOLUME};
use loopd_dbus::proxy::Interaction;
use zbus::connection::Builder;
use zbus::message::{Message, Type};
use zbus::wire::ObjectPath;
use zbus::{Connection, Guid, MessageStream, OwnedFd, OwnedVariant, Variant};

use super::attachment::AttachmentInfo;
use super::cleartext::CleartextInfo;
use super::connection::Bus;
use super::example;

type Dict = HashMap<&'static str, Variant<'static>>;

/// The calls that change nothing.
const READS: &[&str] = &["List", "GetManagedObjects", "GetConnectionUnixProcessID"];

/// The state of the daemon.
pub struct State {
    /// The image, as it is or will be attached.
    pub info: AttachmentInfo,
    /// Whether it is attached.
    pub is_attached: bool,
    /// The secret that unlocks its volumes.
    pub secret: Vec<u8>,
    /// Whether no volume has the interface `Encrypted`.
    pub lacks_encrypted: bool,
    /// The error of `Mount`.
    pub mount_error: Option<ErrorKind>,
    /// The calls, each with the end of the object's path.
    pub calls: Vec<String>,
    /// The names of the options of `Unlock`.
    pub unlock_options: Vec<String>,
}

/// The daemon.
#[derive(Clone)]
pub struct FakeLoopd(Arc<Mutex<State>>);

impl FakeLoopd {
    /// A daemon to which this image can be attached.
    pub fn new(info: AttachmentInfo) -> Self {
        let state = State {
            info,
            is_attached: false,
            secret: b"secret".to_vec(),
            lacks_encrypted: false,
            mount_error: None,
            calls: Vec::new(),
            unlock_options: Vec::new(),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A connection to it.
    pub async fn connect(&self) -> Bus {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = Builder::unix_stream(theirs).server(Guid::generate()).p2p().build();
        let client = Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::try_join!(server, client).unwrap();
        tokio::spawn(self.clone().run(server));
        Bus::new(client, Interaction::Forbidden).await.unwrap()
    }

    async fn run(self, connection: Connection) {
        let mut messages = MessageStream::from(&connection);
        while let Some(Ok(message)) = messages.next().await {
            if message.message_type() == Type::MethodCall {
                self.answer(&connection, &message).await;
            }
        }
    }

    async fn answer(&self, connection: &Connection, message: &Message) {
        let header = message.header();
        let path = header.path().unwrap().to_string();
        let member = header.member().unwrap().to_string();
        if !READS.contains(&member.as_str()) {
            let object = path.trim_start_matches("/org/loopd1").trim_start_matches("/attachment/");
            self.state().calls.push(format!("{member} {object}").trim_end().to_owned());
        }
        let failed = async |kind: ErrorKind| {
            connection.reply_error(&header, kind.name(), &"a test's error").await.unwrap();
        };
        match member.as_str() {
            "List" => connection.reply(&header, &self.listed()).await.unwrap(),
            "GetManagedObjects" => connection.reply(&header, &self.objects()).await.unwrap(),
            "SetupLoop" => {
                self.state().is_attached = true;
                let path = self.state().info.path.clone();
                connection.reply(&header, &(path, "/dev/loop0")).await.unwrap();
            }
            "Lock" | "Unlock" if self.state().lacks_encrypted => {
                let name = "org.freedesktop.DBus.Error.UnknownInterface";
                connection.reply_error(&header, name, &"unknown").await.unwrap();
            }
            "Unlock" => match self.unlock(&path, message).await {
                Some(info) => connection.reply(&header, &(info.path, info.cleartext.device)).await.unwrap(),
                None => failed(ErrorKind::WrongSecret).await,
            },
            "Lock" => match self.volume(&path, |cleartext| cleartext.take()) {
                Some(_) => connection.reply(&header, &()).await.unwrap(),
                None => failed(ErrorKind::NotFound).await,
            },
            "Mount" => {
                let error = self.state().mount_error;
                match error {
                    Some(kind) => failed(kind).await,
                    None => connection.reply(&header, &"/run/media/a/x").await.unwrap(),
                }
            }
            "Detach" => {
                self.state().is_attached = false;
                connection.reply(&header, &()).await.unwrap();
            }
            "Unmount" => connection.reply(&header, &()).await.unwrap(),
            // Of the bus, to which there is no connection.
            "GetConnectionUnixProcessID" => failed(ErrorKind::NotFound).await,
            other => panic!("{other} was called"),
        }
    }

    /// Calls `change` with the cleartext of the volume with this path.
    fn volume<T>(&self, path: &str, change: impl FnOnce(&mut Option<CleartextInfo>) -> T) -> T {
        let mut state = self.state();
        if state.info.path.as_str() == path {
            return change(&mut state.info.cleartext);
        }
        let mut partitions = state.info.partitions.iter_mut();
        change(&mut partitions.find(|partition| partition.path.as_str() == path).unwrap().cleartext)
    }

    /// `None` if the secret is wrong.
    async fn unlock(&self, path: &str, message: &Message) -> Option<CleartextInfo> {
        let body = message.body();
        let (secret, options): (OwnedFd, HashMap<String, OwnedVariant>) = body.deserialize().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            File::from(std::os::fd::OwnedFd::from(secret)).read_to_end(&mut bytes).map(|_| bytes)
        });
        let bytes = read.await.unwrap().unwrap();
        let mut names: Vec<String> = options.into_keys().collect();
        names.sort();
        self.state().unlock_options = names;
        if bytes != self.state().secret {
            return None;
        }
        let number = path.rsplit_once("/p").map(|(_, number)| number.parse().unwrap());
        let info = example::cleartext(number);
        self.volume(path, |cleartext| *cleartext = Some(info.clone()));
        Some(info)
    }

    fn listed(&self) -> Vec<(ObjectPath<'static>, Dict)> {
        let state = self.state();
        let AttachmentInfo { path, attachment, volume, .. } = &state.info;
        let properties = attachment.to_dict().into_iter().chain(volume.to_dict()).collect();
        let listed = vec![(path.clone().into_inner(), properties)];
        if state.is_attached { listed } else { Vec::new() }
    }

    fn objects(&self) -> HashMap<ObjectPath<'static>, HashMap<&'static str, Dict>> {
        let state = self.state();
        let mut objects = HashMap::new();
        if !state.is_attached {
            return objects;
        }
        let AttachmentInfo { path, attachment, volume, partitions, cleartext, .. } = &state.info;
        let whole = HashMap::from([(ATTACHMENT, attachment.to_dict()), (VOLUME, volume.to_dict())]);
        objects.insert(path.clone().into_inner(), whole);
        for info in partitions {
            let interfaces =
                HashMap::from([(PARTITION, info.partition.to_dict()), (VOLUME, info.volume.to_dict())]);
            objects.insert(info.path.clone().into_inner(), interfaces);
        }
        for info in partitions.iter().filter_map(|info| info.cleartext.as_ref()).chain(cleartext) {
            let interfaces =
                HashMap::from([(CLEARTEXT, info.cleartext.to_dict()), (VOLUME, info.volume.to_dict())]);
            objects.insert(info.path.clone().into_inner(), interfaces);
        }
        objects
    }
}
