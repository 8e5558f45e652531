//! The registry of the objects on the bus: their properties and their children.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_dbus::names::ROOT_PATH;
use zbus::wire::{ObjectPath, OwnedObjectPath};

use super::interfaces::Interfaces;

/// The objects on the bus below the root object. Clones share them.
#[derive(Clone, Default)]
pub struct Objects {
    registry: Arc<Mutex<Registry>>,
}

#[derive(Default)]
struct Registry {
    objects: HashMap<OwnedObjectPath, Interfaces>,
    /// The names of the children of each path.
    children: BTreeMap<String, BTreeSet<String>>,
}

/// Splits a path below the root object into the path of its parent and its own name.
fn split(path: &str) -> Option<(&str, &str)> {
    path.rsplit_once('/').filter(|_| path != ROOT_PATH)
}

impl Objects {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object.
    pub fn add(&self, path: &ObjectPath<'_>, interfaces: Interfaces) {
        let mut registry = self.registry();
        registry.objects.insert(path.to_owned().into(), interfaces);
        let mut path = path.as_str();
        while let Some((parent, name)) = split(path)
            && registry.children.entry(parent.to_owned()).or_default().insert(name.to_owned())
        {
            path = parent;
        }
    }

    /// Removes an object, and returns its interfaces.
    pub fn remove(&self, path: &ObjectPath<'_>) -> Option<Interfaces> {
        let Registry { objects, children } = &mut *self.registry();
        let removed = objects.remove(path);
        let mut path = path.as_str();
        while let Some((parent, name)) = split(path)
            && !children.contains_key(path)
            && !objects.contains_key(&ObjectPath::from_str_unchecked(path))
            && let Some(siblings) = children.get_mut(parent)
        {
            siblings.remove(name);
            if siblings.is_empty() {
                children.remove(parent);
            }
            path = parent;
        }
        removed
    }

    /// The properties of all objects, as they are when they are sent.
    #[must_use]
    pub fn all(&self) -> HashMap<OwnedObjectPath, Interfaces> {
        self.registry().objects.clone()
    }

    /// Appends a `node` element for each child of an object, up to a limit.
    pub fn write_children(&self, path: &str, limit: usize, xml: &mut String) {
        let registry = self.registry();
        let no_children = BTreeSet::new();
        let children = registry.children.get(path).unwrap_or(&no_children);
        let above_root = match path {
            "/" => Some("org"),
            "/org" => Some("loopd1"),
            _ => None,
        };
        for name in above_root.into_iter().chain(children.iter().map(String::as_str)).take(limit) {
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
        objects.add(&attachment_path(8), interfaces());
        objects.add(&attachment_path(9), interfaces());
        assert_eq!((children("/org/loopd1"), children(attachment)), (1, 3));
        assert_eq!(children("/org/loopd1/attachment/7"), 1);
        objects.remove(&partition_path(7, 1));
        assert_eq!(children(attachment), 3, "the parent of a removed object stays");
        for number in 7..10 {
            assert_eq!(children("/org/loopd1"), 1);
            objects.remove(&attachment_path(number));
        }
        assert!(objects.registry().children.is_empty());
    }
}
