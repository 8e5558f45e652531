//! A machine with clients for the tests of the engine: kernel, udev, mounts and files are simulated, time is too.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{Lifetime, State};
use tokio::sync::Notify;

use crate::error::Error;
use crate::kernel::{DiskSequence, Mapping};
use crate::simulated::{Files, Interference, Simulated, SimulatedMounts};
use crate::{AttachRequest, Caller, ClientId, Engine, Event, EventStream, Settings, Snapshot};

pub type SimulatedEngine = Arc<Engine<Simulated>>;

/// A client on a simulated bus.
#[derive(Clone)]
pub struct Client {
    pub id: ClientId,
    pub uid: u32,
    pub gone: Arc<AtomicBool>,
    woken: Arc<Notify>,
}

impl Client {
    pub fn new(name: &str, uid: u32) -> Self {
        Self { id: ClientId(name.to_owned()), uid, gone: Arc::default(), woken: Arc::default() }
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub fn disconnect(&self, engine: &SimulatedEngine) {
        self.gone.store(true, Ordering::Relaxed);
        self.woken.notify_waiters();
        engine.client_disconnected(&self.id);
    }
}

impl Caller for Client {
    fn client(&self) -> &ClientId {
        &self.id
    }

    fn uid(&self) -> u32 {
        self.uid
    }

    fn is_disconnected(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    async fn disconnected(&self) {
        let woken = self.woken.notified();
        if !self.is_disconnected() {
            woken.await;
        }
    }
}

impl Client {
    pub fn again(&self) -> Self {
        Self::new(":1.9", self.uid)
    }
}

/// The attachments that the bus would show.
type Shown = Arc<Mutex<BTreeMap<DiskSequence, Snapshot>>>;

/// Applies the engine's events as the publisher does, and checks that they are consistent.
async fn follow(machine: Simulated, mut events: EventStream, shown: Shown, count: Arc<AtomicUsize>) {
    while let Some(event) = events.next().await {
        let mut shown = shown.lock().unwrap();
        count.fetch_add(usize::from(!matches!(event, Event::Checkpoint(_))), Ordering::Relaxed);
        match event {
            Event::Added(snapshot) => {
                let is_foreign = snapshot.ownership.is_none();
                let is_ours = machine.is_attached_here(snapshot.device.disk_sequence);
                assert!(!(is_foreign && is_ours), "a device of loopd's own is foreign");
                assert!(shown.insert(snapshot.id, *snapshot).is_none(), "added twice");
            }
            Event::Changed(changes) => {
                let id = changes.id;
                let known = shown.get_mut(&id);
                known.unwrap_or_else(|| panic!("changed before it was added: {id}")).apply(*changes);
            }
            Event::Removed(id) => assert!(shown.remove(&id).is_some(), "removed and not there: {id}"),
            Event::Checkpoint(done) => done.send(()).unwrap(),
        }
    }
}

/// udev and the mount table: passes each event of the machine to the engine, after a random delay.
async fn udev(machine: Simulated, engine: SimulatedEngine, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    loop {
        tokio::time::sleep(Duration::from_micros(random.u64(500..5000))).await;
        // The engine may have read the current table already.
        let mounts = machine.mount_table();
        if mounts != engine.state().mounts {
            engine.mounts_changed(mounts);
        }
        let mut lost = false;
        while let Some(event) = machine.take_uevent() {
            // One in fifty is lost, and the monitor reports that.
            if seed != 0 && random.u8(..50) == 0 {
                lost = true;
                continue;
            }
            engine.observe(event);
            if random.bool() {
                tokio::time::sleep(Duration::from_micros(random.u64(..2000))).await;
            }
        }
        while let Some(event) = machine.take_mapping_event() {
            engine.observe_mapping(&event);
        }
        if lost {
            engine.events_lost();
        }
    }
}

pub struct Harness {
    pub tasks: Mutex<tokio::task::JoinSet<()>>,
    pub machine: Simulated,
    pub engine: SimulatedEngine,
    pub mounts: SimulatedMounts,
    shown: Shown,
    /// How many events were emitted.
    pub events: Arc<AtomicUsize>,
    /// Whether udev's next event comes late.
    pub late: Arc<AtomicBool>,
}

impl Harness {
    pub fn new(machine: Simulated) -> Self {
        let files = Files::on(&machine);
        Self::with_files(machine, files)
    }

    pub fn with_files(machine: Simulated, files: Files) -> Self {
        let mounts = files.mounts.clone();
        // Shorter than the default: the simulated udev polls.
        let settings = Settings { mount_grace: Duration::from_secs(3), ..Settings::default() };
        let mounter = Box::new(mounts.clone());
        let (engine, events) =
            Engine::new(machine.clone(), settings, Box::new(files), mounter, Box::new(machine.clone()));
        let (shown, mut tasks) = (Shown::default(), tokio::task::JoinSet::new());
        let count = Arc::<AtomicUsize>::default();
        tasks.spawn(follow(machine.clone(), events, Arc::clone(&shown), Arc::clone(&count)));
        Self { tasks: Mutex::new(tasks), machine, engine, mounts, shown, events: count, late: Arc::default() }
    }

    pub fn with_udev() -> Self {
        let harness = Self::new(Simulated::new());
        harness.start_udev(0);
        harness
    }

    pub fn with_random_udev(seed: u64) -> Self {
        let harness = Self::new(Simulated::random(seed));
        harness.start_udev(0);
        harness
    }

    /// Starts udev, which runs until the harness is dropped.
    pub fn start_udev(&self, seed: u64) {
        let udev = udev(self.machine.clone(), Arc::clone(&self.engine), seed);
        self.tasks.lock().unwrap().spawn(udev);
    }

    pub async fn attach(&self, client: &Client, lifetime: Lifetime) -> Result<Snapshot, Error> {
        self.attach_with(client, AttachRequest { lifetime, ..AttachRequest::default() }).await
    }

    pub async fn attach_with(&self, client: &Client, request: AttachRequest) -> Result<Snapshot, Error> {
        self.engine.attach(1.into(), request, client).await
    }

    /// Makes a step fail, counted from 1 from now on. The result becomes true when the step is reached.
    pub fn fail_at(&self, failing: usize) -> Arc<AtomicBool> {
        let reached = Arc::new(AtomicBool::new(false));
        let (seen, before) = (Arc::clone(&reached), self.machine.steps());
        self.machine.interfere(move |step| {
            if step != before + failing {
                return Interference::None;
            }
            seen.store(true, Ordering::Relaxed);
            Interference::Fail
        });
        reached
    }

    /// Waits until all operations and events have been processed.
    pub async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        self.engine.flush_events().await;
    }

    /// Checks that the engine, the machine and the bus agree.
    pub fn agree(&self) {
        let bound: Vec<_> =
            self.machine.bound().into_iter().map(|(number, sequence, _)| (number, sequence)).collect();
        let list = self.engine.list();
        let listed: Vec<_> = list.iter().map(|a| (a.device.number, a.device.disk_sequence)).collect();
        assert_eq!(listed, bound, "the engine and the kernel");
        let mut shown: Vec<_> = self.shown.lock().unwrap().values().cloned().collect();
        shown.sort_unstable_by_key(|attachment| attachment.device.number);
        assert_eq!(shown.len(), list.len(), "the bus and the engine");
        for (shown, listed) in shown.iter().zip(&list) {
            assert_eq!(shown, listed, "the bus and the engine");
        }
        for attachment in list {
            let number = attachment.device.number;
            let held = attachment.state == State::Attached
                && attachment
                    .ownership
                    .as_ref()
                    .is_some_and(|ownership| ownership.lifetime != Lifetime::Persistent);
            assert_eq!(self.machine.holds(number), usize::from(held), "descriptors of /dev/loop{number}");
            self.agree_on_cleartexts(&attachment, held);
        }
    }

    /// The engine and the machine agree on the cleartexts of an attachment, which are held if it is.
    fn agree_on_cleartexts(&self, attachment: &Snapshot, is_held: bool) {
        let number = attachment.device.number;
        let is_ours = |mapping: &Mapping| mapping.name.starts_with("loopd-");
        let mut mapped = self.machine.mappings_on(number);
        mapped.retain(|(_, mapping)| is_ours(mapping));
        mapped.sort_by_key(|(partition, _)| *partition);
        let known: Vec<_> = {
            let state = self.engine.state();
            let cleartexts = state.records.get(&attachment.id).unwrap().cleartexts.iter();
            cleartexts.map(|(partition, cleartext)| (*partition, cleartext.mapping.clone())).collect()
        };
        assert_eq!(known, mapped, "the cleartexts of /dev/loop{number}");
        for ((_, mapping), saved) in mapped.iter().zip(&attachment.saved_cleartexts) {
            let is_held = is_held && !saved.closing;
            let (holds, copies) = (usize::from(is_held), usize::from(is_held && self.machine.keeps_holds()));
            assert_eq!(
                self.machine.mapping_holds(mapping.number),
                Some((holds, copies, is_held || saved.closing)),
                "descriptors of {} ({}) of {:?}, their copies, and whether it is closed by itself",
                mapping.node(),
                mapping.name,
                attachment.ownership
            );
        }
    }

    pub async fn assert_empty(&self) {
        self.settle().await;
        assert_eq!(self.machine.bound(), []);
        self.agree();
        assert!(self.engine.state().records.values().next().is_none());
        assert_eq!(self.mounts.directories(), Vec::<PathBuf>::new());
        assert!(self.engine.mount_quota.is_empty() && self.engine.cleartext_quota.is_empty());
        self.engine.attachment_quota.empty().await;
    }
}

impl Harness {
    pub async fn agree_after_flush(&self) {
        self.engine.flush_events().await;
        self.agree();
    }
}
