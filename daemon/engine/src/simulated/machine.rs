//! The machine behind the simulated kernel, and the actions of other programs on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::file::SimulatedFile;
use crate::cleartext::{Mapping, MappingEvent};
use crate::error::Error;
use crate::event::Uevent;
use crate::kernel::{
    Device, DiskSequence, FileSystem, Findings, Partition, PartitionNode, Partitioning, ProbeResult,
    ScanReason,
};
use crate::mount_table::MountTable;

/// The simulated machine; clones are the same machine.
#[derive(Clone, Default)]
pub struct Simulated {
    machine: Arc<Mutex<Machine>>,
    /// Woken when there may be an event or another mount table.
    pub(super) news: Arc<Notify>,
    /// Woken when the daemon dies.
    death: Arc<Notify>,
}

/// More than any image has.
const MOST_PARTITIONS: u32 = 16;

type Hook = Box<dyn FnMut(usize) -> Interference + Send>;
type Watcher = Arc<dyn Fn() + Send + Sync>;

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interference {
    /// The call succeeds.
    None,
    /// The call fails.
    Fail,
    /// The daemon dies before the call: it has no effect.
    Die,
}

/// The state of the machine.
#[derive(Default)]
pub(super) struct Machine {
    pub(super) bound: BTreeMap<u32, Bound>,
    pub(super) claimed: Vec<u32>,
    /// Devices that cannot be mounted, since they are claimed.
    pub(super) exclusive: Vec<u32>,
    pub(super) last_sequence: u64,
    pub(super) uevents: Uevents,
    /// The mappings, by the number of their nodes.
    pub(super) mapped: BTreeMap<u32, Mapped>,
    pub(super) mapping_events: VecDeque<MappingEvent>,
    /// The file system on all mappings.
    pub(super) cleartext_file_system: Option<FileSystem>,
    /// The first bytes of all mappings; the rest are zeros.
    pub(super) cleartext_contents: Vec<u8>,
    /// Whether secrets are wrong.
    pub(super) wrong_secret: bool,
    /// Whether secrets do not end.
    pub(super) secret_withheld: bool,
    /// Whether programs that unlock die with the daemon.
    pub(super) programs_die: bool,
    /// The file system on all devices and partitions.
    pub(super) file_system: Option<FileSystem>,
    /// The first bytes of all devices; the rest are zeros.
    pub(super) contents: Vec<u8>,
    /// Partitions in every image.
    pub(super) partitions: u32,
    /// How often a partition's node was read.
    pub(super) partitions_read: usize,
    /// How often a device was read.
    pub(super) looks: usize,
    /// Whether sysfs cannot be read, since no descriptor is free.
    pub(super) is_unreadable: bool,
    /// How often the state of a device was read.
    pub(super) status_reads: usize,
    /// How often all devices were compared with what is known.
    pub(super) full_looks: usize,
    pub(super) steps: usize,
    pub(super) hook: Option<Hook>,
    pub(super) random: Option<fastrand::Rng>,
    /// How often a mount came or went.
    pub(super) mount_changes: u64,
    /// Whether each call takes time before and after its effect.
    pub(super) unhurried: bool,
    /// How many calls are suspended.
    pub(super) pausing: usize,
    /// Called before and after the effect of each call on an unhurried machine.
    pub(super) watcher: Option<Watcher>,
    /// Called after each read of the mount table.
    pub(super) table_watcher: Option<Watcher>,
    pub(super) udev_runs: bool,
    pub(super) udev_is_gone: bool,
    pub(super) scans_itself: bool,
    pub(super) removed_nodes: Vec<u32>,
    /// The user that another daemon has set a number up for.
    pub(super) set_up_for: BTreeMap<u32, u32>,
    /// The attaches of the daemon that runs.
    pub(super) attached_here: BTreeSet<DiskSequence>,
    pub(super) untrusted: BTreeSet<DiskSequence>,
    /// Devices whose backing files do not answer.
    pub(super) hung: BTreeSet<u32>,
    /// Devices whose backing files cannot be examined.
    pub(super) broken: BTreeSet<u32>,
    /// Whether users other than root can write to the files.
    pub(super) users_write: bool,
    /// Whether a service manager keeps copies of holds.
    pub(super) stores_holds: bool,
    /// Whether the daemon is dead: its calls have no effect.
    pub(super) dead: bool,
}

#[derive(Default)]
pub(super) struct Uevents {
    pub(super) pending: VecDeque<PendingEvent>,
    pub(super) last: u64,
}

impl Uevents {
    pub(super) fn push(&mut self, event: PendingEvent) -> u64 {
        self.last += 1;
        self.pending.push_back(PendingEvent { uevent: self.last, ..event });
        self.last
    }
}

#[derive(Default)]
pub(super) struct PendingEvent {
    pub(super) uevent: u64,
    pub(super) number: u32,
    pub(super) partition: Option<u32>,
    pub(super) sequence: DiskSequence,
    pub(super) removed: bool,
}

pub(super) fn nodes(bound: &Bound) -> Vec<PartitionNode> {
    (1..=bound.partitions).map(|number| partition_node(bound, number)).collect()
}

pub(super) fn partition_node(bound: &Bound, number: u32) -> PartitionNode {
    let size = (bound.size() / u64::from(bound.partitions + 1) / 512 * 512).max(512);
    let start = size * u64::from(number - 1);
    PartitionNode { number, device_number: (259, bound.number * 256 + number), start, size }
}

#[derive(Debug)]
pub(super) struct Bound {
    pub(super) number: u32,
    pub(super) partition_scan: bool,
    pub(super) offset: u64,
    pub(super) size_limit: u64,
    pub(super) backing_file: Vec<u8>,
    /// The device number of the backing file, if it is a block device.
    pub(super) backing_block_device: Option<(u32, u32)>,
    pub(super) read_only: bool,
    pub(super) direct_io: bool,
    pub(super) block_size: u32,
    /// Partitions that have nodes.
    pub(super) partitions: u32,
    /// The event before they were made.
    pub(super) instance: u64,
    pub(super) sequence: DiskSequence,
    /// The disk sequence of the attach.
    pub(super) attach: DiskSequence,
    pub(super) file: SimulatedFile,
    pub(super) mark: u64,
    pub(super) autoclear: bool,
    /// Descriptors of the daemon.
    pub(super) holds: usize,
    /// Copies of them in the service manager's store.
    pub(super) stored_copies: usize,
    /// Descriptors of other programs.
    pub(super) openers: usize,
    /// Whether one of them has claimed the device.
    pub(super) claimed: bool,
    /// The mount points, each with the partition that is mounted.
    pub(super) mounts: Vec<(Option<u32>, PathBuf)>,
}

impl Bound {
    /// In bytes, as the kernel has it.
    pub(super) fn size(&self) -> u64 {
        self.file.part(self.offset, self.size_limit) / 512 * 512
    }
}

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
    pub(super) openers: usize,
    pub(super) mounts: Vec<PathBuf>,
}

impl Mapped {
    pub(super) fn is_used(&self) -> bool {
        self.holds + self.stored_copies + self.openers > 0 || !self.mounts.is_empty()
    }
}

/// A hold of a device or a mapping.
pub struct Hold {
    pub(super) machine: Simulated,
    pub(super) number: u32,
    /// The disk sequence of the attach or of the mapping.
    pub(super) sequence: DiskSequence,
    pub(super) is_of_mapping: bool,
}

impl Hold {
    /// The service manager closes its copy.
    pub(super) fn drop_copy(&self) {
        if self.is_of_mapping {
            let is_it = |mapped: &Mapped| mapped.mapping.disk_sequence == self.sequence;
            self.machine.alter_mapping(self.number, is_it, |mapped| mapped.stored_copies = 0);
        } else {
            let is_it = |bound: &Bound| bound.attach == self.sequence;
            self.machine.alter(self.number, is_it, |bound| bound.stored_copies = 0);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.is_of_mapping {
            let is_it = |mapped: &Mapped| mapped.mapping.disk_sequence == self.sequence;
            self.machine.alter_mapping(self.number, is_it, |mapped| mapped.holds -= 1);
        } else {
            self.machine.alter(self.number, |bound| bound.attach == self.sequence, |bound| bound.holds -= 1);
        }
    }
}

/// A call that is suspended. The task that waits for it may drop it.
struct Pausing(Simulated);

impl Pausing {
    fn on(machine: &Simulated) -> Self {
        machine.lock().pausing += 1;
        Self(machine.clone())
    }
}

impl Drop for Pausing {
    fn drop(&mut self) {
        self.0.lock().pausing -= 1;
    }
}

/// A number in use by an attach.
pub struct Claim {
    pub(super) machine: Simulated,
    pub(super) number: u32,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.machine.lock().claimed.retain(|number| *number != self.number);
    }
}

/// Devices that cannot be mounted until this is dropped.
pub struct Claims {
    pub(super) machine: Simulated,
    pub(super) numbers: Vec<u32>,
}

impl Drop for Claims {
    fn drop(&mut self) {
        let mut machine = self.machine.lock();
        for number in &self.numbers {
            if let Some(index) = machine.exclusive.iter().position(|claimed| claimed == number) {
                machine.exclusive.swap_remove(index);
            }
        }
    }
}

impl Simulated {
    /// Whether the device with this sequence is untrusted.
    pub fn is_untrusted(&self, sequence: DiskSequence) -> bool {
        self.lock().untrusted.contains(&sequence)
    }

    /// A machine with udev, whose calls take no time.
    pub fn new() -> Self {
        let simulated = Self::default();
        simulated.lock().udev_runs = true;
        simulated
    }

    /// A machine whose calls take up to 5 ms each, depending on the seed.
    pub fn random(seed: u64) -> Self {
        let simulated = Self::new();
        simulated.lock().random = Some(fastrand::Rng::with_seed(seed));
        simulated
    }

    /// A machine each of whose calls suspends its caller before its effect and after it.
    pub fn unhurried() -> Self {
        let simulated = Self::new();
        simulated.lock().unhurried = true;
        simulated
    }

    /// The same with delays of up to 3 ms, depending on the seed.
    pub fn unhurried_random(seed: u64) -> Self {
        let simulated = Self::unhurried();
        simulated.lock().random = Some(fastrand::Rng::with_seed(seed));
        simulated
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `watcher` at each suspension of a call on an unhurried machine.
    pub fn watch(&self, watcher: Watcher) {
        self.lock().watcher = Some(watcher);
    }

    /// Calls `watcher` after each read of the mount table by the daemon.
    pub fn watch_mount_table(&self, watcher: Watcher) {
        self.lock().table_watcher = Some(watcher);
    }

    /// Whether no call is in progress, and udev has processed all events.
    pub fn is_idle(&self) -> bool {
        let machine = self.lock();
        machine.pausing == 0 && machine.are_events_told()
    }

    /// Removes the watcher.
    pub fn unwatch(&self) {
        let mut machine = self.lock();
        machine.watcher = None;
        machine.table_watcher = None;
    }

    /// Waits until there may be an event or another mount table. For one task.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// Waits until the daemon is dead. For one task.
    pub async fn death(&self) {
        while !self.is_dead() {
            self.death.notified().await;
        }
    }

    /// Calls `hook` before each step, with the step's number from 1.
    pub fn interfere(&self, hook: impl FnMut(usize) -> Interference + Send + 'static) {
        self.lock().hook = Some(Box::new(hook));
    }

    /// How many steps there were.
    pub fn steps(&self) -> usize {
        self.lock().steps
    }

    /// The kernel is known to read partition tables.
    pub fn set_scans_itself(&self) {
        self.lock().scans_itself = true;
    }

    /// From now on a service manager keeps copies of holds.
    pub fn keep_holds(&self) {
        self.lock().stores_holds = true;
    }

    /// The daemon dies now.
    pub fn die(&self) {
        self.lock().dead = true;
        self.death.notify_one();
    }

    /// Whether the daemon is dead.
    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Another daemon starts on the machine.
    pub fn revive(&self) {
        let mut machine = self.lock();
        machine.dead = false;
        machine.hook = None;
        machine.watcher = None;
        machine.table_watcher = None;
        machine.claimed.clear();
        machine.exclusive.clear();
        machine.attached_here.clear();
    }

    /// Whether the daemon that runs has made this attach.
    pub fn is_attached_here(&self, sequence: DiskSequence) -> bool {
        self.lock().attached_here.contains(&sequence)
    }

    /// Copies of holds that the service manager has of a device.
    pub fn stored_copies(&self, number: u32) -> usize {
        self.lock().bound.get(&number).map_or(0, |bound| bound.stored_copies)
    }

    /// udev ends, and leaves its socket behind.
    pub fn end_udev(&self) {
        self.lock().udev_is_gone = true;
    }

    /// Sets whether udev runs.
    pub fn set_udev(&self, runs: bool) {
        self.lock().udev_runs = runs;
    }

    /// Drops the events that were not received yet; returns whether there were any.
    pub fn lose_uevents(&self) -> bool {
        let mut machine = self.lock();
        let lost = !machine.are_events_told();
        machine.uevents.pending.clear();
        machine.mapping_events.clear();
        lost
    }

    /// The next event, once udev has processed it.
    pub fn take_uevent(&self) -> Option<Uevent> {
        let mut machine = self.lock();
        let event = machine.uevents.pending.pop_front()?;
        Some(machine.emit(&event))
    }

    /// udev finds this on all devices and partitions; by default something else on each.
    pub fn set_file_system(&self, file_system: FileSystem) {
        self.lock().file_system = Some(file_system);
    }

    /// All devices begin with these bytes from now on; by default they have zeros only.
    pub fn set_contents(&self, contents: Vec<u8>) {
        self.lock().contents = contents;
    }

    /// Whether sysfs cannot be read from now on, since no descriptor is free.
    pub fn set_unreadable(&self, is_unreadable: bool) {
        self.lock().is_unreadable = is_unreadable;
    }

    /// Images have this many partitions from now on.
    pub fn set_partitions(&self, partitions: u32) {
        self.lock().partitions = partitions;
    }

    /// How often a partition's node was read.
    pub fn partitions_read(&self) -> usize {
        self.lock().partitions_read
    }

    /// How often a device was read.
    pub fn looks(&self) -> usize {
        self.lock().looks
    }

    /// How often all devices were compared with what is known.
    pub fn full_looks(&self) -> usize {
        self.lock().full_looks
    }

    /// How often the state of a device was read.
    pub fn status_reads(&self) -> usize {
        self.lock().status_reads
    }

    /// Drops the partitions of a device, as BLKRRPART does.
    pub fn drop_partitions(&self, number: u32) {
        self.news.notify_one();
        let mut machine = self.lock();
        if (1..=MOST_PARTITIONS).any(|partition| machine.is_mapped(number, Some(partition))) {
            return;
        }
        let Some(bound) = machine.bound.get_mut(&number) else { return };
        let (dropped, sequence) = (std::mem::take(&mut bound.partitions), bound.sequence);
        for partition in 1..=dropped {
            machine.uevents.push(PendingEvent {
                number,
                partition: Some(partition),
                sequence,
                removed: true,
                uevent: 0,
            });
        }
    }

    /// Makes the kernel read the table again, as BLKRRPART does if the kernel has parsers: the nodes disappear and
    /// return.
    pub fn reread_partitions(&self, number: u32) {
        self.news.notify_one();
        let mut guard = self.lock();
        let machine = &mut *guard;
        if (1..=MOST_PARTITIONS).any(|partition| machine.is_mapped(number, Some(partition))) {
            return;
        }
        let Some(bound) = machine.bound.get_mut(&number) else { return };
        let sequence = bound.sequence;
        for partition in 1..=bound.partitions {
            machine.uevents.push(PendingEvent {
                number,
                partition: Some(partition),
                sequence,
                removed: true,
                uevent: 0,
            });
        }
        bound.instance = machine.uevents.last;
        for partition in 1..=bound.partitions {
            machine.uevents.push(PendingEvent {
                number,
                partition: Some(partition),
                sequence,
                ..PendingEvent::default()
            });
        }
    }

    /// The bound devices: number, disk sequence and whether they are autoclear.
    pub fn bound(&self) -> Vec<(u32, DiskSequence, bool)> {
        self.lock().bound.iter().map(|(number, bound)| (*number, bound.sequence, bound.autoclear)).collect()
    }

    /// Whether the device is bound and autoclear.
    pub fn goes_at_last_close(&self, device: &Device) -> bool {
        let machine = self.lock();
        let bound = machine.bound.get(&device.number);
        bound.is_some_and(|bound| bound.sequence == device.disk_sequence && bound.autoclear)
    }

    /// Descriptors that the daemon keeps of a device.
    pub fn holds(&self, number: u32) -> usize {
        self.lock().bound.get(&number).map_or(0, |bound| bound.holds)
    }

    /// Nodes that were removed.
    pub fn removed_nodes(&self) -> Vec<u32> {
        self.lock().removed_nodes.clone()
    }

    /// Another program opens the device.
    pub fn open_elsewhere(&self, number: u32) {
        if let Some(bound) = self.lock().bound.get_mut(&number) {
            bound.openers += 1;
        }
    }

    /// Another program closes the device.
    pub fn close_elsewhere(&self, number: u32) {
        self.change_number(number, |bound| bound.openers = bound.openers.saturating_sub(1));
    }

    /// Another program opens the device and claims it.
    pub fn claim_elsewhere(&self, number: u32) {
        self.open_elsewhere(number);
        self.change_number(number, |bound| bound.claimed = true);
    }

    /// Another program mounts the device.
    pub fn mount(&self, number: u32) {
        self.mount_on(number, None, PathBuf::from("/mnt"));
    }

    /// Another program mounts the device or a partition; false if it does not exist or is claimed.
    pub fn mount_on(&self, number: u32, partition: Option<u32>, path: PathBuf) -> bool {
        self.news.notify_one();
        let mut machine = self.lock();
        let is_free = !machine.exclusive.contains(&number) && !machine.is_mapped(number, partition);
        let bound = machine.bound.get_mut(&number);
        let there =
            bound.filter(|bound| is_free && partition.is_none_or(|partition| partition <= bound.partitions));
        let mounted = there.map(|bound| bound.mounts.push((partition, path))).is_some();
        machine.mount_changes += 1;
        mounted
    }

    /// Another program removes the last mount of the device.
    pub fn unmount(&self, number: u32) {
        self.change_number(number, |bound| drop(bound.mounts.pop()));
    }

    /// Another program unmounts a path; false if nothing is mounted on it.
    pub fn unmount_from(&self, path: &Path) -> bool {
        let is_there = |mount: &(Option<u32>, PathBuf)| mount.1 == path;
        let number = {
            let machine = self.lock();
            let mut all = machine.bound.iter();
            all.find(|(_, bound)| bound.mounts.iter().any(is_there)).map(|(number, _)| *number)
        };
        let Some(number) = number else { return self.unmount_mapping_from(path) };
        self.change_number(number, |bound| bound.mounts.retain(|mount| !is_there(mount)));
        true
    }

    /// How often a mount came or went.
    pub fn mount_changes(&self) -> u64 {
        self.lock().mount_changes
    }

    /// Whether the attach with this disk sequence still exists.
    pub fn has_attach(&self, id: DiskSequence) -> bool {
        self.lock().bound.values().any(|bound| bound.attach == id)
    }

    /// All other programs close and unmount a device.
    pub fn leave_alone(&self, number: u32) {
        self.leave_mappings_alone(number);
        self.change_number(number, |bound| {
            (bound.openers, bound.claimed) = (0, false);
            bound.mounts.clear();
        });
    }

    /// The mount table, as procfs shows it.
    pub fn mount_table(&self) -> MountTable {
        let mut text = String::new();
        for (number, bound) in &self.lock().bound {
            for (partition, path) in &bound.mounts {
                let (major, minor) =
                    partition.map_or((7, *number), |number| (259, bound.number * 256 + number));
                text.push_str(&format!("1 1 {major}:{minor} / {} rw - fs dev rw\n", path.display()));
            }
        }
        for (number, mapped) in &self.lock().mapped {
            for path in &mapped.mounts {
                text.push_str(&format!("1 1 253:{number} / {} rw - fs dev rw\n", path.display()));
            }
        }
        MountTable::parse(text.as_bytes(), |_| Vec::new())
    }

    /// Another program attaches a file.
    pub fn attach_elsewhere(&self, file: u64) -> u32 {
        self.news.notify_one();
        let mut machine = self.lock();
        let number = machine.free_number();
        machine.bind(number, file, false);
        number
    }

    /// Another program attaches a file, and marks the device as loopd does.
    pub fn attach_marked_elsewhere(&self, file: u64, mark: u64) -> u32 {
        let number = self.attach_elsewhere(file);
        self.change_number(number, |bound| bound.mark = mark);
        number
    }

    /// Another program attaches a loop device or a partition of it as the file of another loop device. The file has
    /// another name.
    pub fn stack_on(&self, number: u32, partition: Option<u32>) -> u32 {
        let stacked = self.attach_elsewhere(0);
        let file = match partition {
            Some(partition) => {
                self.lock().bound.get(&number).map(|bound| partition_node(bound, partition).device_number)
            }
            None => Some((7, number)),
        };
        self.change_number(stacked, |bound| {
            bound.backing_file = b"/dev/disk".to_vec();
            bound.backing_block_device = file;
        });
        self.open_elsewhere(number);
        stacked
    }

    /// Changes the autoclear flag without a close.
    pub fn set_autoclear(&self, number: u32, autoclear: bool) {
        if let Some(bound) = self.lock().bound.get_mut(&number) {
            bound.autoclear = autoclear;
        }
    }

    /// The backing file of a device gets another size, in bytes, and other contents.
    pub fn rewrite_file(&self, number: u32, size: u64, findings: Findings) {
        self.change_number(number, |bound| (bound.file.size, bound.file.findings) = (size, findings));
    }

    /// The backing file of a device does not answer from now on.
    pub fn hang(&self, number: u32) {
        self.lock().hung.insert(number);
    }

    /// The backing file of a device cannot be examined from now on.
    pub fn break_file(&self, number: u32) {
        self.lock().broken.insert(number);
    }

    /// Users other than root can write to the files from now on.
    pub fn let_users_write(&self) {
        self.lock().users_write = true;
    }

    /// Forgets which devices are untrusted.
    pub fn forget_untrusted(&self) {
        self.lock().untrusted.clear();
    }

    /// Another daemon attaches a file for a user.
    pub fn set_up(&self, file: u64, uid: u32) -> u32 {
        let number = self.attach_elsewhere(file);
        self.lock().set_up_for.insert(number, uid);
        number
    }

    /// The device is detached although it is in use.
    pub fn take_down(&self, number: u32) {
        let mut machine = self.lock();
        machine.mapped.retain(|_, mapped| mapped.loop_number != number);
        let Some(Bound { sequence, .. }) = machine.bound.remove(&number) else { return };
        machine.last_sequence += 1;
        machine.uevents.push(PendingEvent { number, sequence, ..PendingEvent::default() });
    }

    /// A device that is being attached.
    pub fn claimed_number(&self) -> Option<u32> {
        self.lock().claimed.first().copied()
    }

    /// Another program calls `LOOP_CLR_FD`.
    pub fn detach_elsewhere(&self, number: u32) {
        self.change_number(number, |bound| bound.autoclear = true);
    }

    fn change_number(&self, number: u32, change: impl FnOnce(&mut Bound)) {
        self.alter(number, |_| true, change);
    }

    /// Changes a device, and detaches it if that was its last close.
    pub(super) fn alter(&self, number: u32, meant: impl Fn(&Bound) -> bool, change: impl FnOnce(&mut Bound)) {
        self.news.notify_one();
        let mut guard = self.lock();
        let machine = &mut *guard;
        let is_mapped = machine.is_mapped(number, None);
        let Some(bound) = machine.bound.get_mut(&number).filter(|bound| meant(bound)) else { return };
        let before = bound.mounts.len();
        change(bound);
        let sequence = bound.sequence;
        machine.mount_changes += u64::from(before != bound.mounts.len());
        if bound.autoclear
            && bound.holds + bound.stored_copies == 0
            && bound.openers == 0
            && !is_mapped
            && bound.mounts.is_empty()
        {
            machine.bound.remove(&number);
            machine.last_sequence += 1;
            machine.uevents.push(PendingEvent { number, sequence, ..PendingEvent::default() });
        }
    }

    pub(super) fn make_partitions(
        &self,
        number: u32,
        sequence: DiskSequence,
        reason: ScanReason,
    ) -> Partitioning {
        self.news.notify_one();
        let mut machine = self.lock();
        let machine = &mut *machine;
        let Some(bound) = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence) else {
            return Partitioning::default();
        };
        if reason != ScanReason::Foreign {
            if bound.partitions == 0 {
                bound.instance = machine.uevents.last;
            }
            for partition in bound.partitions..machine.partitions {
                machine.uevents.push(PendingEvent {
                    number,
                    partition: Some(partition + 1),
                    sequence,
                    ..PendingEvent::default()
                });
            }
            bound.partitions = bound.partitions.max(machine.partitions);
        }
        let partitions: Vec<_> =
            nodes(bound).into_iter().map(|node| Partition { node, ..Partition::default() }).collect();
        machine.partitions_read += partitions.len();
        Partitioning { partitions, findings: bound.file.findings.clone(), ..Partitioning::default() }
    }

    /// One step of a call: takes time, and may be made to fail.
    ///
    /// # Errors
    /// The test made this step fail.
    pub async fn step(&self) -> Result<(), Error> {
        let number = {
            let mut machine = self.lock();
            machine.steps += 1;
            machine.steps
        };
        if self.lock().unhurried {
            self.pause().await;
        } else {
            let delay = self.lock().random.as_mut().map_or(0, |random| random.u64(0..5000));
            tokio::time::sleep(Duration::from_micros(delay)).await;
        }
        let hook = self.lock().hook.take();
        let interference = hook.map_or(Interference::None, |mut hook| {
            let interference = hook(number);
            self.lock().hook.get_or_insert(hook);
            interference
        });
        if interference == Interference::Die {
            self.die();
        }
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
        match interference {
            Interference::None | Interference::Die => Ok(()),
            Interference::Fail => {
                Err(Error::Failed { operation: format!("make step {number}"), reason: "it fails".to_owned() })
            }
        }
    }

    /// Lets other programs act.
    pub fn moment(&self) {
        let watcher = self.lock().watcher.clone();
        if let Some(watcher) = watcher {
            watcher();
        }
    }

    async fn pause(&self) {
        self.moment();
        let _pausing = Pausing::on(self);
        let delay = self.lock().random.as_mut().map_or(1000, |random| random.u64(0..3000));
        if delay < 500 {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(Duration::from_micros(delay)).await;
        }
    }

    /// The time between the effect of a call and its return.
    pub(super) async fn answer(&self) {
        if self.lock().unhurried {
            self.pause().await;
            if self.is_dead() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Machine {
    /// Whether udev has processed all events.
    pub(super) fn are_events_told(&self) -> bool {
        self.uevents.pending.is_empty() && self.mapping_events.is_empty()
    }

    /// Fails if sysfs cannot be read.
    pub(super) fn read_sysfs(&self, number: u32) -> Result<(), Error> {
        if !self.is_unreadable {
            return Ok(());
        }
        let source = std::io::Error::other("too many open files");
        Err(Error::Io { operation: format!("read the state of {}", crate::device::node(number)), source })
    }

    /// Whether this attach has ended, as far as the daemon can read that.
    pub(super) fn is_detached(&self, number: u32, sequence: DiskSequence) -> bool {
        !self.is_unreadable && self.bound.get(&number).is_none_or(|bound| bound.sequence != sequence)
    }

    fn emit(&self, event: &PendingEvent) -> Uevent {
        let found = self.found(event.sequence);
        // udev cannot probe a partition that was made again since.
        let bound = self.bound.get(&event.number);
        let stale = event.partition.is_some() && bound.is_some_and(|bound| bound.instance >= event.uevent);
        Uevent {
            number: event.number,
            partition: event.partition,
            removed: event.removed,
            disk_sequence: Some(event.sequence),
            processed: Some(if stale { ProbeResult::default() } else { found }),
            resized: false,
        }
    }

    pub(super) fn free_number(&self) -> u32 {
        (0..)
            .find(|number| !self.bound.contains_key(number) && !self.claimed.contains(number))
            .expect("there are numbers left")
    }

    pub(super) fn bind(
        &mut self,
        number: u32,
        file: impl Into<SimulatedFile>,
        autoclear: bool,
    ) -> DiskSequence {
        let file = file.into();
        self.last_sequence += 1;
        let sequence = DiskSequence(self.last_sequence);
        self.bound.insert(
            number,
            Bound {
                number,
                partition_scan: false,
                offset: 0,
                size_limit: 0,
                backing_file: file.facts.path.clone(),
                backing_block_device: None,
                read_only: false,
                direct_io: false,
                block_size: 512,
                partitions: 0,
                instance: 0,
                sequence,
                attach: sequence,
                file,
                autoclear,
                mark: 0,
                holds: 0,
                stored_copies: 0,
                openers: 0,
                claimed: false,
                mounts: Vec::new(),
            },
        );
        self.uevents.push(PendingEvent { number, sequence, ..PendingEvent::default() });
        sequence
    }

    /// What udev finds on a device or partition.
    pub(super) fn found(&self, sequence: DiskSequence) -> ProbeResult {
        let of_this_attach = || FileSystem { kind: format!("fs{sequence}"), ..FileSystem::default() };
        let file_system = self.file_system.clone().unwrap_or_else(of_this_attach);
        ProbeResult { file_system, has_table: true, ..ProbeResult::default() }
    }

    pub(super) fn device(&self, number: u32) -> Option<Device> {
        let bound = self.bound.get(&number)?;
        Some(Device {
            number,
            device_number: (7, number),
            disk_sequence: bound.sequence,
            backing_device: bound.file.facts.identity.device,
            backing_inode: bound.file.facts.identity.inode,
            size: bound.size(),
            autoclear: bound.autoclear,
            partition_scan: bound.partition_scan,
            offset: bound.offset,
            size_limit: bound.size_limit,
            backing_file: bound.backing_file.clone(),
            backing_block_device: bound.backing_block_device,
            read_only: bound.read_only,
            direct_io: bound.direct_io,
            block_size: bound.block_size,
            mark: bound.mark,
            ..Device::default()
        })
    }
}
