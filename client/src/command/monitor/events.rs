//! What the signals of loopd's objects mean: one event for each thing that happened.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};

use loopd_dbus::State;
use loopd_dbus::names::{ATTACHMENT, VOLUME, disk_sequence_of};
use serde::Serialize;
use serde_json::{Map, Value};
use zbus::{OwnedVariant, Variant};

use crate::output::json::path as shown_path;
use crate::output::printable;
use crate::output::table::time;

/// Properties as they are sent, by name.
pub type Properties = HashMap<String, OwnedVariant>;
/// The properties of each interface of an object.
pub type Interfaces = HashMap<String, Properties>;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A file was attached.
    Attached,
    /// Properties have new values.
    Changed,
    /// It goes at the last close.
    Detaching,
    /// It is gone.
    Detached,
    /// loopd is on the bus.
    DaemonStarted,
    /// loopd is not on the bus any more.
    DaemonStopped,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Changed => "changed",
            Self::Detaching => "detaching",
            Self::Detached => "detached",
            Self::DaemonStarted => "daemon-started",
            Self::DaemonStopped => "daemon-stopped",
        }
    }
}

/// A line of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// What happened.
    #[serde(rename = "event")]
    pub kind: Kind,
    /// When it was heard of, in microseconds since 1970.
    pub time_us: u64,
    /// The device node; null for the daemon's events.
    pub device: Option<String>,
    /// The object on the bus; null for the daemon's events.
    pub path: Option<String>,
    /// New values by the property's name on the bus; those of `Attachment` for [`Kind::Attached`].
    pub changed: Map<String, Value>,
}

impl Event {
    /// Something happened to loopd itself.
    pub fn of_daemon(kind: Kind) -> Self {
        Self { kind, time_us: now(), device: None, path: None, changed: Map::new() }
    }

    /// The line for people.
    pub fn line(&self) -> String {
        let mut line = format!("{} {}", time(self.time_us), self.kind.as_str());
        if let Some(device) = &self.device {
            line.push(' ');
            line.push_str(device);
        }
        match (self.kind, self.changed.get("BackingFile")) {
            (Kind::Attached, Some(Value::String(file))) => line.push_str(&format!(" {file}")),
            (Kind::Attached, _) => {}
            _ => self.changed.iter().for_each(|(name, value)| line.push_str(&format!(" {name}={value}"))),
        }
        printable(line.as_bytes())
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The attachments that are known, and what was last heard of each. An attachment's interfaces come
/// and go in signals of their own; this makes one event of them.
#[derive(Debug, Default)]
pub struct Tracker {
    known: BTreeMap<String, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Whether its `Attachment` interface was seen; `Volume` may come first.
    is_attached: bool,
    properties: Map<String, Value>,
}

impl Known {
    /// Takes the values; gives those that replace others.
    fn update(&mut self, values: &Map<String, Value>) -> Map<String, Value> {
        let mut replaced = Map::new();
        for (name, value) in values {
            let before = self.properties.insert(name.clone(), value.clone());
            if before.is_some_and(|before| before != *value) {
                replaced.insert(name.clone(), value.clone());
            }
        }
        replaced
    }

    fn event(&self, kind: Kind, path: &str, changed: Map<String, Value>) -> Event {
        let device = self.properties.get("Device").and_then(Value::as_str).map(str::to_owned);
        Event { kind, time_us: now(), device, path: Some(path.to_owned()), changed }
    }

    fn change(&self, path: &str, changed: Map<String, Value>) -> Option<Event> {
        let detaching = changed.get("State").is_some_and(|state| state == State::Detaching.as_str());
        let kind = if detaching { Kind::Detaching } else { Kind::Changed };
        (!changed.is_empty()).then(|| self.event(kind, path, changed))
    }
}

impl Tracker {
    /// `InterfacesAdded`, or an object of `GetManagedObjects`.
    pub fn added(&mut self, path: &str, interfaces: &Interfaces) -> Option<Event> {
        disk_sequence_of(path)?;
        let values = |name| interfaces.get(name).map(plain_properties).unwrap_or_default();
        let known = self.known.entry(path.to_owned()).or_default();
        let mut replaced = known.update(&values(VOLUME));
        let attachment = values(ATTACHMENT);
        replaced.append(&mut known.update(&attachment));
        if interfaces.contains_key(ATTACHMENT) && !known.is_attached {
            known.is_attached = true;
            return Some(known.event(Kind::Attached, path, attachment));
        }
        known.change(path, replaced)
    }

    /// `PropertiesChanged`; a property whose new value was not sent is null.
    pub fn changed(
        &mut self,
        path: &str,
        interface: &str,
        properties: &Properties,
        invalidated: &[String],
    ) -> Option<Event> {
        disk_sequence_of(path)?;
        if interface != ATTACHMENT && interface != VOLUME {
            return None;
        }
        let mut values = plain_properties(properties);
        values.extend(invalidated.iter().map(|name| (name.clone(), Value::Null)));
        let known = self.known.entry(path.to_owned()).or_default();
        known.update(&values);
        known.change(path, values)
    }

    /// `InterfacesRemoved`.
    pub fn removed(&mut self, path: &str, interfaces: &[String]) -> Option<Event> {
        let whole = interfaces.iter().any(|name| name == ATTACHMENT);
        let is_attached = self.known.get(path)?.is_attached;
        if is_attached && !whole {
            return None;
        }
        let known = self.known.remove(path)?;
        is_attached.then(|| known.event(Kind::Detached, path, Map::new()))
    }

    /// What there is now: the events that were missed.
    pub fn replace(&mut self, objects: &HashMap<String, Interfaces>) -> Vec<Event> {
        let there: HashSet<&String> = objects.keys().collect();
        let gone: Vec<String> = self.known.keys().filter(|path| !there.contains(path)).cloned().collect();
        let all = [ATTACHMENT.to_owned()];
        let mut events: Vec<Event> = gone.iter().filter_map(|path| self.removed(path, &all)).collect();
        let mut paths: Vec<&String> = objects.keys().collect();
        paths.sort_by_key(|path| disk_sequence_of(path));
        events.extend(paths.into_iter().filter_map(|path| self.added(path, &objects[path])));
        events
    }
}

fn plain_properties(properties: &Properties) -> Map<String, Value> {
    properties.iter().map(|(name, value)| (name.clone(), plain(value))).collect()
}

/// A value of the bus as JSON; bytes are a path there.
fn plain(value: &Variant<'_>) -> Value {
    match value {
        Variant::U8(number) => (*number).into(),
        Variant::Bool(value) => (*value).into(),
        Variant::I16(number) => (*number).into(),
        Variant::U16(number) => (*number).into(),
        Variant::I32(number) => (*number).into(),
        Variant::U32(number) => (*number).into(),
        Variant::I64(number) => (*number).into(),
        Variant::U64(number) => (*number).into(),
        Variant::F64(number) => (*number).into(),
        Variant::Str(text) => text.as_str().into(),
        Variant::ObjectPath(path) => path.as_str().into(),
        Variant::Variant(value) => plain(value),
        Variant::Array(items) => match bytes(items) {
            Some(bytes) => shown_path(&bytes).into(),
            None => items.iter().map(plain).collect(),
        },
        // No property of the contract has another type; a newer daemon may have one.
        other => other.to_string().into(),
    }
}

fn bytes(items: &[Variant<'_>]) -> Option<Vec<u8>> {
    let byte = |item: &Variant<'_>| match item {
        Variant::U8(byte) => Some(*byte),
        _ => None,
    };
    // An empty array of bytes would have the NUL at least.
    (!items.is_empty()).then(|| items.iter().map(byte).collect()).flatten()
}

#[cfg(test)]
mod tests {
    use loopd_dbus::{AttachmentProperties, VolumeProperties};
    use serde_json::json;

    use super::*;
    use crate::output::json::tests::example;

    const PATH: &str = "/org/loopd1/attachment/12";

    fn properties(dict: HashMap<&'static str, Variant<'static>>) -> Properties {
        dict.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    fn attachment(properties_of: &AttachmentProperties) -> Interfaces {
        Interfaces::from([(ATTACHMENT.to_owned(), properties(properties_of.to_dict()))])
    }

    fn volume(properties_of: &VolumeProperties) -> Interfaces {
        Interfaces::from([(VOLUME.to_owned(), properties(properties_of.to_dict()))])
    }

    fn state(state: &'static str) -> Properties {
        properties(HashMap::from([("State", state.into())]))
    }

    #[test]
    fn two_interfaces_are_one_event() {
        for volume_first in [false, true] {
            let (one, mut tracker) = (example(), Tracker::default());
            let mut signals = [attachment(&one.attachment), volume(&one.volume)];
            if volume_first {
                signals.reverse();
            }
            let events: Vec<Event> =
                signals.iter().filter_map(|signal| tracker.added(PATH, signal)).collect();
            assert_eq!(events.len(), 1);
            assert_eq!((events[0].kind, events[0].device.as_deref()), (Kind::Attached, Some("/dev/loop0")));
            assert_eq!(events[0].changed["BackingFile"], "/home/a/x.img");
            assert!(events[0].line().ends_with("Z attached /dev/loop0 /home/a/x.img"));

            let mut names = [ATTACHMENT, VOLUME].map(|name| vec![name.to_owned()]);
            if volume_first {
                names.reverse();
            }
            let events: Vec<Event> = names.iter().filter_map(|names| tracker.removed(PATH, names)).collect();
            assert_eq!(events.len(), 1);
            assert_eq!((events[0].kind, events[0].device.as_deref()), (Kind::Detached, Some("/dev/loop0")));
            assert!(tracker.known.is_empty());
        }
    }

    #[test]
    fn changes_are_named_and_detaching_is_told_apart() {
        let mut tracker = Tracker::default();
        tracker.added(PATH, &attachment(&example().attachment));
        let changed = properties(HashMap::from([("DirectIo", true.into()), ("BlockSize", 4096_u32.into())]));
        let event = tracker.changed(PATH, ATTACHMENT, &changed, &["Size".to_owned()]).unwrap();
        assert_eq!(event.kind, Kind::Changed);
        assert!(event.line().ends_with("Z changed /dev/loop0 BlockSize=4096 DirectIo=true Size=null"));
        let event = tracker.changed(PATH, ATTACHMENT, &state("detaching"), &[]).unwrap();
        assert_eq!(event.kind, Kind::Detaching);
        assert_eq!(tracker.changed(PATH, "org.example.Other", &state("detaching"), &[]), None);
        assert_eq!(tracker.changed("/org/loopd1", ATTACHMENT, &state("detaching"), &[]), None);
    }

    #[test]
    fn what_was_missed_is_made_good() {
        let mut tracker = Tracker::default();
        let one = example();
        tracker.replace(&HashMap::from([(PATH.to_owned(), attachment(&one.attachment))]));
        assert_eq!(tracker.replace(&HashMap::from([(PATH.to_owned(), attachment(&one.attachment))])), []);
        let detaching = AttachmentProperties { state: "detaching".to_owned(), ..one.attachment.clone() };
        let later = HashMap::from([
            (PATH.to_owned(), attachment(&detaching)),
            ("/org/loopd1/attachment/13".to_owned(), attachment(&one.attachment)),
            ("/org/loopd1".to_owned(), Interfaces::new()),
        ]);
        let kinds: Vec<Kind> = tracker.replace(&later).iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [Kind::Detaching, Kind::Attached]);
        let kinds: Vec<Kind> = tracker.replace(&HashMap::new()).iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [Kind::Detached, Kind::Detached]);
    }

    #[test]
    fn an_event_is_one_json_object_a_line() {
        let mut tracker = Tracker::default();
        tracker.added(PATH, &volume(&example().volume));
        let points = VolumeProperties { mount_points: vec![b"/mnt\n\0".to_vec()], ..example().volume };
        let changed = properties(points.changes_since(&example().volume));
        let mut event = tracker.changed(PATH, VOLUME, &changed, &[]).unwrap();
        assert!(event.line().ends_with(r#" MountPoints=["/mnt\n"]"#), "{}", event.line());
        event.time_us = 5;
        let text = serde_json::to_string(&event).unwrap();
        let expected = r#"{"event":"changed","time_us":5,"device":"/dev/loop0","path":"/org/loopd1/attachment/12","changed":{"MountPoints":["/mnt\n"]}}"#;
        assert_eq!(text, expected);
        let daemon = serde_json::to_value(Event::of_daemon(Kind::DaemonStopped)).unwrap();
        assert_eq!(daemon["event"], "daemon-stopped");
        assert_eq!(daemon["device"], json!(null));
    }

    #[test]
    fn hostile_names_stay_on_their_line() {
        let mut one = example();
        one.attachment.backing_file = b"/a\n\x1b[2J\0".to_vec();
        let event = Tracker::default().added(PATH, &attachment(&one.attachment)).unwrap();
        assert!(event.line().ends_with("/a\\n\\u{1b}[2J"));
    }
}
