//! A kernel made of maps, for the engine's tests: it can be slow, busy, racy and full, fails where
//! a test wants it to, and keeps the loop driver's rules.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use loopd_common::{Error, ErrorKind, Lifetime};
use tokio::sync::Notify;

use super::mount_table::MountTable;
use crate::kernel::{
    Attached, Change, Device, DiskSequence, FileFacts, FileIdentity, FileKind, FileSystem, Found, Glance,
    Kernel, Occasion, Partition, PartitionNode, Partitioning, Users,
};
use crate::{AttachRequest, Uevent};

/// The simulated machine; clones are the same machine.
#[derive(Clone, Default)]
pub struct Simulated {
    machine: Arc<Mutex<Machine>>,
    /// Woken when there may be an event or another mount table.
    news: Arc<Notify>,
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
struct Machine {
    bound: BTreeMap<u32, Bound>,
    claimed: Vec<u32>,
    /// Devices that nobody can mount.
    exclusive: Vec<u32>,
    last_sequence: u64,
    uevents: Uevents,
    /// Partitions in every image.
    partitions: u32,
    /// How often a partition's node was looked at.
    partitions_read: usize,
    /// How often a device was looked at.
    looks: usize,
    steps: usize,
    hook: Option<Hook>,
    random: Option<fastrand::Rng>,
    /// How often a mount came or went.
    mount_changes: u64,
    /// Whether each call takes time before and after its effect.
    unhurried: bool,
    /// How many calls are suspended.
    pausing: usize,
    /// Called at each moment of an unhurried machine at which something else may happen.
    watcher: Option<Watcher>,
    udev_runs: bool,
    scans_itself: bool,
    removed_nodes: Vec<u32>,
    /// Whom another daemon has set a number up for.
    set_up_for: BTreeMap<u32, u32>,
    untrusted: BTreeSet<DiskSequence>,
    /// Whether a service manager keeps copies of holds.
    vault: bool,
    /// Whether the daemon is dead: what it still tries has no effect.
    dead: bool,
}

#[derive(Default)]
struct Uevents {
    untold: VecDeque<Happened>,
    last: u64,
}

impl Uevents {
    fn push(&mut self, happened: Happened) -> u64 {
        self.last += 1;
        self.untold.push_back(Happened { uevent: self.last, ..happened });
        self.last
    }
}

#[derive(Default)]
struct Happened {
    uevent: u64,
    number: u32,
    partition: Option<u32>,
    sequence: DiskSequence,
    removed: bool,
}

fn found(sequence: DiskSequence) -> Found {
    let file_system = FileSystem { kind: format!("fs{sequence}"), ..FileSystem::default() };
    Found { file_system, has_table: true, ..Found::default() }
}

fn nodes(bound: &Bound) -> Vec<PartitionNode> {
    (1..=bound.partitions).map(|number| partition_node(bound, number)).collect()
}

fn partition_node(bound: &Bound, number: u32) -> PartitionNode {
    PartitionNode { number, device_number: (259, bound.number * 256 + number), start: 0, size: 512 }
}

#[derive(Debug)]
struct Bound {
    number: u32,
    partition_scan: bool,
    offset: u64,
    read_only: bool,
    direct_io: bool,
    block_size: u32,
    /// Partitions that have nodes.
    partitions: u32,
    /// The event before they were made.
    instance: u64,
    sequence: DiskSequence,
    /// The sequence that the attach gave it.
    attach: DiskSequence,
    file: u64,
    mark: u64,
    autoclear: bool,
    /// Descriptors of the daemon.
    holds: usize,
    /// Copies of them in the service manager's store.
    deposits: usize,
    /// Descriptors of other programs.
    openers: usize,
    /// Each with the partition that is mounted.
    mounts: Vec<(Option<u32>, PathBuf)>,
}

/// A kept descriptor.
pub struct Hold {
    machine: Simulated,
    number: u32,
    attach: DiskSequence,
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
    machine: Simulated,
    number: u32,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.machine.lock().claimed.retain(|number| *number != self.number);
    }
}

/// Devices that nobody can mount while it lives.
pub struct Claims {
    machine: Simulated,
    numbers: Vec<u32>,
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

    fn lock(&self) -> MutexGuard<'_, Machine> {
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
        Some(machine.tell(&happened))
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
    fn alter(&self, number: u32, meant: impl Fn(&Bound) -> bool, change: impl FnOnce(&mut Bound)) {
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

    fn make_partitions(&self, number: u32, sequence: DiskSequence, occasion: Occasion) -> Partitioning {
        self.news.notify_one();
        let mut machine = self.lock();
        let machine = &mut *machine;
        let Some(bound) = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence) else {
            return Partitioning::default();
        };
        if occasion != Occasion::Foreign {
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
    async fn answer(&self) {
        if self.lock().unhurried {
            self.pause().await;
            if self.is_dead() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Machine {
    fn tell(&self, happened: &Happened) -> Uevent {
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
            processed: Some(if stale { Found::default() } else { found }),
            resized: false,
        }
    }

    fn free_number(&self) -> u32 {
        (0..)
            .find(|number| !self.bound.contains_key(number) && !self.claimed.contains(number))
            .expect("there are numbers left")
    }

    fn bind(&mut self, number: u32, file: u64, autoclear: bool) -> DiskSequence {
        self.last_sequence += 1;
        let sequence = DiskSequence(self.last_sequence);
        self.bound.insert(
            number,
            Bound {
                number,
                partition_scan: false,
                offset: 0,
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

    fn device(&self, number: u32) -> Option<Device> {
        let bound = self.bound.get(&number)?;
        Some(Device {
            number,
            device_number: (7, number),
            disk_sequence: bound.sequence,
            backing_inode: bound.file,
            autoclear: bound.autoclear,
            partition_scan: bound.partition_scan,
            offset: bound.offset,
            read_only: bound.read_only,
            direct_io: bound.direct_io,
            block_size: bound.block_size,
            mark: bound.mark,
            ..Device::default()
        })
    }
}

impl Kernel for Simulated {
    type File = u64;
    type Hold = Hold;
    type Claim = Claim;
    type Claims = Claims;

    async fn examine(&self, file: &u64) -> Result<FileFacts, Error> {
        self.step().await?;
        Ok(FileFacts {
            kind: FileKind::Regular,
            path: Vec::new(),
            identity: FileIdentity { device: 0, inode: *file },
            writable: true,
            appends: false,
            only_root_writes: true,
        })
    }

    async fn attach(&self, file: u64, request: &AttachRequest) -> Result<Attached<Self>, Error> {
        let number = {
            let mut machine = self.lock();
            let number = request.number.unwrap_or_else(|| machine.free_number());
            machine.claimed.push(number);
            number
        };
        let claim = Claim { machine: self.clone(), number };
        self.step().await?;
        let held = request.lifetime != Lifetime::Persistent;
        let (device, sequence) = {
            self.news.notify_one();
            let mut machine = self.lock();
            if machine.bound.contains_key(&number) {
                return Err(Error::new(ErrorKind::Busy, "taken"));
            }
            let sequence = machine.bind(number, file, held);
            if request.untrusted {
                machine.untrusted.insert(sequence);
            }
            let vault = machine.vault;
            if let Some(bound) = machine.bound.get_mut(&number) {
                bound.holds = usize::from(held);
                bound.deposits = usize::from(held && vault);
                bound.partition_scan = request.partition_scan;
                bound.offset = request.offset;
                bound.read_only = request.read_only;
                bound.mark = request.mark;
            }
            (machine.device(number).expect("it was just attached"), sequence)
        };
        let hold = held.then(|| Hold { machine: self.clone(), number, attach: sequence });
        self.answer().await;
        let missing = request.partition_scan && self.lock().partitions > 0;
        let partitioning = Partitioning { missing, ..Partitioning::default() };
        Ok(Attached { device, hold, partitioning, claim, node_made: request.number.is_some() })
    }

    async fn release(&self, hold: Hold) {
        // A close cannot fail, but what happens meanwhile may.
        let _interfered = self.step().await;
        self.alter(hold.number, |bound| bound.attach == hold.attach, |bound| bound.deposits = 0);
        drop(hold);
        self.answer().await;
    }

    fn has_left(&self, disk_sequence: DiskSequence) -> bool {
        self.lock().bound.values().any(|bound| bound.sequence == disk_sequence && bound.deposits > 0)
    }

    async fn release_unclaimed(&self, except: &HashSet<DiskSequence>) {
        let _interfered = self.step().await;
        for number in self.bound_numbers() {
            let is_unclaimed = |bound: &Bound| bound.holds == 0 && !except.contains(&bound.sequence);
            self.alter(number, is_unclaimed, |bound| bound.deposits = 0);
        }
    }

    async fn hold(&self, number: u32, sequence: DiskSequence) -> Result<Option<Hold>, Error> {
        self.step().await?;
        let hold = {
            let mut machine = self.lock();
            let vault = machine.vault;
            let bound = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence);
            bound.map(|bound| {
                bound.holds += 1;
                bound.deposits = usize::from(vault);
                Hold { machine: self.clone(), number, attach: bound.attach }
            })
        };
        self.answer().await;
        Ok(hold)
    }

    async fn clear(&self, number: u32, sequence: DiskSequence) -> Result<(), Error> {
        self.step().await?;
        let clear = |bound: &mut Bound| (bound.autoclear, bound.deposits) = (true, 0);
        self.alter(number, |bound| bound.sequence == sequence, clear);
        self.answer().await;
        Ok(())
    }

    async fn change(
        &self,
        number: u32,
        sequence: DiskSequence,
        change: Change,
    ) -> Result<Option<Device>, Error> {
        self.step().await?;
        self.alter(
            number,
            |bound| bound.sequence == sequence,
            |bound| match change {
                Change::Autoclear(autoclear) => bound.autoclear = autoclear,
                Change::DirectIo(on) => bound.direct_io = on,
                Change::BlockSize(bytes) => bound.block_size = bytes,
                Change::Capacity => {}
            },
        );
        let device = self.lock().device(number).filter(|device| device.disk_sequence == sequence);
        self.answer().await;
        Ok(device)
    }

    fn distrust(&self, sequence: DiskSequence) -> Result<(), Error> {
        self.lock().untrusted.insert(sequence);
        Ok(())
    }

    async fn replace(
        &self,
        number: u32,
        sequence: DiskSequence,
        file: u64,
        untrusted: bool,
    ) -> Result<Option<Device>, Error> {
        self.step().await?;
        self.news.notify_one();
        let replaced = {
            let mut guard = self.lock();
            let machine = &mut *guard;
            let next = DiskSequence(machine.last_sequence + 1);
            let bound = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence);
            bound.map(|bound| {
                (bound.sequence, bound.file) = (next, file);
                machine.last_sequence += 1;
                if untrusted {
                    machine.untrusted.insert(next);
                }
                machine.uevents.push(Happened { number, sequence: next, ..Happened::default() });
                next
            })
        };
        // The world may see the new sequence before the engine does.
        self.step().await.ok();
        // Its descriptor is open: what it tells of is no other attach.
        let device = self.lock().device(number);
        Ok(device.filter(|device| Some(device.disk_sequence) == replaced))
    }

    async fn free_number(&self) -> Result<u32, Error> {
        self.step().await?;
        Ok(self.lock().free_number())
    }

    async fn remove_device(&self, number: u32) -> Result<(), Error> {
        self.step().await?;
        let mut machine = self.lock();
        if machine.bound.contains_key(&number) {
            return Err(Error::new(ErrorKind::Busy, "attached"));
        }
        machine.removed_nodes.push(number);
        Ok(())
    }

    async fn status(&self, number: u32) -> Result<Option<Device>, Error> {
        self.step().await?;
        Ok(self.lock().device(number))
    }

    fn stored(&self, number: u32, partition: Option<u32>) -> Option<Found> {
        let machine = self.lock();
        let bound = machine.bound.get(&number)?;
        partition.is_none_or(|partition| partition <= bound.partitions).then(|| found(bound.sequence))
    }

    async fn partition(
        &self,
        number: u32,
        sequence: DiskSequence,
        occasion: Occasion,
    ) -> Result<Partitioning, Error> {
        self.step().await?;
        let seen = self.make_partitions(number, sequence, occasion);
        self.answer().await;
        Ok(seen)
    }

    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode> {
        let mut machine = self.lock();
        let nodes = machine.bound.get(&number).map(nodes).unwrap_or_default();
        machine.partitions_read += nodes.len();
        nodes
    }

    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode> {
        let mut machine = self.lock();
        machine.partitions_read += 1;
        let bound = machine.bound.get(&number).filter(|bound| (1..=bound.partitions).contains(&partition))?;
        Some(partition_node(bound, partition))
    }

    fn scans_itself(&self) -> bool {
        self.lock().scans_itself
    }

    async fn stored_of(&self, number: u32, partitions: Vec<Option<u32>>) -> Vec<(Option<u32>, Found)> {
        // A look cannot fail, but what happens in the meantime may.
        let _interfered = self.step().await;
        let stored = |partition| Some((partition, self.stored(number, partition)?));
        partitions.into_iter().filter_map(stored).collect()
    }

    async fn users(&self, number: u32) -> Result<Users, Error> {
        self.step().await?;
        let machine = self.lock();
        let mounts = machine.bound.get(&number).map(|bound| &bound.mounts[..]).unwrap_or_default();
        let mount_points = mounts.iter().map(|(_, path)| path.clone()).collect();
        Ok(Users { mount_points, holders: Vec::new() })
    }

    async fn read(&self, _: u32, _: DiskSequence, _: u64, length: usize) -> Result<Vec<u8>, Error> {
        self.step().await?;
        Ok(vec![0; length])
    }

    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error> {
        Ok(self.lock().set_up_for.get(&number).copied())
    }

    async fn btrfs(&self, _: &str) -> Result<crate::kernel::BtrfsDevices, Error> {
        Ok(crate::kernel::BtrfsDevices::default())
    }

    async fn claim_overlapping(
        &self,
        device: &Device,
        _: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        asked: String,
    ) -> Result<Claims, Error> {
        self.step().await?;
        let mut machine = self.lock();
        let mut numbers = Vec::new();
        for (number, known) in others {
            let Some(bound) = machine.bound.get(&number) else { continue };
            let may_be_the_same = known.is_none() || bound.file == device.backing_inode;
            if !may_be_the_same || (device.read_only && bound.read_only) {
                continue;
            }
            if let Some((_, path)) = bound.mounts.first() {
                let message = format!("{asked}: /dev/loop{number} is mounted on {}", path.display());
                return Err(Error::new(
                    if known.is_some() { ErrorKind::Busy } else { ErrorKind::Timeout },
                    message,
                ));
            }
            numbers.push(number);
        }
        machine.exclusive.extend(&numbers);
        Ok(Claims { machine: self.clone(), numbers })
    }

    fn mounts(&self) -> Option<MountTable> {
        Some(self.mount_table())
    }

    async fn await_rundown(&self, _: u32) {}

    async fn remove(&self, number: u32) {
        let mut machine = self.lock();
        if !machine.bound.contains_key(&number) {
            machine.removed_nodes.push(number);
        }
    }

    fn bound_numbers(&self) -> Vec<u32> {
        self.lock().bound.keys().copied().collect()
    }

    fn glance(&self, number: u32) -> Glance {
        let mut machine = self.lock();
        machine.looks += 1;
        let bound = machine.bound.get(&number).map(|bound| bound.sequence);
        Glance { bound, claimed: machine.claimed.contains(&number) }
    }

    fn udev_runs(&self) -> bool {
        self.lock().udev_runs
    }

    fn udev_is_idle(&self) -> bool {
        self.lock().uevents.untold.is_empty()
    }
}
