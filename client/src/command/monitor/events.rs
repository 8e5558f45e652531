//! Turns the signals of loopd's objects into events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use loopd_dbus::State;
use loopd_dbus::names::{ATTACHMENT, CLEARTEXT, PARTITION, VOLUME};
use serde::Serialize;
use serde_json::{Map, Value};
use zbus::Variant;

use crate::bus::objects::{Interfaces, Objects, Properties, parse_path, volume_of_cleartext};
use crate::message::escaped;
use crate::show::json::path as path_as_string;
use crate::show::property::time;
use crate::show::size::human;

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A file was attached.
    Attached,
    /// Properties changed.
    Changed,
    /// The device will be detached at its last close.
    Detaching,
    /// The device was detached.
    Detached,
    /// A partition node was added.
    PartitionAdded,
    /// A partition node was removed.
    PartitionRemoved,
    /// An encrypted volume was unlocked.
    Unlocked,
    /// The cleartext of an encrypted volume was removed.
    Locked,
    /// loopd acquired its bus name.
    DaemonStarted,
    /// loopd released its bus name.
    DaemonStopped,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Changed => "changed",
            Self::Detaching => "detaching",
            Self::Detached => "detached",
            Self::PartitionAdded => "partition-added",
            Self::PartitionRemoved => "partition-removed",
            Self::Unlocked => "unlocked",
            Self::Locked => "locked",
            Self::DaemonStarted => "daemon-started",
            Self::DaemonStopped => "daemon-stopped",
        }
    }
}

/// An event, printed as one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its kind.
    #[serde(rename = "event")]
    pub kind: Kind,
    /// When it was received, in microseconds since 1970.
    pub time_us: u64,
    /// The node of the device, partition or cleartext; null for events of the daemon.
    pub device: Option<String>,
    /// The number of the partition, or of the one that the cleartext belongs to; omitted for a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// The object on the bus; null for events of the daemon.
    pub path: Option<String>,
    /// New values by property name; for [`Kind::Attached`] all properties of `Attachment`, and for
    /// [`Kind::PartitionAdded`] and [`Kind::Unlocked`] all properties.
    pub changed: Map<String, Value>,
}

impl Event {
    /// An event of loopd itself.
    pub fn of_daemon(kind: Kind) -> Self {
        Self { kind, time_us: now(), device: None, partition: None, path: None, changed: Map::new() }
    }

    /// The event as text.
    pub fn line(&self) -> String {
        let mut line = format!("{} {}", time(self.time_us), self.kind.as_str());
        if let Some(device) = &self.device {
            line.push(' ');
            line.push_str(device);
        }
        line.push_str(&self.details());
        escaped(line.as_bytes())
    }

    fn details(&self) -> String {
        match self.kind {
            Kind::Attached => match self.changed.get("BackingFile") {
                Some(Value::String(file)) => format!(" {file}"),
                _ => String::new(),
            },
            Kind::PartitionAdded | Kind::Unlocked => match self.changed.get("Size").and_then(Value::as_u64) {
                Some(size) => format!(" {}", human(size)),
                None => String::new(),
            },
            _ => self.changed.iter().map(|(name, value)| format!(" {name}={value}")).collect(),
        }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Attachment,
    /// With its number.
    Partition(u32),
    /// With the number of the partition that is encrypted; `None` if the whole device is.
    Cleartext(Option<u32>),
}

impl Role {
    /// The role of the object with this path; `None` for one that has no events.
    fn of(path: &str) -> Option<Self> {
        if let Some((_, partition)) = volume_of_cleartext(path).and_then(parse_path) {
            return Some(Self::Cleartext(partition));
        }
        Some(parse_path(path)?.1.map_or(Self::Attachment, Self::Partition))
    }

    /// The interface that only objects of this role have.
    const fn own_interface(self) -> &'static str {
        match self {
            Self::Attachment => ATTACHMENT,
            Self::Partition(_) => PARTITION,
            Self::Cleartext(_) => CLEARTEXT,
        }
    }

    const fn partition(self) -> Option<u32> {
        match self {
            Self::Attachment => None,
            Self::Partition(number) => Some(number),
            Self::Cleartext(partition) => partition,
        }
    }

    const fn addition(self) -> Kind {
        match self {
            Self::Attachment => Kind::Attached,
            Self::Partition(_) => Kind::PartitionAdded,
            Self::Cleartext(_) => Kind::Unlocked,
        }
    }

    const fn removal(self) -> Kind {
        match self {
            Self::Attachment => Kind::Detached,
            Self::Partition(_) => Kind::PartitionRemoved,
            Self::Cleartext(_) => Kind::Locked,
        }
    }
}

/// Orders objects by their attachment, then by their partition, with a cleartext after its volume.
fn order(path: &str) -> (Option<(u64, Option<u32>)>, bool) {
    match volume_of_cleartext(path) {
        Some(volume) => (parse_path(volume), true),
        None => (parse_path(path), false),
    }
}

/// The known attachments, partitions and cleartexts with their last property values. The interfaces of an object are
/// added and removed in separate signals; the tracker makes one event of them.
#[derive(Debug, Default)]
pub struct Tracker {
    known: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    role: Role,
    /// The interfaces received so far, which arrive in any order.
    seen: BTreeSet<&'static str>,
    /// Whether the event for its addition was emitted.
    is_announced: bool,
    properties: Map<String, Value>,
}

impl Known {
    fn new(role: Role) -> Self {
        Self { role, seen: BTreeSet::new(), is_announced: false, properties: Map::new() }
    }

    /// Whether the event can be emitted: the event of an attachment needs its own interface only; that of
    /// a partition or a cleartext also needs properties of `Volume`.
    fn is_complete(&self) -> bool {
        self.seen.contains(self.role.own_interface())
            && (self.role == Role::Attachment || self.seen.contains(VOLUME))
    }

    /// Stores the values; returns those that replace different ones.
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
        let path = Some(path.to_owned());
        Event { kind, time_us: now(), device, partition: self.role.partition(), path, changed }
    }

    /// The event for the addition.
    fn announce(&mut self, path: &str, own: Map<String, Value>) -> Event {
        self.is_announced = true;
        let changed = if self.role == Role::Attachment { own } else { self.properties.clone() };
        self.event(self.role.addition(), path, changed)
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
        let role = Role::of(path)?;
        let own_interface = role.own_interface();
        let tracked = [own_interface, VOLUME];
        let mut seen = tracked.iter().filter(|name| interfaces.contains_key(**name)).peekable();
        seen.peek()?;
        let values = |name| interfaces.get(name).map(plain_properties).unwrap_or_default();
        let own = values(own_interface);
        let known = self.known.entry(path.to_owned()).or_insert_with(|| Known::new(role));
        known.seen.extend(seen);
        let mut replaced = known.update(&values(VOLUME));
        replaced.append(&mut known.update(&own));
        if known.is_announced {
            return known.change(path, replaced);
        }
        known.is_complete().then(|| known.announce(path, own))
    }

    /// `PropertiesChanged`; an invalidated property is null.
    pub fn changed(
        &mut self,
        path: &str,
        interface: &str,
        properties: &Properties,
        invalidated: &[String],
    ) -> Option<Event> {
        let role = Role::of(path)?;
        if interface != role.own_interface() && interface != VOLUME {
            return None;
        }
        let known = self.known.entry(path.to_owned()).or_insert_with(|| Known::new(role));
        let mut values = plain_properties(properties);
        // Both interfaces of a partition have its size, and both emit the change.
        values.retain(|name, value| known.properties.get(name) != Some(value));
        values.extend(invalidated.iter().map(|name| (name.clone(), Value::Null)));
        known.update(&values);
        if role != Role::Attachment && !known.is_announced {
            // The event for the addition will include the change.
            return None;
        }
        known.change(path, values)
    }

    /// `InterfacesRemoved`.
    pub fn removed(&mut self, path: &str, interfaces: &[String]) -> Option<Event> {
        let known = self.known.get(path)?;
        let own_interface = known.role.own_interface();
        let ends = |name: &String| name == own_interface || name == VOLUME && !known.is_announced;
        if !interfaces.iter().any(ends) {
            return None;
        }
        let known = self.known.remove(path)?;
        known.is_announced.then(|| known.event(known.role.removal(), path, Map::new()))
    }

    /// Replaces the state; returns the events that were missed. Partitions and cleartexts are added after their device and
    /// volume, and removed before them.
    pub fn replace(&mut self, objects: &Objects) -> Vec<Event> {
        let is_gone = |path: &&String| !objects.contains_key(path.as_str());
        let mut gone: Vec<String> = self.known.keys().filter(is_gone).cloned().collect();
        gone.sort_by_key(|path| Reverse(order(path)));
        let all = [ATTACHMENT, PARTITION, CLEARTEXT].map(str::to_owned);
        let mut events: Vec<Event> = gone.iter().filter_map(|path| self.removed(path, &all)).collect();
        let mut paths: Vec<&String> = objects.keys().collect();
        paths.sort_by_key(|path| order(path));
        events.extend(paths.into_iter().filter_map(|path| self.added(path, &objects[path])));
        events
    }
}

fn plain_properties(properties: &Properties) -> Map<String, Value> {
    properties.iter().map(|(name, value)| (name.clone(), plain(value))).collect()
}

/// A D-Bus value as JSON; a byte array is a path.
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
            Some(bytes) => path_as_string(&bytes).into(),
            None => items.iter().map(plain).collect(),
        },
        Variant::Structure(fields) => fields.fields().iter().map(plain).collect(),
        Variant::Dict(entries) => entries.iter().map(|(name, value)| (name_of(name), plain(value))).collect(),
        // No property has another type today; one of a newer daemon may.
        other => other.to_string().into(),
    }
}

/// The name of a key, which is a text.
fn name_of(key: &Variant<'_>) -> String {
    match plain(key) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

fn bytes(items: &[Variant<'_>]) -> Option<Vec<u8>> {
    let byte = |item: &Variant<'_>| match item {
        Variant::U8(byte) => Some(*byte),
        _ => None,
    };
    // An array of bytes has at least the NUL.
    (!items.is_empty()).then(|| items.iter().map(byte).collect()).flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use loopd_dbus::names::ENCRYPTED;
    use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};
    use serde_json::json;

    use super::*;
    use crate::bus::example::{self, cleartext, partition, received as properties};

    const PATH: &str = "/org/loopd1/attachment/12";
    const PART: &str = "/org/loopd1/attachment/12/p1";

    fn attachment(properties_of: &AttachmentProperties) -> Interfaces {
        Interfaces::from([(ATTACHMENT.to_owned(), properties(properties_of.to_dict()))])
    }

    fn volume(properties_of: &VolumeProperties) -> Interfaces {
        Interfaces::from([(VOLUME.to_owned(), properties(properties_of.to_dict()))])
    }

    /// The two interfaces of the example's partition, each alone, in both orders.
    fn partition_signals() -> [[Interfaces; 2]; 2] {
        let one = || {
            let of_partition = properties(partition(12, 1).partition.to_dict());
            Interfaces::from([(PARTITION.to_owned(), of_partition)])
        };
        let other = || volume(&partition(12, 1).volume);
        [[one(), other()], [other(), one()]]
    }

    fn state(state: &'static str) -> Properties {
        properties(HashMap::from([("State", state.into())]))
    }

    #[test]
    fn two_interfaces_of_an_attachment_are_one_event() {
        for volume_first in [false, true] {
            let (one, mut tracker) = (example::attachment(), Tracker::default());
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
    fn a_partition_is_added_and_removed_with_one_event_each() {
        for signals in partition_signals() {
            let mut tracker = Tracker::default();
            let events: Vec<Event> =
                signals.iter().filter_map(|signal| tracker.added(PART, signal)).collect();
            let [event] = events.as_slice() else { panic!("{events:?}") };
            assert_eq!((event.kind, event.partition), (Kind::PartitionAdded, Some(1)));
            assert_eq!(event.path.as_deref(), Some(PART));
            assert!(event.line().ends_with("Z partition-added /dev/loop0p1 20M"), "{}", event.line());
            assert_eq!(
                (&event.changed["Table"], &event.changed["FilesystemLabel"]),
                (&json!("gpt"), &json!("data"))
            );
            assert_eq!(event.changed["Attachment"], PATH);
            assert!(signals.iter().all(|signal| tracker.added(PART, signal).is_none()));

            for names in [[PARTITION, VOLUME], [VOLUME, PARTITION]] {
                signals.iter().for_each(|signal| drop(tracker.added(PART, signal)));
                let events: Vec<Event> =
                    names.iter().filter_map(|name| tracker.removed(PART, &[(*name).to_owned()])).collect();
                let [event] = events.as_slice() else { panic!("{events:?}") };
                assert_eq!((event.kind, event.partition), (Kind::PartitionRemoved, Some(1)));
                assert!(event.line().ends_with("Z partition-removed /dev/loop0p1"), "{}", event.line());
                assert!(tracker.known.is_empty());
            }
        }
    }

    #[test]
    fn a_cleartext_is_unlocked_and_locked_with_one_event_each() {
        for (volume, path) in [(None, format!("{PATH}/cleartext")), (Some(1), format!("{PART}/cleartext"))] {
            let info = cleartext(volume);
            let of_cleartext = properties(info.cleartext.to_dict());
            let signals =
                [Interfaces::from([(CLEARTEXT.to_owned(), of_cleartext)]), self::volume(&info.volume)];
            let mut tracker = Tracker::default();
            assert_eq!(tracker.added(&path, &signals[0]), None);
            let event = tracker.added(&path, &signals[1]).unwrap();
            assert_eq!((event.kind, event.partition), (Kind::Unlocked, volume));
            assert!(event.line().ends_with("Z unlocked /dev/dm-3 4M"), "{}", event.line());
            assert_eq!(
                (&event.changed["Type"], &event.changed["FilesystemType"]),
                (&json!("luks"), &json!("xfs"))
            );
            let points = VolumeProperties { mount_points: vec![b"/mnt\0".to_vec()], ..info.volume.clone() };
            let changed = properties(points.changes_since(&info.volume));
            assert_eq!(tracker.changed(&path, VOLUME, &changed, &[]).unwrap().kind, Kind::Changed);
            let event = tracker.removed(&path, &[CLEARTEXT.to_owned(), VOLUME.to_owned()]).unwrap();
            assert_eq!((event.kind, event.partition), (Kind::Locked, volume));
            assert!(event.line().ends_with("Z locked /dev/dm-3"), "{}", event.line());
            assert!(tracker.known.is_empty());
        }
    }

    #[test]
    fn the_interface_of_encrypted_volumes_is_no_event() {
        let mut tracker = Tracker::default();
        let encrypted = Interfaces::from([(ENCRYPTED.to_owned(), Properties::new())]);
        assert_eq!(tracker.added(PART, &encrypted), None);
        assert!(tracker.known.is_empty());
        tracker.added(PART, &partition_signals()[0][0]);
        assert_eq!(tracker.removed(PART, &[ENCRYPTED.to_owned()]), None);
        assert_eq!(tracker.added(PART, &partition_signals()[0][1]).unwrap().kind, Kind::PartitionAdded);
        assert_eq!(tracker.added(PART, &encrypted), None);
        let locked = properties(HashMap::from([("Cleartext", "/".into())]));
        assert_eq!(tracker.changed(PART, ENCRYPTED, &locked, &[]), None);
        assert_eq!(tracker.removed(PART, &[ENCRYPTED.to_owned()]), None);
    }

    #[test]
    fn both_interfaces_in_one_signal_are_one_event() {
        let [[mut both, volume], _] = partition_signals();
        both.extend(volume);
        let mut tracker = Tracker::default();
        assert_eq!(tracker.added(PART, &both).unwrap().kind, Kind::PartitionAdded);
        let names = [VOLUME, PARTITION].map(str::to_owned);
        assert_eq!(tracker.removed(PART, &names).unwrap().kind, Kind::PartitionRemoved);
        assert_eq!(tracker.removed(PART, &names), None);
    }

    #[test]
    fn an_incomplete_partition_is_no_event() {
        for [first, second] in partition_signals() {
            let mut tracker = Tracker::default();
            let seen: Vec<String> = first.keys().cloned().collect();
            assert_eq!(tracker.added(PART, &first), None);
            assert_eq!(tracker.removed(PART, &seen), None);
            assert!(tracker.known.is_empty());

            tracker.added(PART, &first);
            let name = properties(HashMap::from([("Label", "new".into())]));
            assert_eq!(tracker.changed(PART, PARTITION, &name, &[]), None);
            assert_eq!(tracker.added(PART, &second).unwrap().kind, Kind::PartitionAdded);
        }
    }

    #[test]
    fn a_change_of_both_interfaces_is_one_event() {
        let mut tracker = Tracker::default();
        for signal in &partition_signals()[0] {
            tracker.added(PART, signal);
        }
        let before = partition(12, 1);
        let grown =
            PartitionProperties { size: 1 << 30, label: "root".to_owned(), ..before.partition.clone() };
        let event = tracker
            .changed(PART, PARTITION, &properties(grown.changes_since(&before.partition)), &[])
            .unwrap();
        assert_eq!((event.kind, event.partition), (Kind::Changed, Some(1)));
        assert!(event.line().ends_with("Z changed /dev/loop0p1 Label=\"root\" Size=1073741824"));
        let size = properties(HashMap::from([("Size", (1_u64 << 30).into())]));
        assert_eq!(tracker.changed(PART, VOLUME, &size, &[]), None);
        assert_eq!(tracker.changed(PART, ATTACHMENT, &state("detaching"), &[]), None);
    }

    #[test]
    fn changes_are_listed_and_detaching_is_an_event_of_its_own() {
        let mut tracker = Tracker::default();
        tracker.added(PATH, &attachment(&example::attachment().attachment));
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
    fn missed_events_are_emitted_after_a_restart() {
        let mut tracker = Tracker::default();
        let one = example::attachment();
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
    fn partitions_and_cleartexts_are_added_after_their_device_and_removed_before_it() {
        let open = |partition| {
            let mut interfaces = volume(&cleartext(partition).volume);
            let of_cleartext = properties(cleartext(partition).cleartext.to_dict());
            interfaces.insert(CLEARTEXT.to_owned(), of_cleartext);
            interfaces
        };
        let [[mut part, of_volume], _] = partition_signals();
        part.extend(of_volume);
        let mut tracker = Tracker::default();
        let there = HashMap::from([
            (PART.to_owned(), part),
            ("/org/loopd1/attachment/12/p10".to_owned(), Interfaces::new()),
            (PATH.to_owned(), attachment(&example::attachment().attachment)),
            (format!("{PART}/cleartext"), open(Some(1))),
            (format!("{PATH}/cleartext"), open(None)),
        ]);
        let kinds: Vec<Kind> = tracker.replace(&there).iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [Kind::Attached, Kind::Unlocked, Kind::PartitionAdded, Kind::Unlocked]);
        assert_eq!(tracker.replace(&there), []);
        let kinds: Vec<Kind> = tracker.replace(&HashMap::new()).iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [Kind::Locked, Kind::PartitionRemoved, Kind::Locked, Kind::Detached]);
        assert!(tracker.known.is_empty());
    }

    #[test]
    fn an_event_is_one_json_object_a_line() {
        let mut tracker = Tracker::default();
        tracker.added(PATH, &volume(&example::attachment().volume));
        let points =
            VolumeProperties { mount_points: vec![b"/mnt\n\0".to_vec()], ..example::attachment().volume };
        let changed = properties(points.changes_since(&example::attachment().volume));
        let mut event = tracker.changed(PATH, VOLUME, &changed, &[]).unwrap();
        assert!(event.line().ends_with(r#" MountPoints=["/mnt\n"]"#), "{}", event.line());
        event.time_us = 5;
        let text = serde_json::to_string(&event).unwrap();
        let expected = r#"{"event":"changed","time_us":5,"device":"/dev/loop0","path":"/org/loopd1/attachment/12","changed":{"MountPoints":["/mnt\n"]}}"#;
        assert_eq!(text, expected);
        for signal in &partition_signals()[0] {
            tracker.added(PART, signal);
        }
        let mut event = tracker.removed(PART, &[PARTITION.to_owned()]).unwrap();
        event.time_us = 5;
        let expected = r#"{"event":"partition-removed","time_us":5,"device":"/dev/loop0p1","partition":1,"path":"/org/loopd1/attachment/12/p1","changed":{}}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), expected);
        let daemon = serde_json::to_value(Event::of_daemon(Kind::DaemonStopped)).unwrap();
        assert_eq!(daemon["event"], "daemon-stopped");
        assert_eq!(daemon["device"], json!(null));
    }

    #[test]
    fn control_characters_are_escaped() {
        let mut one = example::attachment();
        one.attachment.backing_file = b"/a\n\x1b[2J\0".to_vec();
        let event = Tracker::default().added(PATH, &attachment(&one.attachment)).unwrap();
        assert!(event.line().ends_with("/a\\n\\u{1b}[2J"));
    }
}
