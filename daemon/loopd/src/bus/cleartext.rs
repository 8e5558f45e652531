//! `org.loopd1.Cleartext`.

use std::sync::RwLockReadGuard;

use loopd_dbus::CleartextProperties;
use zbus::interface;
use zbus::wire::OwnedObjectPath;

use super::interfaces::Shared;

/// The interface, on a cleartext object.
pub struct Cleartext {
    properties: Shared<CleartextProperties>,
}

impl Cleartext {
    /// The interface of a cleartext, whose properties never change.
    pub fn new(properties: Shared<CleartextProperties>) -> Self {
        Self { properties }
    }

    fn properties(&self) -> RwLockReadGuard<'_, CleartextProperties> {
        self.properties.read()
    }
}

#[interface(name = "org.loopd1.Cleartext", introspection_docs = false)]
impl Cleartext {
    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties().device.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn crypto(&self) -> OwnedObjectPath {
        self.properties().crypto.clone()
    }

    #[zbus(property(emits_changed_signal = "const"), name = "Type")]
    fn kind(&self) -> String {
        self.properties().kind.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn since(&self) -> u64 {
        self.properties().since
    }
}
