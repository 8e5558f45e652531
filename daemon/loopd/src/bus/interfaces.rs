//! The properties of an object, by interface.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::names::{ATTACHMENT, CLEARTEXT, ENCRYPTED, PARTITION, VOLUME};
use loopd_dbus::{
    AttachmentProperties, CleartextProperties, EncryptedProperties, PartitionProperties, VolumeProperties,
};
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
#[derive(Clone, Default)]
pub struct Interfaces {
    main: Option<Main>,
    volume: Option<Shared<VolumeProperties>>,
    encrypted: Option<Shared<EncryptedProperties>>,
}

/// The interface that an object of one kind has.
#[derive(Clone)]
enum Main {
    Attachment(Shared<AttachmentProperties>),
    Partition(Shared<PartitionProperties>),
    Cleartext(Shared<CleartextProperties>),
}

impl Main {
    fn name(&self) -> &'static str {
        match self {
            Self::Attachment(_) => ATTACHMENT,
            Self::Partition(_) => PARTITION,
            Self::Cleartext(_) => CLEARTEXT,
        }
    }
}

impl Interfaces {
    /// Those of an attachment.
    pub fn attachment(attachment: Shared<AttachmentProperties>, volume: Shared<VolumeProperties>) -> Self {
        Self::of(Main::Attachment(attachment), volume)
    }

    /// Those of a partition.
    pub fn partition(partition: Shared<PartitionProperties>, volume: Shared<VolumeProperties>) -> Self {
        Self::of(Main::Partition(partition), volume)
    }

    /// Those of a cleartext.
    pub fn cleartext(cleartext: Shared<CleartextProperties>, volume: Shared<VolumeProperties>) -> Self {
        Self::of(Main::Cleartext(cleartext), volume)
    }

    fn of(main: Main, volume: Shared<VolumeProperties>) -> Self {
        Self { main: Some(main), volume: Some(volume), encrypted: None }
    }

    /// The same, with `org.loopd1.Encrypted` if the volume may be encrypted.
    #[must_use]
    pub fn with_encrypted(self, encrypted: Option<Shared<EncryptedProperties>>) -> Self {
        Self { encrypted, ..self }
    }

    /// The names of the interfaces.
    pub fn names(&self) -> Vec<&'static str> {
        let main = self.main.as_ref().map(Main::name);
        let volume = self.volume.as_ref().map(|_| VOLUME);
        let encrypted = self.encrypted.as_ref().map(|_| ENCRYPTED);
        main.into_iter().chain(volume).chain(encrypted).collect()
    }
}

impl Serialize for Interfaces {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match &self.main {
            Some(Main::Attachment(attachment)) => map.serialize_entry(ATTACHMENT, &*attachment.read())?,
            Some(Main::Partition(partition)) => map.serialize_entry(PARTITION, &*partition.read())?,
            Some(Main::Cleartext(cleartext)) => map.serialize_entry(CLEARTEXT, &*cleartext.read())?,
            None => {}
        }
        if let Some(volume) = &self.volume {
            map.serialize_entry(VOLUME, &*volume.read())?;
        }
        if let Some(encrypted) = &self.encrypted {
            map.serialize_entry(ENCRYPTED, &*encrypted.read())?;
        }
        map.end()
    }
}

impl Type for Interfaces {
    const SIGNATURE: &'static Signature = <HashMap<&str, HashMap<&str, Variant<'_>>>>::SIGNATURE;
}
