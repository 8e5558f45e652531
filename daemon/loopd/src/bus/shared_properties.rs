//! The properties of an object: the publisher updates them, the object's interface returns them.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Properties of type `T`. Clones share them.
pub struct SharedProperties<T>(Arc<RwLock<T>>);

impl<T> Clone for SharedProperties<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> SharedProperties<T> {
    /// Shares these properties.
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
