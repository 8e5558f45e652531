//! The daemon dies, at every step and in the middle of runs, and another one adopts what it has
//! left.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use super::random_calls::end_everything;
use crate::kernel::DiskSequence;
use crate::simulated::{Files, Interference, Simulated};
use crate::{AttachRequest, Caller as _, ClientId, Phase, SavedAttachment, Snapshot, Store as _};

/// A file that only other programs attach.
const ELSEWHERE: u64 = 99;
/// A file that is shown in the place of another.
const ANOTHER: u64 = 2;
/// The file of what is mounted: the same bytes are not mounted twice.
const MOUNTED: u64 = 5;

/// What a daemon does from its start until it dies; `None` if it died before it was done.
pub fn run_daemon<T>(machine: &Simulated, files: &Files, body: impl AsyncFnOnce(&Harness) -> T) -> Option<T> {
    machine.revive();
    files.stay_alive();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    runtime.block_on(async {
        let harness = Harness::with_files(machine.clone(), files.clone());
        let death = async {
            while !machine.is_dead() {
                tokio::time::sleep(Duration::from_micros(50)).await;
            }
        };
        tokio::select! {
            biased;
            () = death => None,
            done = body(&harness) => Some(done),
        }
    })
    // Everything that the daemon has begun ends here.
}

/// When the daemon dies.
#[derive(Clone, Copy, Debug)]
enum Death {
    Step(usize),
    Write(usize, bool),
}

impl Death {
    fn arm(self, machine: &Simulated, files: &Files) {
        match self {
            Self::Write(write, done) => files.die_at(write, done),
            Self::Step(step) => {
                let mut steps = 0;
                machine.interfere(move |_| {
                    steps += 1;
                    if steps == step { Interference::Die } else { Interference::None }
                });
            }
        }
    }
}

/// What is asked of a daemon that dies over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Attach(Lifetime),
    Detach,
    DetachPersistent,
    DetachLazily,
    DetachMountedLazily,
    DetachBusy,
    LetStay,
    BindToClient,
    Vanish,
    Mount,
    Unmount,
    Replace,
    ReplaceBound,
}

const OPERATIONS: [Operation; 15] = [
    Operation::Replace,
    Operation::ReplaceBound,
    Operation::Mount,
    Operation::Unmount,
    Operation::Attach(Lifetime::Mount),
    Operation::Attach(Lifetime::Client),
    Operation::Attach(Lifetime::Persistent),
    Operation::Detach,
    Operation::DetachPersistent,
    Operation::DetachLazily,
    Operation::DetachMountedLazily,
    Operation::DetachBusy,
    Operation::LetStay,
    Operation::BindToClient,
    Operation::Vanish,
];

/// What there was before the operation, and what the operation has made.
#[derive(Clone)]
struct Before {
    bound: Snapshot,
    persistent: Snapshot,
    mounted: Snapshot,
    attached: Option<Snapshot>,
    done: bool,
    /// As the first daemon left it.
    written: Vec<SavedAttachment>,
}

#[test]
fn a_daemon_that_dies_at_any_step_loses_nothing() {
    for vault in [true, false] {
        for operation in OPERATIONS {
            let mut last = (0, 0);
            for step in 1.. {
                last.0 = step;
                if dies_during(operation, Death::Step(step), vault) {
                    break;
                }
            }
            for write in 0.. {
                last.1 = write;
                let done = [false, true].map(|done| dies_during(operation, Death::Write(write, done), vault));
                if done == [true, true] {
                    break;
                }
            }
            let nothing_to_die_over = last.0 <= 1 && last.1 < 1;
            assert!(!nothing_to_die_over, "{operation:?} has neither steps nor writes");
        }
    }
}

/// Says whether the operation was done before the daemon died.
fn dies_during(operation: Operation, death: Death, vault: bool) -> bool {
    println!("{operation:?}, {death:?}, vault {vault}");
    let machine = Simulated::new();
    if vault {
        machine.keep_holds();
    }
    let files = Files::on(&machine);
    let (client, other) = (Client::new(":1.1", 7), Client::new(":1.2", 8));
    let before = Arc::new(Mutex::new(None));
    let noted = Arc::clone(&before);
    let done = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let bound = harness.attach(&client, Lifetime::Client).await.unwrap();
        let persistent = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        let request = AttachRequest::default();
        let mounted = harness.engine.attach(MOUNTED, request, &client).await.unwrap();
        machine.mount(mounted.device.number);
        harness.settle().await;
        if operation == Operation::Unmount {
            harness.engine.mount(whole(&persistent), &wanted(), &client).await.unwrap();
        }
        let there = Before { bound, persistent, mounted, attached: None, done: false, written: Vec::new() };
        *noted.lock().unwrap() = Some(there.clone());
        death.arm(&machine, &files);
        let attached = commit(operation, harness, &client, &other, &there).await;
        harness.engine.flush_events().await;
        // The dead give no answer.
        if let Some(before) = noted.lock().unwrap().as_mut().filter(|_| !machine.is_dead()) {
            before.attached = attached;
            before.done = true;
        }
        harness.settle().await;
    });
    let mut before = before.lock().unwrap().take().unwrap();
    before.written = files.read();
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([client.clone(), other.clone()])).await;
        harness.engine.resync().await;
        // Its events wait until the daemon listens.
        harness.start_udev(0);
        harness.settle().await;
        check(operation, harness, &files, &before, vault);
        machine.unmount(before.mounted.device.number);
        machine.unmount(before.persistent.device.number);
        end_everything(harness, &[client.clone(), other.clone()]).await;
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
        assert!(files.announced().is_empty());
    })
    .expect("the second one lives");
    done.is_some()
}

/// What the bus says of these.
pub fn connected(
    clients: impl Into<Vec<Client>>,
) -> impl Fn(ClientId) -> std::future::Ready<bool> + Clone + Send + Sync + 'static {
    let clients = clients.into();
    move |id| std::future::ready(clients.iter().any(|client| client.id == id && !client.is_disconnected()))
}

async fn commit(
    operation: Operation,
    harness: &Harness,
    client: &Client,
    other: &Client,
    before: &Before,
) -> Option<Snapshot> {
    let engine = &harness.engine;
    match operation {
        Operation::Attach(lifetime) => return Some(harness.attach(other, lifetime).await.unwrap()),
        Operation::Detach => engine.detach(before.bound.id, false).await.unwrap(),
        Operation::DetachPersistent => engine.detach(before.persistent.id, false).await.unwrap(),
        Operation::DetachLazily => engine.detach(before.persistent.id, true).await.unwrap(),
        Operation::DetachMountedLazily => engine.detach(before.mounted.id, true).await.unwrap(),
        Operation::DetachBusy => drop(engine.detach(before.mounted.id, false).await.unwrap_err()),
        Operation::LetStay => {
            engine.set_lifetime(before.bound.id, Lifetime::Persistent, client).await.unwrap()
        }
        Operation::BindToClient => {
            engine.set_lifetime(before.persistent.id, Lifetime::Client, client).await.unwrap();
        }
        Operation::Vanish => client.vanish(engine),
        Operation::Mount => drop(engine.mount(whole(&before.persistent), &wanted(), client).await.unwrap()),
        Operation::Unmount => {
            engine.unmount(whole(&before.persistent), false, client.uid, false).await.unwrap()
        }
        Operation::Replace => engine.replace_backing_file(before.persistent.id, ANOTHER, 0).await.unwrap(),
        Operation::ReplaceBound => engine.replace_backing_file(before.bound.id, ANOTHER, 0).await.unwrap(),
    }
    None
}

/// The second daemon has what the first one had promised, and nothing else.
fn check(operation: Operation, harness: &Harness, files: &Files, before: &Before, vault: bool) {
    harness.agree();
    let list = harness.engine.list();
    let find = |snapshot: &Snapshot| list.iter().find(|found| found.id == snapshot.id);
    let unchanged = |snapshot: &Snapshot| {
        let found = find(snapshot).unwrap_or_else(|| panic!("{} is gone", snapshot.id));
        assert_eq!((&found.ownership, found.state), (&snapshot.ownership, State::Attached));
        assert_eq!(found.partitions, snapshot.partitions);
    };
    let gone = |snapshot: &Snapshot| assert_eq!(find(snapshot), None);
    let rebound = |snapshot: &Snapshot, lifetime: Lifetime| {
        let found = find(snapshot).unwrap_or_else(|| panic!("{} is gone", snapshot.id));
        let now = found.ownership.as_ref().map(|ownership| ownership.lifetime);
        assert!(now == Some(lifetime) || !before.done, "{found:?}");
        assert_eq!(found.state, State::Attached);
    };
    match operation {
        // It may have come so far or not.
        Operation::Detach if before.done => gone(&before.bound),
        Operation::Detach => {}
        Operation::Vanish => gone(&before.bound),
        Operation::LetStay if vault || before.done => rebound(&before.bound, Lifetime::Persistent),
        // The kernel may have made the change already, and nothing was saved.
        Operation::LetStay => {}
        _ if vault => unchanged(&before.bound),
        _ => gone(&before.bound),
    }
    match operation {
        Operation::DetachPersistent | Operation::DetachLazily if before.done => gone(&before.persistent),
        Operation::DetachPersistent | Operation::DetachLazily => {}
        Operation::BindToClient if vault => rebound(&before.persistent, Lifetime::Client),
        Operation::BindToClient if before.done => gone(&before.persistent),
        Operation::BindToClient => {}
        _ => unchanged(&before.persistent),
    }
    match operation {
        Operation::Vanish => {
            assert_eq!(find(&before.mounted).map(|found| found.state), Some(State::Detaching))
        }
        Operation::DetachMountedLazily if before.done => {
            assert_eq!(find(&before.mounted).map(|found| found.state), Some(State::Detaching));
        }
        Operation::DetachMountedLazily => assert!(find(&before.mounted).is_some()),
        _ => unchanged(&before.mounted),
    }
    let replaced = |snapshot: &Snapshot| {
        let file = find(snapshot).map(|found| found.device.backing_inode);
        assert!(file == Some(ANOTHER) || !before.done, "{file:?}");
    };
    match operation {
        Operation::Replace => replaced(&before.persistent),
        Operation::ReplaceBound if vault => replaced(&before.bound),
        _ => {}
    }
    let known = [&before.bound, &before.persistent, &before.mounted];
    let new: Vec<_> = list.iter().filter(|found| known.iter().all(|known| known.id != found.id)).collect();
    match &before.attached {
        Some(attached) if vault || operation == Operation::Attach(Lifetime::Persistent) => {
            unchanged(attached);
            assert_eq!(new.len(), 1);
        }
        // It was not published, or nothing keeps it; but the first daemon may have been about to publish it.
        _ => {
            let about_to_tell =
                |id| before.written.iter().any(|saved| saved.id == id && saved.phase == Phase::Attached);
            assert!(new.iter().all(|found| about_to_tell(found.id)), "left behind: {new:?}");
        }
    }
    check_places(operation, harness, files, before);
    let written: Vec<_> = files.read().iter().map(|saved| saved.id).collect();
    let ours = list.iter().filter(|found| found.ownership.is_some());
    let mut listed: Vec<_> = ours.map(|found| found.id).collect();
    listed.sort_unstable();
    assert_eq!(written, listed);
    for found in &list {
        let number = found.device.number;
        let holds = harness.machine.holds(number);
        assert_eq!(harness.machine.deposits(number), if vault { holds } else { 0 }, "/dev/loop{number}");
    }
}

/// The folders are those that something is mounted on, and all of them are known.
fn check_places(operation: Operation, harness: &Harness, files: &Files, before: &Before) {
    let folders = files.mounts.folders();
    let known: Vec<_> = files.read_mount_directories().into_iter().map(|directory| directory.path).collect();
    assert_eq!(folders, known);
    let table = harness.machine.mount_table();
    assert!(folders.iter().all(|folder| table.has(folder)), "{folders:?}");
    match operation {
        Operation::Mount if before.done => assert_eq!(folders.len(), 1),
        Operation::Unmount if before.done => assert!(folders.is_empty(), "{folders:?}"),
        // It may have come so far or not.
        Operation::Mount | Operation::Unmount => {}
        _ => assert!(folders.is_empty(), "{folders:?}"),
    }
}

/// `LOOPD_RANDOM_RUNS` sets how many runs there are; each names its seed if it fails.
#[test]
fn random_calls_with_deaths_lose_nothing() {
    let runs = std::env::var("LOOPD_RANDOM_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 1..=runs {
        println!("run {seed}");
        RandomRun::new(seed).run();
    }
}

/// The replies and events of a run, on which its clients rely.
struct RandomRun {
    random: fastrand::Rng,
    machine: Simulated,
    files: Files,
    clients: Vec<Client>,
    promised: Arc<Mutex<BTreeMap<DiskSequence, Snapshot>>>,
    vault: bool,
    names: usize,
}

impl RandomRun {
    fn new(seed: u64) -> Self {
        let machine = Simulated::random(seed);
        let vault = !seed.is_multiple_of(3);
        if vault {
            machine.keep_holds();
        }
        Self {
            random: fastrand::Rng::with_seed(seed),
            files: Files::on(&machine),
            machine,
            clients: Vec::new(),
            promised: Arc::default(),
            vault,
            names: 0,
        }
    }

    fn break_promise(&self, broken: impl Fn(&Snapshot) -> bool) {
        self.promised.lock().unwrap().retain(|_, snapshot| !broken(snapshot));
    }

    fn client_leaves(&mut self) -> Option<Client> {
        let leaving = self.random.usize(..self.clients.len().max(1));
        let client = (leaving < self.clients.len()).then(|| self.clients.swap_remove(leaving))?;
        client.gone.store(true, Ordering::Relaxed);
        let bound_to = |snapshot: &Snapshot| {
            snapshot.ownership.as_ref().is_some_and(|ownership| ownership.client.as_ref() == Some(&client.id))
        };
        self.break_promise(bound_to);
        Some(client)
    }

    fn run(mut self) {
        let (machine, files) = (self.machine.clone(), self.files.clone());
        for _ in 0..6 {
            run_daemon(&machine, &files, async |harness| {
                self.adopt_saved(harness).await;
                match self.random.u8(..3) {
                    0 => Death::Step(self.random.usize(1..60)).arm(&machine, &files),
                    1 => {
                        let done = self.random.bool();
                        Death::Write(self.random.usize(..30), done).arm(&machine, &files);
                    }
                    _ => {}
                }
                self.make_calls(harness).await;
            });
            machine.die();
            if !self.vault {
                let is_bound = |snapshot: &Snapshot| {
                    snapshot.ownership.as_ref().is_some_and(|o| o.lifetime == Lifetime::Client)
                };
                self.break_promise(is_bound);
            }
            if self.random.bool() {
                self.client_leaves();
            }
        }
        run_daemon(&machine, &files, async |harness| {
            self.adopt_saved(harness).await;
            end_everything(harness, &self.clients).await;
        })
        .expect("the last one lives");
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
        assert!(files.announced().is_empty());
    }

    /// Another daemon starts: every attachment that was promised exists, and no unknown one.
    async fn adopt_saved(&self, harness: &Harness) {
        harness.engine.restore(connected(self.clients.clone())).await;
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        harness.agree();
        let list = harness.engine.list();
        for (id, promised) in &*self.promised.lock().unwrap() {
            let found = list.iter().find(|found| found.id == *id).unwrap_or_else(|| panic!("{id} is gone"));
            assert_eq!((&found.ownership, found.state), (&promised.ownership, State::Attached), "{id}");
        }
        let is_orphan =
            |found: &&Snapshot| found.ownership.is_none() && found.device.backing_inode != ELSEWHERE;
        let orphans: Vec<_> = list.iter().filter(is_orphan).map(|found| found.id).collect();
        assert!(orphans.is_empty(), "{orphans:?} have lost their owners");
        for found in &list {
            let Some(ownership) = &found.ownership else { continue };
            let is_over = ownership.lifetime == Lifetime::Client
                && !self.clients.iter().any(|client| Some(&client.id) == ownership.client.as_ref());
            assert!(!is_over || found.state == State::Detaching, "{} outlives its client", found.id);
        }
    }

    async fn make_calls(&mut self, harness: &Harness) {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..150 {
            while self.clients.len() < 4 {
                self.names += 1;
                self.clients.push(Client::new(&format!(":1.{}", self.names), 1000 + self.random.u32(..3)));
            }
            let client = self.clients[self.random.usize(..self.clients.len())].clone();
            let number = self.random.u32(..8);
            let of_number = |snapshot: &Snapshot| snapshot.device.number == number;
            match self.random.u8(..15) {
                14 => {
                    let engine = Arc::clone(&harness.engine);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await
                            && attachment.ownership.is_some()
                        {
                            let _gone = engine.replace_backing_file(attachment.id, ANOTHER, 0).await;
                        }
                    });
                }
                12 => {
                    let engine = Arc::clone(&harness.engine);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await {
                            let _busy_or_gone = engine.mount(whole(&attachment), &wanted(), &client).await;
                        }
                    });
                }
                13 => {
                    let engine = Arc::clone(&harness.engine);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await {
                            let _not_mounted =
                                engine.unmount(whole(&attachment), false, client.uid, false).await;
                        }
                    });
                }
                0..=4 => {
                    let lifetime = if self.random.bool() { Lifetime::Client } else { Lifetime::Persistent };
                    let wait = self.random.bool();
                    let request = AttachRequest { lifetime, wait, ..AttachRequest::default() };
                    let (engine, promised) = (Arc::clone(&harness.engine), Arc::clone(&self.promised));
                    let machine = self.machine.clone();
                    tasks.spawn(async move {
                        let attached = engine.attach(1, request, &client).await;
                        engine.flush_events().await;
                        if let Ok(snapshot) = attached
                            && !(client.is_disconnected() && lifetime == Lifetime::Client)
                            && !machine.is_dead()
                            // Another program may have detached it before the answer came.
                            && !(lifetime == Lifetime::Persistent && machine.goes_at_last_close(&snapshot.device))
                        {
                            promised.lock().unwrap().insert(snapshot.id, snapshot);
                        }
                    });
                }
                5..=6 => {
                    self.break_promise(of_number);
                    let (engine, lazy) = (Arc::clone(&harness.engine), self.random.bool());
                    let promised = Arc::clone(&self.promised);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await {
                            promised.lock().unwrap().remove(&attachment.id);
                            let _busy_or_gone = engine.detach(attachment.id, lazy).await;
                        }
                    });
                }
                7 => self.machine.mount(number),
                8 => self.machine.unmount(number),
                9 => {
                    if let Some(client) = self.client_leaves() {
                        client.vanish(&harness.engine);
                    }
                }
                10 => drop(self.machine.attach_elsewhere(ELSEWHERE)),
                _ => {
                    self.break_promise(of_number);
                    self.machine.detach_elsewhere(number);
                }
            }
            tokio::time::sleep(Duration::from_micros(self.random.u64(..4000))).await;
        }
        if self.random.bool() {
            while tasks.join_next().await.is_some() {}
        }
    }
}
