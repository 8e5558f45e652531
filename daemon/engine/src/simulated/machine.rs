//! The machine behind the simulated kernel, and what other programs do on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use loopd_common::{Error, ErrorKind};
use tokio::sync::Notify;

use crate::Uevent;
use crate::kernel::{
    Device, DiskSequence, FileSystem, Partition, PartitionNode, Partitioning, ProbeResult, ScanReason,
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

type Hook = Box<dyn FnMut(usize) -> Interference + Send>;
type Watcher = Arc<dyn Fn() + Send + Sync>;

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interference {
    /// Nothing.
    None,
    /// The call fails.
    Fail,
    /// The daemon dies before the call is made: nothing of it happens any more.
    Die,
}

/// Everything that the machine remembers.
#[derive(Default)]
pub(super) struct Machine {
    pub(super) bound: BTreeMap<u32, Bound>,
    pub(super) claimed: Vec<u32>,
    /// Devices that nobody can mount.
    pub(super) exclusive: Vec<u32>,
    pub(super) last_sequence: u64,
    pub(super) uevents: Uevents,
    /// Partitions in every image.
    pub(super) partitions: u32,
    /// How often a partition's node was looked at.
    pub(super) partitions_read: usize,
    /// How often a device was looked at.
    pub(super) looks: usize,
    pub(super) steps: usize,
    pub(super) hook: Option<Hook>,
    pub(super) random: Option<fastrand::Rng>,
    /// How often a mount came or went.
    pub(super) mount_changes: u64,
    /// Whether each call takes time before and after its effect.
    pub(super) unhurried: bool,
    /// How many calls are suspended.
    pub(super) pausing: usize,
    /// Called at each moment of an unhurried machine at which something else may happen.
    pub(super) watcher: Option<Watcher>,
    pub(super) udev_runs: bool,
    pub(super) scans_itself: bool,
    pub(super) removed_nodes: Vec<u32>,
    /// Whom another daemon has set a number up for.
    pub(super) set_up_for: BTreeMap<u32, u32>,
    pub(super) untrusted: BTreeSet<DiskSequence>,
    /// Devices whose backing files do not answer.
    pub(super) hung: BTreeSet<u32>,
    /// Whether users other than root can write to the files.
    pub(super) users_write: bool,
    /// Whether a service manager keeps copies of holds.
    pub(super) vault: bool,
    /// Whether the daemon is dead: what it still tries has no effect.
    pub(super) dead: bool,
}

#[derive(Default)]
pub(super) struct Uevents {
    pub(super) untold: VecDeque<Happened>,
    pub(super) last: u64,
}

impl Uevents {
    pub(super) fn push(&mut self, happened: Happened) -> u64 {
        self.last += 1;
        self.untold.push_back(Happened { uevent: self.last, ..happened });
        self.last
    }
}

#[derive(Default)]
pub(super) struct Happened {
    pub(super) uevent: u64,
    pub(super) number: u32,
    pub(super) partition: Option<u32>,
    pub(super) sequence: DiskSequence,
    pub(super) removed: bool,
}

pub(super) fn found(sequence: DiskSequence) -> ProbeResult {
    let file_system = FileSystem { kind: format!("fs{sequence}"), ..FileSystem::default() };
    ProbeResult { file_system, has_table: true, ..ProbeResult::default() }
}

pub(super) fn nodes(bound: &Bound) -> Vec<PartitionNode> {
    (1..=bound.partitions).map(|number| partition_node(bound, number)).collect()
}

pub(super) fn partition_node(bound: &Bound, number: u32) -> PartitionNode {
    PartitionNode { number, device_number: (259, bound.number * 256 + number), start: 0, size: 512 }
}

#[derive(Debug)]
pub(super) struct Bound {
    pub(super) number: u32,
    pub(super) partition_scan: bool,
    pub(super) offset: u64,
    pub(super) size_limit: u64,
    pub(super) backing_file: Vec<u8>,
    pub(super) read_only: bool,
    pub(super) direct_io: bool,
    pub(super) block_size: u32,
    /// Partitions that have nodes.
    pub(super) partitions: u32,
    /// The event before they were made.
    pub(super) instance: u64,
    pub(super) sequence: DiskSequence,
    /// The sequence that the attach gave it.
    pub(super) attach: DiskSequence,
    pub(super) file: u64,
    pub(super) mark: u64,
    pub(super) autoclear: bool,
    /// Descriptors of the daemon.
    pub(super) holds: usize,
    /// Copies of them in the service manager's store.
    pub(super) deposits: usize,
    /// Descriptors of other programs.
    pub(super) openers: usize,
    /// Each with the partition that is mounted.
    pub(super) mounts: Vec<(Option<u32>, PathBuf)>,
}

/// A saved descriptor.
pub struct Hold {
    pub(super) machine: Simulated,
    pub(super) number: u32,
    pub(super) attach: DiskSequence,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.machine.alter(self.number, |bound| bound.attach == self.attach, |bound| bound.holds -= 1);
    }
}

/// A call that is suspended; whoever waits for it may stop to do so.
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

/// Devices that nobody can mount while it lives.
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
    /// Whether udev activates nothing of what a device with this sequence shows.
    pub fn is_untrusted(&self, sequence: DiskSequence) -> bool {
        self.lock().untrusted.contains(&sequence)
    }

    /// A machine with udev, whose calls take no time.
    pub fn new() -> Self {
        let simulated = Self::default();
        simulated.lock().udev_runs = true;
        simulated
    }

    /// A machine whose calls take up to 5 ms each, as this seed has it.
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

    /// The same with delays of up to 3 ms, as this seed has them.
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

    /// Whether no call is under way, and udev has processed everything.
    pub fn is_idle(&self) -> bool {
        let machine = self.lock();
        machine.pausing == 0 && machine.uevents.untold.is_empty()
    }

    /// From now on nothing is called.
    pub fn unwatch(&self) {
        self.lock().watcher = None;
    }

    /// Resolves when there may be an event or another mount table: for one task.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// Resolves when the daemon is dead: for one task.
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
        self.lock().vault = true;
    }

    /// The daemon dies at once.
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
        machine.claimed.clear();
        machine.exclusive.clear();
    }

    /// Copies of holds that the service manager has of a device.
    pub fn deposits(&self, number: u32) -> usize {
        self.lock().bound.get(&number).map_or(0, |bound| bound.deposits)
    }

    /// Whether udev is there.
    pub fn set_udev(&self, runs: bool) {
        self.lock().udev_runs = runs;
    }

    /// Loses the events that nobody has taken yet; says whether there were any.
    pub fn lose_uevents(&self) -> bool {
        let mut machine = self.lock();
        let lost = !machine.uevents.untold.is_empty();
        machine.uevents.untold.clear();
        lost
    }

    /// The next event, once udev has processed it.
    pub fn take_uevent(&self) -> Option<Uevent> {
        let mut machine = self.lock();
        let happened = machine.uevents.untold.pop_front()?;
        Some(machine.emit(&happened))
    }

    /// Images have this many partitions from now on.
    pub fn set_partitions(&self, partitions: u32) {
        self.lock().partitions = partitions;
    }

    /// How often a partition's node was looked at.
    pub fn partitions_read(&self) -> usize {
        self.lock().partitions_read
    }

    /// How often a device was looked at.
    pub fn looks(&self) -> usize {
        self.lock().looks
    }

    /// Drops the partitions of a device, as BLKRRPART does.
    pub fn drop_partitions(&self, number: u32) {
        self.news.notify_one();
        let mut machine = self.lock();
        let Some(bound) = machine.bound.get_mut(&number) else { return };
        let (dropped, sequence) = (std::mem::take(&mut bound.partitions), bound.sequence);
        for partition in 1..=dropped {
            machine.uevents.push(Happened {
                number,
                partition: Some(partition),
                sequence,
                removed: true,
                uevent: 0,
            });
        }
    }

    /// Has the kernel read the table anew, as BLKRRPART does where it has parsers: the nodes go and
    /// come back.
    pub fn reread_partitions(&self, number: u32) {
        self.news.notify_one();
        let mut guard = self.lock();
        let machine = &mut *guard;
        let Some(bound) = machine.bound.get_mut(&number) else { return };
        let sequence = bound.sequence;
        for partition in 1..=bound.partitions {
            machine.uevents.push(Happened {
                number,
                partition: Some(partition),
                sequence,
                removed: true,
                uevent: 0,
            });
        }
        bound.instance = machine.uevents.last;
        for partition in 1..=bound.partitions {
            machine.uevents.push(Happened {
                number,
                partition: Some(partition),
                sequence,
                ..Happened::default()
            });
        }
    }

    /// What is bound: number, sequence and whether it goes at the last close.
    pub fn bound(&self) -> Vec<(u32, DiskSequence, bool)> {
        self.lock().bound.iter().map(|(number, bound)| (*number, bound.sequence, bound.autoclear)).collect()
    }

    /// Whether the device is there and goes at its last close.
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

    /// Someone mounts the device.
    pub fn mount(&self, number: u32) {
        self.mount_on(number, None, PathBuf::from("/mnt"));
    }

    /// Someone mounts the device or a partition; false where there is none.
    pub fn mount_on(&self, number: u32, partition: Option<u32>, path: PathBuf) -> bool {
        self.news.notify_one();
        let mut machine = self.lock();
        let exclusive = machine.exclusive.clone();
        let bound = machine.bound.get_mut(&number);
        let there = bound.filter(|bound| {
            !exclusive.contains(&bound.number)
                && partition.is_none_or(|partition| partition <= bound.partitions)
        });
        let mounted = there.map(|bound| bound.mounts.push((partition, path))).is_some();
        machine.mount_changes += 1;
        mounted
    }

    /// Someone unmounts what was mounted last of the device.
    pub fn unmount(&self, number: u32) {
        self.change_number(number, |bound| drop(bound.mounts.pop()));
    }

    /// Someone unmounts what is mounted there; false where nothing is.
    pub fn unmount_from(&self, path: &Path) -> bool {
        let is_there = |mount: &(Option<u32>, PathBuf)| mount.1 == path;
        let number = {
            let machine = self.lock();
            let mut all = machine.bound.iter();
            all.find(|(_, bound)| bound.mounts.iter().any(is_there)).map(|(number, _)| *number)
        };
        let Some(number) = number else { return false };
        self.change_number(number, |bound| bound.mounts.retain(|mount| !is_there(mount)));
        true
    }

    /// How often a mount came or went.
    pub fn mount_changes(&self) -> u64 {
        self.lock().mount_changes
    }

    /// Whether what was attached under this sequence still is.
    pub fn has_attach(&self, id: DiskSequence) -> bool {
        self.lock().bound.values().any(|bound| bound.attach == id)
    }

    /// Everyone else closes and unmounts a device.
    pub fn leave_alone(&self, number: u32) {
        self.change_number(number, |bound| {
            bound.openers = 0;
            bound.mounts.clear();
        });
    }

    /// What procfs would show.
    pub fn mount_table(&self) -> MountTable {
        let mut text = String::new();
        for (number, bound) in &self.lock().bound {
            for (partition, path) in &bound.mounts {
                let (major, minor) =
                    partition.map_or((7, *number), |number| (259, bound.number * 256 + number));
                text.push_str(&format!("1 1 {major}:{minor} / {} rw - fs dev rw\n", path.display()));
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

    /// Another program attaches a loop device as the file of another one.
    pub fn stack_on(&self, number: u32) -> u32 {
        let stacked = self.attach_elsewhere(0);
        self.change_number(stacked, |bound| bound.backing_file = format!("/dev/loop{number}").into_bytes());
        self.open_elsewhere(number);
        stacked
    }

    /// Changes whether the device goes at its last close; it does not go now.
    pub fn set_autoclear(&self, number: u32, autoclear: bool) {
        if let Some(bound) = self.lock().bound.get_mut(&number) {
            bound.autoclear = autoclear;
        }
    }

    /// The backing file of a device does not answer from now on.
    pub fn hang(&self, number: u32) {
        self.lock().hung.insert(number);
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

    /// The device is taken down, whoever holds it.
    pub fn take_down(&self, number: u32) {
        let mut machine = self.lock();
        let Some(Bound { sequence, .. }) = machine.bound.remove(&number) else { return };
        machine.last_sequence += 1;
        machine.uevents.push(Happened { number, sequence, ..Happened::default() });
    }

    /// Another program calls `LOOP_CLR_FD`.
    pub fn detach_elsewhere(&self, number: u32) {
        self.change_number(number, |bound| bound.autoclear = true);
    }

    fn change_number(&self, number: u32, change: impl FnOnce(&mut Bound)) {
        self.alter(number, |_| true, change);
    }

    /// Changes a device, and takes it down where that was its last close.
    pub(super) fn alter(&self, number: u32, meant: impl Fn(&Bound) -> bool, change: impl FnOnce(&mut Bound)) {
        self.news.notify_one();
        let mut guard = self.lock();
        let machine = &mut *guard;
        let Some(bound) = machine.bound.get_mut(&number).filter(|bound| meant(bound)) else { return };
        let before = bound.mounts.len();
        change(bound);
        let sequence = bound.sequence;
        machine.mount_changes += u64::from(before != bound.mounts.len());
        if bound.autoclear
            && bound.holds + bound.deposits == 0
            && bound.openers == 0
            && bound.mounts.is_empty()
        {
            machine.bound.remove(&number);
            machine.last_sequence += 1;
            machine.uevents.push(Happened { number, sequence, ..Happened::default() });
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
                machine.uevents.push(Happened {
                    number,
                    partition: Some(partition + 1),
                    sequence,
                    ..Happened::default()
                });
            }
            bound.partitions = bound.partitions.max(machine.partitions);
        }
        let partitions: Vec<_> =
            nodes(bound).into_iter().map(|node| Partition { node, ..Partition::default() }).collect();
        machine.partitions_read += partitions.len();
        Partitioning { partitions, ..Partitioning::default() }
    }

    /// One step: takes its time, and may be made to fail.
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
            Interference::Fail => Err(Error::new(ErrorKind::Kernel, format!("step {number} fails"))),
        }
    }

    /// A moment at which something else may happen.
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

    /// The effect is there, and the daemon was not told of it yet.
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
    fn emit(&self, happened: &Happened) -> Uevent {
        let found = found(happened.sequence);
        // udev cannot probe a partition that was made anew since.
        let bound = self.bound.get(&happened.number);
        let stale =
            happened.partition.is_some() && bound.is_some_and(|bound| bound.instance >= happened.uevent);
        Uevent {
            number: happened.number,
            partition: happened.partition,
            removed: happened.removed,
            disk_sequence: Some(happened.sequence),
            processed: Some(if stale { ProbeResult::default() } else { found }),
            resized: false,
        }
    }

    pub(super) fn free_number(&self) -> u32 {
        (0..)
            .find(|number| !self.bound.contains_key(number) && !self.claimed.contains(number))
            .expect("there are numbers left")
    }

    pub(super) fn bind(&mut self, number: u32, file: u64, autoclear: bool) -> DiskSequence {
        self.last_sequence += 1;
        let sequence = DiskSequence(self.last_sequence);
        self.bound.insert(
            number,
            Bound {
                number,
                partition_scan: false,
                offset: 0,
                size_limit: 0,
                backing_file: Vec::new(),
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
                deposits: 0,
                openers: 0,
                mounts: Vec::new(),
            },
        );
        self.uevents.push(Happened { number, sequence, ..Happened::default() });
        sequence
    }

    pub(super) fn device(&self, number: u32) -> Option<Device> {
        let bound = self.bound.get(&number)?;
        Some(Device {
            number,
            device_number: (7, number),
            disk_sequence: bound.sequence,
            backing_inode: bound.file,
            autoclear: bound.autoclear,
            partition_scan: bound.partition_scan,
            offset: bound.offset,
            size_limit: bound.size_limit,
            backing_file: bound.backing_file.clone(),
            read_only: bound.read_only,
            direct_io: bound.direct_io,
            block_size: bound.block_size,
            mark: bound.mark,
            ..Device::default()
        })
    }
}
