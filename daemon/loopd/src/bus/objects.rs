//! The registry of the objects on the bus: their properties and their children.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_dbus::encoder::{Encoded, STRUCT};
use zbus::wire::{Endian, ObjectPath, OwnedObjectPath};

use super::interfaces::{Interfaces, SentInterfaces};

/// The properties of all objects.
pub type ManagedObjects = Encoded<HashMap<OwnedObjectPath, SentInterfaces>>;

/// The objects on the bus below the root object. Clones share them.
#[derive(Clone, Default)]
pub struct Objects {
    registry: Arc<Mutex<Registry>>,
}

/// By path. Unlike a hash table, the tree shrinks when objects are removed.
type Registry = BTreeMap<Box<str>, Interfaces>;

/// The names of the children of a path.
fn children<'r>(registry: &'r Registry, path: &str) -> impl Iterator<Item = &'r str> {
    let prefix = format!("{path}/");
    let mut next = prefix.clone();
    std::iter::from_fn(move || {
        let (found, _) =
            registry.range::<str, _>((Bound::Included(next.as_str()), Bound::Unbounded)).next()?;
        let (name, _) =
            found.strip_prefix(&prefix).map(|below| below.split_once('/').unwrap_or((below, "")))?;
        // Behind everything below this child: in paths, zero is the first character after the slash.
        next = format!("{prefix}{name}0");
        Some(name)
    })
}

impl Objects {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object.
    pub fn add(&self, path: &ObjectPath<'_>, interfaces: Interfaces) {
        self.registry().insert(path.as_str().into(), interfaces);
    }

    /// Removes an object, and returns its interfaces.
    pub fn remove(&self, path: &ObjectPath<'_>) -> Option<Interfaces> {
        self.registry().remove(path.as_str())
    }

    /// Encodes the properties of all objects.
    #[must_use]
    pub fn encode(&self, endian: Endian) -> ManagedObjects {
        ManagedObjects::new(endian, |encoder| {
            for (path, interfaces) in &*self.registry() {
                encoder.align(STRUCT);
                encoder.str(path);
                encoder.array(STRUCT, |encoder| interfaces.encode(encoder));
            }
        })
    }

    /// Appends a `node` element for each child of an object, up to a limit.
    pub fn write_children(&self, path: &str, limit: usize, xml: &mut String) {
        let registry = self.registry();
        let above_root = match path {
            "/" => Some("org"),
            "/org" => Some("loopd1"),
            _ => None,
        };
        for name in above_root.into_iter().chain(children(&registry, path)).take(limit) {
            let _strings_can_be_written_to = writeln!(xml, "  <node name=\"{name}\"/>");
        }
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{attachment_path, partition_path};
    use loopd_dbus::{AttachmentProperties, VolumeProperties};

    use super::super::interfaces::Shared;
    use super::*;

    #[test]
    fn each_object_lists_its_own_children() {
        let objects = Objects::default();
        let children = |path: &str| {
            let mut xml = String::new();
            objects.write_children(path, 3, &mut xml);
            xml.matches("<node name=").count()
        };
        let attachment = "/org/loopd1/attachment";
        let interfaces = || {
            let properties = Shared::new(AttachmentProperties::default());
            Interfaces::attachment(properties, Shared::new(VolumeProperties::default()))
        };
        assert_eq!((children("/"), children("/org"), children("/org/loopd1")), (1, 1, 0));
        objects.add(&attachment_path(7), interfaces());
        objects.add(&partition_path(7, 1), interfaces());
        objects.add(&partition_path(7, 12), interfaces());
        objects.add(&attachment_path(70), interfaces());
        assert_eq!((children("/org/loopd1"), children(attachment)), (1, 2));
        assert_eq!((children("/org/loopd1/attachment/7"), children("/org/loopd1/attachment/70")), (2, 0));
        objects.add(&attachment_path(8), interfaces());
        objects.add(&attachment_path(9), interfaces());
        let mut xml = String::new();
        objects.write_children(attachment, 9, &mut xml);
        let names: Vec<&str> = xml.split('"').skip(1).step_by(2).collect();
        assert_eq!(names, ["7", "70", "8", "9"]);
        objects.remove(&partition_path(7, 1));
        objects.remove(&partition_path(7, 12));
        assert_eq!(children(attachment), 3, "the parent of a removed object stays");
        for number in [7, 70, 8, 9] {
            assert_eq!(children("/org/loopd1"), 1);
            objects.remove(&attachment_path(number));
        }
        assert!(objects.registry().is_empty());
    }
}
