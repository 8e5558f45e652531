//! The records of all attachments, in the order of the attaches.

use std::collections::BTreeMap;

use crate::kernel::{DiskSequence, Kernel};
use crate::record::Record;

/// The records by disk sequence. Each is allocated by itself: nodes of a tree that grows at its end are half empty.
pub(super) struct Records<K: Kernel>(BTreeMap<DiskSequence, Box<Record<K>>>);

impl<K: Kernel> Records<K> {
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    pub fn get(&self, id: &DiskSequence) -> Option<&Record<K>> {
        self.0.get(id).map(Box::as_ref)
    }

    pub fn get_mut(&mut self, id: &DiskSequence) -> Option<&mut Record<K>> {
        self.0.get_mut(id).map(Box::as_mut)
    }

    pub fn contains_key(&self, id: &DiskSequence) -> bool {
        self.0.contains_key(id)
    }

    pub fn insert(&mut self, id: DiskSequence, record: Record<K>) {
        self.0.insert(id, Box::new(record));
    }

    pub fn remove(&mut self, id: &DiskSequence) -> Option<Record<K>> {
        self.0.remove(id).map(|record| *record)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&DiskSequence, &Record<K>)> {
        self.0.iter().map(|(id, record)| (id, record.as_ref()))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&DiskSequence, &mut Record<K>)> {
        self.0.iter_mut().map(|(id, record)| (id, record.as_mut()))
    }

    pub fn values(&self) -> impl Iterator<Item = &Record<K>> {
        self.0.values().map(Box::as_ref)
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Record<K>> {
        self.0.values_mut().map(Box::as_mut)
    }
}
