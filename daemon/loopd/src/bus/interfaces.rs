//! The properties of an object, by interface.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::dictionary::Sent;
use loopd_dbus::encoder::{Encoder, STRUCT};
use loopd_dbus::names::{ATTACHMENT, PARTITION, VOLUME};
use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};

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

/// The type of the properties of an object on the bus, by interface.
pub type SentInterfaces = HashMap<&'static str, Sent>;

/// The properties of an object, by interface.
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

    /// Encodes the elements of [`SentInterfaces`].
    pub fn encode(&self, encoder: &mut Encoder) {
        let [first, second] = self.names();
        encoder.align(STRUCT);
        encoder.str(first);
        let volume = match self {
            Self::Attachment(attachment, volume) => {
                encoder.dictionary(&*attachment.read());
                volume
            }
            Self::Partition(partition, volume) => {
                encoder.dictionary(&*partition.read());
                volume
            }
        };
        encoder.align(STRUCT);
        encoder.str(second);
        encoder.dictionary(&*volume.read());
    }
}
