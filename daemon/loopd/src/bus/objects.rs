//! `org.freedesktop.DBus.ObjectManager`: one signal for an object with all its interfaces, where the
//! library's own sends one for each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_dbus::ErrorReply;
use loopd_dbus::names::ROOT_PATH;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Variant, interface};

use super::Room;
use super::answers::Answer;

/// The properties of an object, by interface.
pub type Interfaces = HashMap<&'static str, HashMap<&'static str, Variant<'static>>>;
/// Gives what an object shows now.
pub type Show = Box<dyn Fn() -> Interfaces + Send + Sync>;

/// The objects that are on the bus; clones are the same ones.
#[derive(Clone, Default)]
pub struct Objects {
    shown: Arc<Mutex<Shown>>,
}

#[derive(Default)]
struct Shown {
    objects: HashMap<OwnedObjectPath, Show>,
    /// The last parts of their paths, by what stands before.
    children: BTreeMap<String, BTreeSet<String>>,
}

impl Shown {
    fn add(&mut self, path: &ObjectPath<'_>, show: Show) {
        self.objects.insert(path.to_owned().into(), show);
        let mut path = path.as_str();
        while let Some((parent, name)) = split(path)
            && self.children.entry(parent.to_owned()).or_default().insert(name.to_owned())
        {
            path = parent;
        }
    }

    fn remove(&mut self, path: &ObjectPath<'_>) {
        self.objects.remove(&OwnedObjectPath::from(path.to_owned()));
        let mut path = path.as_str();
        while let Some((parent, name)) = split(path)
            && !self.children.contains_key(path)
            && let Some(children) = self.children.get_mut(parent)
        {
            children.remove(name);
            if children.is_empty() {
                self.children.remove(parent);
            }
            path = parent;
        }
    }
}

/// A path below the root object as that of its parent and its own name.
fn split(path: &str) -> Option<(&str, &str)> {
    path.rsplit_once('/').filter(|_| path != ROOT_PATH)
}

impl Objects {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names the children of an object, this many at most.
    pub fn write_children(&self, path: &str, most: usize, xml: &mut String) {
        let shown = self.shown();
        let no_names = BTreeSet::new();
        let names = shown.children.get(path).unwrap_or(&no_names);
        let above = match path {
            "/" => Some("org"),
            "/org" => Some("loopd1"),
            _ => None,
        };
        for name in above.into_iter().chain(names.iter().map(String::as_str)).take(most) {
            let _is_a_string = writeln!(xml, "  <node name=\"{name}\"/>");
        }
    }

    /// Tells that an object is there.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn add(
        &self,
        emitter: &SignalEmitter<'_>,
        path: &ObjectPath<'_>,
        show: Show,
    ) -> zbus::Result<()> {
        let interfaces = show();
        self.shown().add(path, show);
        ObjectManager::interfaces_added(emitter, path.clone(), interfaces).await
    }

    /// Tells that an object is gone.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn remove(
        &self,
        emitter: &SignalEmitter<'_>,
        path: &ObjectPath<'_>,
        interfaces: &[&str],
    ) -> zbus::Result<()> {
        self.shown().remove(path);
        ObjectManager::interfaces_removed(emitter, path.clone(), interfaces).await
    }
}

/// The interface, on the root object.
pub struct ObjectManager {
    room: Room,
}

impl ObjectManager {
    /// The object manager of this room.
    pub fn new(room: Room) -> Self {
        Self { room }
    }
}

type ManagedObjects = HashMap<OwnedObjectPath, Interfaces>;

#[interface(name = "org.freedesktop.DBus.ObjectManager", introspection_docs = false)]
impl ObjectManager {
    #[zbus(out_args("objpath_interfaces_and_properties"))]
    async fn get_managed_objects(
        &self,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Answer<ManagedObjects>, ErrorReply> {
        let _caller = self.room.identify(&header).await?;
        let all =
            || self.room.objects.shown().objects.iter().map(|(path, show)| (path.clone(), show())).collect();
        Ok(self.room.answers.make(all).await)
    }

    #[zbus(signal)]
    async fn interfaces_added(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces_and_properties: Interfaces,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn interfaces_removed(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces: &[&str],
    ) -> zbus::Result<()>;
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{ATTACHMENT, PARTITION, VOLUME, attachment_path, partition_path};
    use loopd_dbus::transport::LONGEST_SENT;
    use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};

    use super::*;
    use loopd_engine::{Limits, Settings};

    #[test]
    fn each_object_names_its_own_children() {
        let objects = Objects::default();
        let children = |path: &str| {
            let mut xml = String::new();
            objects.write_children(path, 2, &mut xml);
            xml.matches("<node name=").count()
        };
        let attachment = "/org/loopd1/attachment";
        assert_eq!((children("/"), children("/org"), children("/org/loopd1")), (1, 1, 0));
        objects.shown().add(&attachment_path(7), Box::new(Interfaces::new));
        objects.shown().add(&partition_path(7, 1), Box::new(Interfaces::new));
        objects.shown().add(&attachment_path(8), Box::new(Interfaces::new));
        objects.shown().add(&attachment_path(9), Box::new(Interfaces::new));
        assert_eq!((children("/org/loopd1"), children(attachment)), (1, 2));
        assert_eq!(children("/org/loopd1/attachment/7"), 1);
        objects.shown().remove(&partition_path(7, 1));
        for number in 7..10 {
            assert_eq!(children("/org/loopd1"), 1);
            objects.shown().remove(&attachment_path(number));
        }
        assert!(objects.shown().children.is_empty());
    }

    /// A text of this many bytes.
    fn text(bytes: usize) -> String {
        "x".repeat(bytes)
    }

    /// As udev's properties have it: `blkid_encode_string` cuts labels off at 256 bytes.
    fn longest_volume(mount_points: Vec<Vec<u8>>) -> VolumeProperties {
        VolumeProperties {
            device: "/dev/loop1048575p255".to_owned(),
            size: u64::MAX,
            usage: text(32),
            filesystem_type: text(32),
            filesystem_version: text(64),
            filesystem_label: text(256),
            filesystem_uuid: text(64),
            mount_points,
        }
    }

    fn longest_attachment() -> AttachmentProperties {
        AttachmentProperties {
            device: "/dev/loop1048575".to_owned(),
            // sysfs shows no more than a page.
            backing_file: vec![b'x'; 4096],
            reference: text(63),
            lifetime: "persistent".to_owned(),
            client: text(255),
            state: "detaching".to_owned(),
            ..AttachmentProperties::default()
        }
    }

    fn longest_partition() -> PartitionProperties {
        PartitionProperties {
            table: text(32),
            kind: text(64),
            uuid: text(64),
            label: text(256),
            attachment: attachment_path(u64::MAX).into(),
            ..PartitionProperties::default()
        }
    }

    /// The bytes that an object adds to the answer.
    fn bytes_of(path: OwnedObjectPath, interfaces: Interfaces) -> usize {
        let answer = |objects: ManagedObjects| {
            let call = zbus::Message::method_call("/org/loopd1", "GetManagedObjects").build(&()).unwrap();
            zbus::Message::method_return(&call.header()).build(&(objects,)).unwrap().data().len()
        };
        // The next object begins at eight bytes.
        (answer(HashMap::from([(path, interfaces)])) - answer(HashMap::new())).next_multiple_of(8)
    }

    /// What all users may have together by default fits into one answer with the longest names. What root
    /// attaches beyond that, or an administrator allows, may not: then the call fails with `LimitsExceeded`
    /// (`an_answer_that_the_bus_would_not_take_is_an_error`).
    #[test]
    fn all_that_users_may_have_fits_into_one_answer() {
        let Settings { attachments, partitions, mounts, .. } = Settings::default();
        // A quarter more is kept for those who have none.
        let most = |limits: Limits| limits.all + limits.all.div_ceil(4);
        let attachment = bytes_of(
            attachment_path(u64::MAX).into(),
            Interfaces::from([
                (ATTACHMENT, longest_attachment().to_dict()),
                (VOLUME, longest_volume(Vec::new()).to_dict()),
            ]),
        );
        let partition = bytes_of(
            partition_path(u64::MAX, 255).into(),
            Interfaces::from([
                (PARTITION, longest_partition().to_dict()),
                (VOLUME, longest_volume(Vec::new()).to_dict()),
            ]),
        );
        // Below /run/media/USER: two names of 255 bytes at most, and the length of the array.
        let mount = "/run/media/".len() + 2 * 256 + 8;
        let bytes = most(attachments) * attachment + most(partitions) * partition + most(mounts) * mount;
        println!("{attachment} bytes an attachment, {partition} a partition, {mount} a mount: {bytes}");
        assert!(bytes < LONGEST_SENT, "{bytes} bytes; {LONGEST_SENT} can be sent");
    }
}
