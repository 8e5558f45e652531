//! The properties of an object, by interface.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::names::{ATTACHMENT, PARTITION, VOLUME};
use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use zbus::wire::Signature;
use zbus::{Type, Variant};

/// Properties that an object and the registry share. The publisher replaces them.
pub struct Shared<T>(Arc<RwLock<T>>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Shared<T> {
    /// The first properties.
    pub fn new(properties: T) -> Self {
        Self(Arc::new(RwLock::new(properties)))
    }

    /// The current properties.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the properties, and returns the previous ones.
    pub fn replace(&self, properties: T) -> T {
        std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), properties)
    }
}

/// The properties of an object, by interface. It is sent as `a{sa{sv}}`.
#[derive(Clone)]
pub enum Interfaces {
    /// Of an attachment.
    Attachment(Shared<AttachmentProperties>, Shared<VolumeProperties>),
    /// Of a partition.
    Partition(Shared<PartitionProperties>, Shared<VolumeProperties>),
}

impl Interfaces {
    /// The names of the interfaces.
    pub fn names(&self) -> [&'static str; 2] {
        match self {
            Self::Attachment(..) => [ATTACHMENT, VOLUME],
            Self::Partition(..) => [PARTITION, VOLUME],
        }
    }
}

impl Serialize for Interfaces {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        let [first, second] = self.names();
        let volume = match self {
            Self::Attachment(attachment, volume) => {
                map.serialize_entry(first, &*attachment.read())?;
                volume
            }
            Self::Partition(partition, volume) => {
                map.serialize_entry(first, &*partition.read())?;
                volume
            }
        };
        map.serialize_entry(second, &*volume.read())?;
        map.end()
    }
}

impl Type for Interfaces {
    const SIGNATURE: &'static Signature = <HashMap<&str, HashMap<&str, Variant<'_>>>>::SIGNATURE;
}
