//! The daemon dies, at every step and in the middle of storms, and another one takes up what it has
//! left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::mount_simulation::{SimulatedMounts, wanted, whole};
use super::restore::{Kept, Store};
use super::simulation::{Client, House, calm};
use super::*;
use crate::simulated::{Interference, Simulated};

/// A file that only other programs attach.
const ELSEWHERE: u64 = 99;
/// A file that is shown in the place of another.
const ANOTHER: u64 = 2;
/// The file of what is mounted: the same bytes are not mounted twice.
const MOUNTED: u64 = 5;

/// Files on a simulated machine: they outlive the daemon, and it may die as it writes one.
#[derive(Clone)]
pub struct Files {
    machine: Simulated,
    files: Arc<Mutex<BTreeMap<DiskSequence, Kept>>>,
    announced: Arc<Mutex<Vec<u64>>>,
    places: Arc<Mutex<BTreeMap<PathBuf, Place>>>,
    /// What the service manager has mounted, and the folders for that.
    pub mounts: SimulatedMounts,
    /// How many writes from now on the daemon dies, and whether that one is done before.
    death: Arc<Mutex<Option<(usize, bool)>>>,
}

impl Files {
    pub fn on(machine: &Simulated) -> Self {
        Self {
            machine: machine.clone(),
            files: Arc::default(),
            announced: Arc::default(),
            places: Arc::default(),
            mounts: SimulatedMounts::on(machine),
            death: Arc::default(),
        }
    }

    /// What is written of attachments.
    pub fn kept(&self) -> Vec<Kept> {
        self.read()
    }

    /// The marks that are announced.
    pub fn marks(&self) -> Vec<u64> {
        self.announced()
    }

    /// What is written of folders.
    pub fn folders(&self) -> Vec<Place> {
        self.read_places()
    }

    fn die_at(&self, write: usize, done: bool) {
        *self.death.lock().unwrap() = Some((write, done));
    }

    /// Does this, unless the daemon is dead.
    fn change(&self, change: impl FnOnce(&Self)) {
        self.machine.moment();
        self.change_unless_dead(change);
        self.machine.moment();
    }

    fn change_unless_dead(&self, change: impl FnOnce(&Self)) {
        let mut death = self.death.lock().unwrap();
        let dies = match &mut *death {
            Some((0, done)) => Some(*done),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        if !self.machine.is_dead() && dies != Some(false) {
            change(self);
        }
        if dies.is_some() {
            *death = None;
            self.machine.die();
        }
    }
}

impl Store for Files {
    fn write(&self, kept: &Kept) -> Result<(), Error> {
        self.change(|all| drop(all.files.lock().unwrap().insert(kept.id, kept.clone())));
        Ok(())
    }

    fn erase(&self, id: DiskSequence) {
        self.change(|all| assert!(all.files.lock().unwrap().remove(&id).is_some(), "{id} was never written"));
    }

    fn read(&self) -> Vec<Kept> {
        self.files.lock().unwrap().values().cloned().collect()
    }

    fn announce(&self, mark: u64) -> Result<(), Error> {
        self.change(|all| all.announced.lock().unwrap().push(mark));
        Ok(())
    }

    fn retract(&self, mark: u64) {
        self.change(|all| all.announced.lock().unwrap().retain(|announced| *announced != mark));
    }

    fn announced(&self) -> Vec<u64> {
        self.announced.lock().unwrap().clone()
    }

    fn write_place(&self, place: &Place) -> Result<(), Error> {
        self.change(|all| drop(all.places.lock().unwrap().insert(place.path.clone(), place.clone())));
        Ok(())
    }

    fn erase_place(&self, path: &Path) {
        self.change(|all| drop(all.places.lock().unwrap().remove(path)));
    }

    fn read_places(&self) -> Vec<Place> {
        self.places.lock().unwrap().values().cloned().collect()
    }
}

/// What a daemon does from its start until it dies; `None` where it died before it was done.
pub(super) fn life<T>(machine: &Simulated, files: &Files, body: impl AsyncFnOnce(&House) -> T) -> Option<T> {
    machine.revive();
    *files.death.lock().unwrap() = None;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    runtime.block_on(async {
        let house = House::with_files(machine.clone(), files.clone());
        let death = async {
            while !machine.is_dead() {
                tokio::time::sleep(Duration::from_micros(50)).await;
            }
        };
        tokio::select! {
            biased;
            () = death => None,
            done = body(&house) => Some(done),
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
enum Deed {
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

const DEEDS: [Deed; 15] = [
    Deed::Replace,
    Deed::ReplaceBound,
    Deed::Mount,
    Deed::Unmount,
    Deed::Attach(Lifetime::Mount),
    Deed::Attach(Lifetime::Client),
    Deed::Attach(Lifetime::Persistent),
    Deed::Detach,
    Deed::DetachPersistent,
    Deed::DetachLazily,
    Deed::DetachMountedLazily,
    Deed::DetachBusy,
    Deed::LetStay,
    Deed::BindToClient,
    Deed::Vanish,
];

/// What there was before the deed, and what the deed has made.
#[derive(Clone)]
struct Before {
    bound: Snapshot,
    persistent: Snapshot,
    mounted: Snapshot,
    attached: Option<Snapshot>,
    done: bool,
    /// As the first daemon left it.
    written: Vec<Kept>,
}

#[test]
fn whatever_the_daemon_dies_over_the_next_one_has_it_right() {
    for vault in [true, false] {
        for deed in DEEDS {
            let mut last = (0, 0);
            for step in 1.. {
                last.0 = step;
                if dies_over(deed, Death::Step(step), vault) {
                    break;
                }
            }
            for write in 0.. {
                last.1 = write;
                let done = [false, true].map(|done| dies_over(deed, Death::Write(write, done), vault));
                if done == [true, true] {
                    break;
                }
            }
            let nothing_to_die_over = last.0 <= 1 && last.1 < 1;
            assert!(!nothing_to_die_over, "{deed:?} has neither steps nor writes");
        }
    }
}

/// Says whether the deed was done before the daemon died.
fn dies_over(deed: Deed, death: Death, vault: bool) -> bool {
    println!("{deed:?}, {death:?}, vault {vault}");
    let machine = Simulated::new();
    if vault {
        machine.keep_holds();
    }
    let files = Files::on(&machine);
    let (client, other) = (Client::new(":1.1", 7), Client::new(":1.2", 8));
    let before = Arc::new(Mutex::new(None));
    let noted = Arc::clone(&before);
    let done = life(&machine, &files, async |house| {
        house.start_udev(0);
        let bound = house.attach(&client, Lifetime::Client).await.unwrap();
        let persistent = house.attach(&client, Lifetime::Persistent).await.unwrap();
        let request = AttachRequest::default();
        let mounted = house.engine.attach(Order { file: MOUNTED, request }, &client).await.unwrap();
        machine.mount(mounted.device.number);
        house.settle().await;
        if deed == Deed::Unmount {
            house.engine.mount(whole(&persistent), &wanted(), &client).await.unwrap();
        }
        let there = Before { bound, persistent, mounted, attached: None, done: false, written: Vec::new() };
        *noted.lock().unwrap() = Some(there.clone());
        death.arm(&machine, &files);
        let attached = commit(deed, house, &client, &other, &there).await;
        // The dead give no answer.
        if let Some(before) = noted.lock().unwrap().as_mut().filter(|_| !machine.is_dead()) {
            before.attached = attached;
            before.done = true;
        }
        house.settle().await;
    });
    let mut before = before.lock().unwrap().take().unwrap();
    before.written = files.read();
    machine.die();
    life(&machine, &files, async |house| {
        house.engine.restore(living([client.clone(), other.clone()])).await;
        house.engine.resync().await;
        // Its events wait until the daemon listens.
        house.start_udev(0);
        house.settle().await;
        check(deed, house, &files, &before, vault);
        machine.unmount(before.mounted.device.number);
        machine.unmount(before.persistent.device.number);
        calm(house, &[client.clone(), other.clone()]).await;
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
        assert!(files.announced().is_empty());
    })
    .expect("the second one lives");
    done.is_some()
}

/// What the bus says of these.
pub(super) fn living(
    clients: impl Into<Vec<Client>>,
) -> impl Fn(ClientId) -> std::future::Ready<bool> + Clone + Send + Sync + 'static {
    let clients = clients.into();
    move |id| std::future::ready(clients.iter().any(|client| client.id == id && !client.vanished()))
}

async fn commit(
    deed: Deed,
    house: &House,
    client: &Client,
    other: &Client,
    before: &Before,
) -> Option<Snapshot> {
    let engine = &house.engine;
    match deed {
        Deed::Attach(lifetime) => return Some(house.attach(other, lifetime).await.unwrap()),
        Deed::Detach => engine.detach(before.bound.id, false).await.unwrap(),
        Deed::DetachPersistent => engine.detach(before.persistent.id, false).await.unwrap(),
        Deed::DetachLazily => engine.detach(before.persistent.id, true).await.unwrap(),
        Deed::DetachMountedLazily => engine.detach(before.mounted.id, true).await.unwrap(),
        Deed::DetachBusy => drop(engine.detach(before.mounted.id, false).await.unwrap_err()),
        Deed::LetStay => engine.set_lifetime(before.bound.id, Lifetime::Persistent, client).await.unwrap(),
        Deed::BindToClient => {
            engine.set_lifetime(before.persistent.id, Lifetime::Client, client).await.unwrap();
        }
        Deed::Vanish => client.vanish(engine),
        Deed::Mount => drop(engine.mount(whole(&before.persistent), &wanted(), client).await.unwrap()),
        Deed::Unmount => engine.unmount(whole(&before.persistent), false, client.uid, false).await.unwrap(),
        Deed::Replace => engine.replace_backing_file(before.persistent.id, ANOTHER, 0).await.unwrap(),
        Deed::ReplaceBound => engine.replace_backing_file(before.bound.id, ANOTHER, 0).await.unwrap(),
    }
    None
}

/// The second daemon has what the first one had promised, and nothing else.
fn check(deed: Deed, house: &House, files: &Files, before: &Before, vault: bool) {
    house.agree();
    let list = house.engine.list();
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
    match deed {
        // It may have come so far or not.
        Deed::Detach if before.done => gone(&before.bound),
        Deed::Detach => {}
        Deed::Vanish => gone(&before.bound),
        Deed::LetStay if vault || before.done => rebound(&before.bound, Lifetime::Persistent),
        // The kernel may have been told already, and nothing was written.
        Deed::LetStay => {}
        _ if vault => unchanged(&before.bound),
        _ => gone(&before.bound),
    }
    match deed {
        Deed::DetachPersistent | Deed::DetachLazily if before.done => gone(&before.persistent),
        Deed::DetachPersistent | Deed::DetachLazily => {}
        Deed::BindToClient if vault => rebound(&before.persistent, Lifetime::Client),
        Deed::BindToClient if before.done => gone(&before.persistent),
        Deed::BindToClient => {}
        _ => unchanged(&before.persistent),
    }
    match deed {
        Deed::Vanish => assert_eq!(find(&before.mounted).map(|found| found.state), Some(State::Detaching)),
        Deed::DetachMountedLazily if before.done => {
            assert_eq!(find(&before.mounted).map(|found| found.state), Some(State::Detaching));
        }
        Deed::DetachMountedLazily => assert!(find(&before.mounted).is_some()),
        _ => unchanged(&before.mounted),
    }
    let replaced = |snapshot: &Snapshot| {
        let file = find(snapshot).map(|found| found.device.backing_inode);
        assert!(file == Some(ANOTHER) || !before.done, "{file:?}");
    };
    match deed {
        Deed::Replace => replaced(&before.persistent),
        Deed::ReplaceBound if vault => replaced(&before.bound),
        _ => {}
    }
    let known = [&before.bound, &before.persistent, &before.mounted];
    let new: Vec<_> = list.iter().filter(|found| known.iter().all(|known| known.id != found.id)).collect();
    match &before.attached {
        Some(attached) if vault || deed == Deed::Attach(Lifetime::Persistent) => {
            unchanged(attached);
            assert_eq!(new.len(), 1);
        }
        // Nobody was told that it was attached, or there is nothing to keep it; but the first daemon
        // may have been about to tell.
        _ => {
            let about_to_tell =
                |id| before.written.iter().any(|kept| kept.id == id && kept.phase == Phase::Attached);
            assert!(new.iter().all(|found| about_to_tell(found.id)), "left behind: {new:?}");
        }
    }
    check_places(deed, house, files, before);
    let written: Vec<_> = files.read().iter().map(|kept| kept.id).collect();
    let ours = list.iter().filter(|found| found.ownership.is_some());
    let mut listed: Vec<_> = ours.map(|found| found.id).collect();
    listed.sort_unstable();
    assert_eq!(written, listed);
    for found in &list {
        let number = found.device.number;
        let holds = house.machine.holds(number);
        assert_eq!(house.machine.deposits(number), if vault { holds } else { 0 }, "/dev/loop{number}");
    }
}

/// The folders are those that something is mounted on, and all of them are known.
fn check_places(deed: Deed, house: &House, files: &Files, before: &Before) {
    let folders = files.mounts.folders();
    let known: Vec<_> = files.read_places().into_iter().map(|place| place.path).collect();
    assert_eq!(folders, known);
    let table = house.machine.mount_table();
    assert!(folders.iter().all(|folder| table.has(folder)), "{folders:?}");
    match deed {
        Deed::Mount if before.done => assert_eq!(folders.len(), 1),
        Deed::Unmount if before.done => assert!(folders.is_empty(), "{folders:?}"),
        // It may have come so far or not.
        Deed::Mount | Deed::Unmount => {}
        _ => assert!(folders.is_empty(), "{folders:?}"),
    }
}

/// `LOOPD_STORMS` sets how many storms there are; each names its seed where it fails.
#[test]
fn storms_with_deaths_lose_nothing() {
    let storms = std::env::var("LOOPD_STORMS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 1..=storms {
        println!("storm {seed}");
        Storm::new(seed).blow();
    }
}

/// What the clients of a storm were told, and may rely on.
struct Storm {
    random: fastrand::Rng,
    machine: Simulated,
    files: Files,
    clients: Vec<Client>,
    promised: Arc<Mutex<BTreeMap<DiskSequence, Snapshot>>>,
    vault: bool,
    names: usize,
}

impl Storm {
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

    fn blow(mut self) {
        let (machine, files) = (self.machine.clone(), self.files.clone());
        for _ in 0..6 {
            life(&machine, &files, async |house| {
                self.take_up(house).await;
                match self.random.u8(..3) {
                    0 => Death::Step(self.random.usize(1..60)).arm(&machine, &files),
                    1 => {
                        let done = self.random.bool();
                        Death::Write(self.random.usize(..30), done).arm(&machine, &files);
                    }
                    _ => {}
                }
                self.rage(house).await;
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
        life(&machine, &files, async |house| {
            self.take_up(house).await;
            calm(house, &self.clients).await;
        })
        .expect("the last one lives");
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
        assert!(files.announced().is_empty());
    }

    /// Another daemon starts: everything that was promised is there, and nothing that nobody knows.
    async fn take_up(&self, house: &House) {
        house.engine.restore(living(self.clients.clone())).await;
        house.engine.resync().await;
        house.start_udev(0);
        house.settle().await;
        house.agree();
        let list = house.engine.list();
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

    async fn rage(&mut self, house: &House) {
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
                    let engine = Arc::clone(&house.engine);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await
                            && attachment.ownership.is_some()
                        {
                            let _gone = engine.replace_backing_file(attachment.id, ANOTHER, 0).await;
                        }
                    });
                }
                12 => {
                    let engine = Arc::clone(&house.engine);
                    tasks.spawn(async move {
                        if let Ok(attachment) = engine.locate(number).await {
                            let _busy_or_gone = engine.mount(whole(&attachment), &wanted(), &client).await;
                        }
                    });
                }
                13 => {
                    let engine = Arc::clone(&house.engine);
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
                    let order = Order { file: 1, request };
                    let (engine, promised) = (Arc::clone(&house.engine), Arc::clone(&self.promised));
                    let machine = self.machine.clone();
                    tasks.spawn(async move {
                        if let Ok(snapshot) = engine.attach(order, &client).await
                            && !(client.vanished() && lifetime == Lifetime::Client)
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
                    let (engine, lazy) = (Arc::clone(&house.engine), self.random.bool());
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
                        client.vanish(&house.engine);
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
