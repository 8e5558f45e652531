//! `org.freedesktop.DBus.ObjectManager`: one signal for an object with all its interfaces, where the
//! library's own sends one for each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbus::object_server::SignalEmitter;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Variant, interface};

/// The properties of an object, by interface.
pub type Interfaces = HashMap<&'static str, HashMap<&'static str, Variant<'static>>>;
/// Gives what an object shows now.
pub type Show = Box<dyn Fn() -> Interfaces + Send + Sync>;

/// The objects that are on the bus; clones are the same ones.
#[derive(Clone, Default)]
pub struct Objects {
    shown: Arc<Mutex<HashMap<OwnedObjectPath, Show>>>,
}

impl Objects {
    fn shown(&self) -> MutexGuard<'_, HashMap<OwnedObjectPath, Show>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.shown().insert(path.to_owned().into(), show);
        Self::interfaces_added(emitter, path.clone(), interfaces).await
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
        self.shown().remove(&OwnedObjectPath::from(path.to_owned()));
        Self::interfaces_removed(emitter, path.clone(), interfaces).await
    }
}

#[interface(name = "org.freedesktop.DBus.ObjectManager", introspection_docs = false)]
impl Objects {
    #[zbus(out_args("objpath_interfaces_and_properties"))]
    fn get_managed_objects(&self) -> HashMap<OwnedObjectPath, Interfaces> {
        self.shown().iter().map(|(path, show)| (path.clone(), show())).collect()
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
