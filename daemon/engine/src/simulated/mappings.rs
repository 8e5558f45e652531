//! The mappings of a simulated machine: they keep the rules of the device mapper.

use std::path::{Path, PathBuf};

use loopd_common::EncryptionType;

use super::machine::{Machine, Simulated, partition_node};
use crate::cleartext::{Mapping, MappingEvent};
use crate::kernel::{DiskSequence, FileSystem, Users};

/// A mapping on a loop device or a partition of one.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) mapping: Mapping,
    /// N of `/dev/loopN`.
    pub(super) loop_number: u32,
    pub(super) partition: Option<u32>,
    /// Whether it is removed at its last close.
    pub(super) deferred: bool,
    /// Descriptors of the daemon.
    pub(super) holds: usize,
    /// Copies of them in the service manager's store.
    pub(super) stored_copies: usize,
    /// Descriptors of other programs.
    openers: usize,
    pub(super) mounts: Vec<PathBuf>,
}

impl Mapped {
    pub(super) fn is_used(&self) -> bool {
        self.holds + self.stored_copies + self.openers > 0 || !self.mounts.is_empty()
    }
}

/// What a mapping is made on, and how.
pub(super) struct NewMapping {
    pub(super) loop_number: u32,
    pub(super) partition: Option<u32>,
    pub(super) name: String,
    pub(super) kind: EncryptionType,
    pub(super) read_only: bool,
}

/// The numbers in `/dev/loop0` or `/dev/loop0p1`.
pub(super) fn parse_loop(node: &str) -> Option<(u32, Option<u32>)> {
    let numbers = node.strip_prefix("/dev/loop")?;
    let Some((number, partition)) = numbers.split_once('p') else {
        return Some((numbers.parse().ok()?, None));
    };
    Some((number.parse().ok()?, Some(partition.parse().ok()?)))
}

impl Machine {
    /// Whether the partition, or the whole device (`None`), shares bytes with a mapping of the device.
    pub(super) fn is_mapped(&self, number: u32, partition: Option<u32>) -> bool {
        self.mapped
            .values()
            .filter(|mapped| mapped.loop_number == number)
            .any(|mapped| mapped.partition.is_none() || partition.is_none() || mapped.partition == partition)
    }

    /// Makes a mapping; the reason if it cannot be made.
    pub(super) fn map(&mut self, new: NewMapping) -> Result<u32, String> {
        let NewMapping { loop_number, partition, name, kind, read_only } = new;
        if self.mapped.values().any(|mapped| mapped.mapping.name == name) {
            return Err("there is a mapping with this name".to_owned());
        }
        if self.exclusive.contains(&loop_number) || self.is_mapped(loop_number, partition) {
            return Err("the device is claimed".to_owned());
        }
        let bound = self.bound.get(&loop_number).ok_or("the device is gone")?;
        if partition.is_some_and(|partition| partition > bound.partitions) {
            return Err("the partition is gone".to_owned());
        }
        let shares =
            |mounted: &Option<u32>| mounted.is_none() || partition.is_none() || *mounted == partition;
        if bound.mounts.iter().any(|(mounted, _)| shares(mounted)) {
            return Err("the device is mounted".to_owned());
        }
        let size = partition.map_or_else(|| bound.size(), |number| partition_node(bound, number).size);
        let read_only = read_only || bound.read_only;
        let number = (0..).find(|number| !self.mapped.contains_key(number)).expect("there are numbers left");
        self.last_sequence += 1;
        let disk_sequence = DiskSequence(self.last_sequence);
        let device_number = (253, number);
        let mapping = Mapping { number, device_number, disk_sequence, name, kind, size, read_only };
        let (deferred, holds, stored_copies, openers) = (false, 0, 0, 0);
        let mounts = Vec::new();
        let mapped =
            Mapped { mapping, loop_number, partition, deferred, holds, stored_copies, openers, mounts };
        self.mapped.insert(number, mapped);
        self.push_mapping_event(number, disk_sequence, false);
        Ok(number)
    }

    fn push_mapping_event(&mut self, number: u32, sequence: DiskSequence, removed: bool) {
        let disk_sequence = Some(sequence);
        self.mapping_events.push_back(MappingEvent { number, removed, disk_sequence, file_system: None });
    }

    /// What udev finds on a mapping.
    pub(super) fn found_on_mapping(&self, sequence: DiskSequence) -> FileSystem {
        let of_this_one = || FileSystem { kind: format!("fs{sequence}"), ..FileSystem::default() };
        self.cleartext_file_system.clone().unwrap_or_else(of_this_one)
    }
}

impl Simulated {
    /// udev finds this on all mappings; by default something else on each.
    pub fn set_cleartext_file_system(&self, file_system: FileSystem) {
        self.lock().cleartext_file_system = Some(file_system);
    }

    /// All mappings begin with these bytes from now on; by default they have zeros only.
    pub fn set_cleartext_contents(&self, contents: Vec<u8>) {
        self.lock().cleartext_contents = contents;
    }

    /// The next event of a mapping, once udev has processed it.
    pub fn take_mapping_event(&self) -> Option<MappingEvent> {
        let mut machine = self.lock();
        let event = machine.mapping_events.pop_front()?;
        let found = event.disk_sequence.map(|sequence| machine.found_on_mapping(sequence));
        Some(MappingEvent { file_system: found.filter(|_| !event.removed), ..event })
    }

    /// The mappings on a loop device, each with the partition that it is on.
    pub fn mappings_on(&self, number: u32) -> Vec<(Option<u32>, Mapping)> {
        let machine = self.lock();
        let on_it = machine.mapped.values().filter(|mapped| mapped.loop_number == number);
        on_it.map(|mapped| (mapped.partition, mapped.mapping.clone())).collect()
    }

    /// Descriptors of a mapping that the daemon keeps, the copies of the service manager, and whether it is removed at
    /// its last close; `None` if there is no mapping of this number.
    pub fn mapping_holds(&self, number: u32) -> Option<(usize, usize, bool)> {
        let machine = self.lock();
        machine.mapped.get(&number).map(|mapped| (mapped.holds, mapped.stored_copies, mapped.deferred))
    }

    /// Whether a service manager keeps copies of holds.
    pub fn keeps_holds(&self) -> bool {
        self.lock().stores_holds
    }

    /// Another program makes a mapping; false if it cannot.
    pub fn map_elsewhere(&self, loop_number: u32, partition: Option<u32>, name: &str) -> bool {
        let (name, kind) = (name.to_owned(), EncryptionType::Luks);
        let made = self.lock().map(NewMapping { loop_number, partition, name, kind, read_only: false });
        self.news.notify_one();
        made.is_ok()
    }

    /// Another program removes a mapping; false if it is in use.
    pub fn unmap_elsewhere(&self, number: u32) -> bool {
        let is_used = self.lock().mapped.get(&number).is_none_or(Mapped::is_used);
        if !is_used {
            self.alter_mapping(number, |_| true, |mapped| mapped.deferred = true);
        }
        !is_used
    }

    /// Another program opens a mapping.
    pub fn open_mapping_elsewhere(&self, number: u32) {
        self.alter_mapping(number, |_| true, |mapped| mapped.openers += 1);
    }

    /// Another program closes a mapping.
    pub fn close_mapping_elsewhere(&self, number: u32) {
        self.alter_mapping(number, |_| true, |mapped| mapped.openers = mapped.openers.saturating_sub(1));
    }

    /// Mounts a mapping; false if it does not exist.
    pub fn mount_mapping(&self, number: u32, path: PathBuf) -> bool {
        let mounted = {
            let mut machine = self.lock();
            machine.mount_changes += 1;
            machine.mapped.get_mut(&number).map(|mapped| mapped.mounts.push(path)).is_some()
        };
        self.news.notify_one();
        mounted
    }

    /// Unmounts a mapping from a path; false if it is not mounted there.
    pub(super) fn unmount_mapping_from(&self, path: &Path) -> bool {
        let number = {
            let machine = self.lock();
            let mut all = machine.mapped.iter();
            all.find(|(_, mapped)| mapped.mounts.iter().any(|mount| mount == path)).map(|(number, _)| *number)
        };
        let Some(number) = number else { return false };
        self.alter_mapping(number, |_| true, |mapped| mapped.mounts.retain(|mount| mount != path));
        true
    }

    /// All other programs close and unmount the mappings of a device, and remove their own.
    pub fn leave_mappings_alone(&self, loop_number: u32) {
        for (_, mapping) in self.mappings_on(loop_number) {
            self.alter_mapping(
                mapping.number,
                |_| true,
                |mapped| {
                    mapped.openers = 0;
                    mapped.mounts.clear();
                    mapped.deferred |= !mapped.mapping.name.starts_with("loopd-");
                },
            );
        }
    }

    /// The users of a mapping that the kernel lists.
    pub(super) fn users_of_mapping(&self, mapping: &Mapping) -> Users {
        let machine = self.lock();
        let mapped = machine.mapped.get(&mapping.number).filter(|mapped| mapped.mapping.is(mapping));
        Users {
            mount_points: mapped.map(|mapped| mapped.mounts.clone()).unwrap_or_default(),
            ..Users::default()
        }
    }

    /// Changes a mapping, and removes it if that was its last close and its removal was deferred.
    pub(super) fn alter_mapping(
        &self,
        number: u32,
        meant: impl Fn(&Mapped) -> bool,
        change: impl FnOnce(&mut Mapped),
    ) {
        let below = {
            let mut guard = self.lock();
            let machine = &mut *guard;
            let Some(mapped) = machine.mapped.get_mut(&number).filter(|mapped| meant(mapped)) else { return };
            let before = mapped.mounts.len();
            change(mapped);
            machine.mount_changes += u64::from(before != mapped.mounts.len());
            let is_over = mapped.deferred && !mapped.is_used();
            let (loop_number, sequence) = (mapped.loop_number, mapped.mapping.disk_sequence);
            if is_over {
                machine.mapped.remove(&number);
                machine.push_mapping_event(number, sequence, true);
            }
            is_over.then_some(loop_number)
        };
        self.news.notify_one();
        if let Some(loop_number) = below {
            // The device mapper closes the device below.
            self.alter(loop_number, |_| true, |_| {});
        }
    }

    /// Changes the mapping with this name.
    pub(super) fn alter_named(&self, name: &str, change: impl FnOnce(&mut Mapped)) {
        if let Some(number) = self.number_of_mapping(name) {
            self.alter_mapping(number, |mapped| mapped.mapping.name == name, change);
        }
    }

    pub(super) fn number_of_mapping(&self, name: &str) -> Option<u32> {
        let machine = self.lock();
        let named = machine.mapped.values().find(|mapped| mapped.mapping.name == name);
        named.map(|mapped| mapped.mapping.number)
    }
}
