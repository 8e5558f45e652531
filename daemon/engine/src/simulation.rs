//! The engine on a simulated kernel: every step fails in turn, clients vanish at every step, and
//! storms of random calls leave the two in agreement. Time is simulated too.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, Overlap, State};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;

use super::attachment::partitions_shown;
use super::crash::Files;
use super::mount_simulation::{SimulatedMounts, wanted, whole};
use super::*;

mod act;
pub(super) mod clock;
mod pairs;
mod promises;
mod random;
mod scene;

use crate::simulated::{Interference, Simulated};

pub(super) type SimulatedEngine = Arc<Engine<Simulated>>;

/// A client on a simulated bus.
#[derive(Clone)]
pub(super) struct Client {
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

    pub fn vanish(&self, engine: &SimulatedEngine) {
        self.gone.store(true, Ordering::Relaxed);
        self.woken.notify_waiters();
        engine.client_vanished(&self.id);
    }
}

impl Caller for Client {
    fn client(&self) -> &ClientId {
        &self.id
    }

    fn uid(&self) -> u32 {
        self.uid
    }

    fn vanished(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    async fn gone(&self) {
        let woken = self.woken.notified();
        if !self.vanished() {
            woken.await;
        }
    }
}

/// What the bus would show.
type Shown = Arc<Mutex<BTreeMap<DiskSequence, Snapshot>>>;

/// Follows the engine's events as the bus room does, and checks that they make sense.
async fn follow(mut events: UnboundedReceiver<Event>, shown: Shown, count: Arc<AtomicUsize>) {
    while let Some(event) = events.recv().await {
        let mut shown = shown.lock().unwrap();
        count.fetch_add(usize::from(!matches!(event, Event::Checkpoint(_))), Ordering::Relaxed);
        match event {
            Event::Added(snapshot) => {
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

/// udev and the mount table: hands every event of the machine to the engine, some time later.
async fn udev(machine: Simulated, engine: SimulatedEngine, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    loop {
        tokio::time::sleep(Duration::from_micros(random.u64(500..5000))).await;
        // What came and went since the last look was seen by the engine, if it looked in between.
        let mounts = machine.mount_table();
        if mounts != engine.state().mounts {
            engine.mounts_changed(mounts);
        }
        let mut lost = false;
        while let Some(event) = machine.take_uevent() {
            // One in fifty is lost; the monitor notices and asks for a look at everything.
            if seed != 0 && random.u8(..50) == 0 {
                lost = true;
                continue;
            }
            engine.observe(event);
            if random.bool() {
                tokio::time::sleep(Duration::from_micros(random.u64(..2000))).await;
            }
        }
        if lost {
            engine.events_lost();
        }
    }
}

pub(super) struct House {
    tasks: Mutex<tokio::task::JoinSet<()>>,
    pub machine: Simulated,
    pub engine: SimulatedEngine,
    pub mounts: SimulatedMounts,
    shown: Shown,
    /// How much the world was told.
    events: Arc<AtomicUsize>,
    /// Whether udev's next event comes late.
    late: Arc<AtomicBool>,
}

impl House {
    fn new(machine: Simulated) -> Self {
        let files = Files::on(&machine);
        Self::with_files(machine, files)
    }

    pub fn with_files(machine: Simulated, files: Files) -> Self {
        let mounts = files.mounts.clone();
        // Shorter than by default: the simulated udev looks around all the time.
        let settings = Settings { mount_grace: Duration::from_secs(3), ..Settings::default() };
        let mounter = Box::new(mounts.clone());
        let (engine, events) = Engine::new(machine.clone(), settings, Box::new(files), mounter);
        let (shown, mut tasks) = (Shown::default(), tokio::task::JoinSet::new());
        let count = Arc::<AtomicUsize>::default();
        tasks.spawn(follow(events, Arc::clone(&shown), Arc::clone(&count)));
        Self { tasks: Mutex::new(tasks), machine, engine, mounts, shown, events: count, late: Arc::default() }
    }

    pub fn with_udev() -> Self {
        let house = Self::new(Simulated::new());
        house.start_udev(0);
        house
    }

    pub fn with_random_udev(seed: u64) -> Self {
        let house = Self::new(Simulated::random(seed));
        house.start_udev(0);
        house
    }

    /// udev runs for as long as the house stands.
    pub fn start_udev(&self, seed: u64) {
        let udev = udev(self.machine.clone(), Arc::clone(&self.engine), seed);
        self.tasks.lock().unwrap().spawn(udev);
    }

    pub async fn attach(&self, client: &Client, lifetime: Lifetime) -> Result<Snapshot, Error> {
        self.attach_with(client, AttachRequest { lifetime, ..AttachRequest::default() }).await
    }

    pub async fn attach_with(&self, client: &Client, request: AttachRequest) -> Result<Snapshot, Error> {
        let order = Order { file: 1, request };
        self.engine.attach(order, client).await
    }

    /// Has this step fail, counted from the machine's start on; tells whether it was reached.
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

    /// Lets everything that is under way come to its end.
    pub async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        self.engine.told().await;
    }

    /// The engine, the machine and the bus agree.
    pub fn agree(&self) {
        let bound: Vec<_> =
            self.machine.bound().into_iter().map(|(number, sequence, _)| (number, sequence)).collect();
        let list = self.engine.list();
        let listed: Vec<_> = list.iter().map(|a| (a.device.number, a.device.disk_sequence)).collect();
        assert_eq!(listed, bound, "the engine and the kernel");
        let mut shown: Vec<_> = self.shown.lock().unwrap().values().cloned().collect();
        shown.sort_unstable_by_key(|attachment| attachment.device.number);
        assert_eq!(shown, list, "the bus and the engine");
        for attachment in list {
            let number = attachment.device.number;
            let held = attachment.state == State::Attached
                && attachment
                    .ownership
                    .as_ref()
                    .is_some_and(|ownership| ownership.lifetime != Lifetime::Persistent);
            assert_eq!(self.machine.holds(number), usize::from(held), "descriptors of /dev/loop{number}");
        }
    }

    pub async fn assert_empty(&self) {
        self.settle().await;
        assert_eq!(self.machine.bound(), []);
        self.agree();
        assert!(self.engine.state().records.is_empty());
        assert_eq!(self.mounts.folders(), Vec::<PathBuf>::new());
        assert!(self.engine.mounts_of_a_uid.is_empty());
        self.engine.attachments_of_a_uid.empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_attach_is_shown_and_ends_with_its_client() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attached = house.attach(&client, Lifetime::Client).await.unwrap();
    assert_eq!(attached.file_system.kind, format!("fs{}", attached.id), "it waited for udev");
    house.engine.told().await;
    house.agree();
    client.vanish(&house.engine);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn every_step_fails_in_turn_and_is_undone() {
    for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
        for failing in 1.. {
            let house = House::with_udev();
            house
                .machine
                .interfere(move |step| if step == failing { Interference::Fail } else { Interference::None });
            let client = Client::new(":1.1", 7);
            match house.attach(&client, lifetime).await {
                Ok(_) => {
                    assert!(failing > 1, "no step failed");
                    break;
                }
                Err(error) => assert_eq!(error.kind, ErrorKind::Kernel),
            }
            house.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_vanishes_at_any_step_leaves_nothing() {
    for wait in [true, false] {
        for vanishing in 1.. {
            let house = House::with_udev();
            let client = Client::new(":1.1", 7);
            let reached = Arc::new(AtomicBool::new(false));
            let (seen, leaving, engine) = (Arc::clone(&reached), client.clone(), Arc::clone(&house.engine));
            house.machine.interfere(move |step| {
                if step == vanishing {
                    seen.store(true, Ordering::Relaxed);
                    leaving.vanish(&engine);
                }
                Interference::None
            });
            let request = AttachRequest { wait, ..AttachRequest::default() };
            let attached = house.attach_with(&client, request).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(vanishing > 1 && attached.is_ok(), "the client never vanished");
                break;
            }
            assert_eq!(attached.unwrap_err().kind, ErrorKind::AccessDenied);
            house.assert_empty().await;
        }
    }
}

/// The steps above are the kernel's; this vanishes at every moment between them as well.
#[tokio::test(start_paused = true)]
async fn a_client_that_vanishes_at_any_moment_leaves_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        for moment in 0..120 {
            let house = House::new(Simulated::random(moment));
            house.start_udev(0);
            let client = Client::new(":1.1", 7);
            let (leaving, engine) = (client.clone(), Arc::clone(&house.engine));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(moment * 80)).await;
                leaving.vanish(&engine);
            });
            let attached = house.attach(&client, lifetime).await;
            house.settle().await;
            match attached {
                // It was attached before the client went, and does not end with it.
                Ok(attached) if lifetime == Lifetime::Persistent => {
                    house.engine.detach(attached.id, false).await.unwrap();
                }
                _ => {}
            }
            house.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_what_is_bound_to_the_client_ends_with_it() {
    let house = House::with_udev();
    let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
    let _ends = house.attach(&first, Lifetime::Client).await.unwrap();
    let _ends_too = house.attach(&first, Lifetime::Client).await.unwrap();
    let persistent = house.attach(&first, Lifetime::Persistent).await.unwrap();
    let others = house.attach(&second, Lifetime::Client).await.unwrap();
    first.vanish(&house.engine);
    house.settle().await;
    let left: Vec<_> = house.engine.list().iter().map(|attachment| attachment.id).collect();
    assert_eq!(left, [persistent.id, others.id]);
    house.agree();
    second.vanish(&house.engine);
    house.engine.detach(persistent.id, false).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_mounted_outlives_its_client_until_it_is_unmounted() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attached = house.attach(&client, Lifetime::Client).await.unwrap();
    house.machine.mount(attached.device.number);
    client.vanish(&house.engine);
    house.settle().await;
    assert_eq!(house.engine.find(attached.id).unwrap().state, State::Detaching);
    house.agree();
    house.machine.unmount(attached.device.number);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_busy_device_stays_as_it_was() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let house = House::with_udev();
        let client = Client::new(":1.1", 7);
        let attached = house.attach(&client, lifetime).await.unwrap();
        let before = house.machine.bound();
        let number = attached.device.number;

        house.machine.mount(number);
        let error = house.engine.detach(attached.id, false).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains("mounted on /mnt"), "{error}");
        house.machine.unmount(number);

        house.machine.open_elsewhere(number);
        let error = house.engine.detach(attached.id, false).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains("opened by a process"), "{error}");
        house.engine.told().await;
        house.agree();
        assert_eq!(house.machine.bound(), before);

        let (machine, engine) = (house.machine.clone(), Arc::clone(&house.engine));
        let passing = tokio::spawn(async move { engine.detach(attached.id, false).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        machine.close_elsewhere(number);
        passing.await.unwrap().unwrap();
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lazy_detach_ends_at_the_last_close() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let house = House::with_udev();
        let attached = house.attach(&Client::new(":1.1", 7), lifetime).await.unwrap();
        house.machine.open_elsewhere(attached.device.number);
        house.engine.detach(attached.id, true).await.unwrap();
        assert_eq!(house.engine.find(attached.id).unwrap().state, State::Detaching);
        house.machine.close_elsewhere(attached.device.number);
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_udev_nobody_waits_for_it_and_a_silent_one_is_a_timeout() {
    let house = House::new(Simulated::new());
    let client = Client::new(":1.1", 7);
    let error = house.attach(&client, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    house.assert_empty().await;
    house.machine.set_udev(false);
    let attached = house.attach(&client, Lifetime::Client).await.unwrap();
    house.engine.detach(attached.id, false).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_fails_while_in_use_is_shown_until_it_goes() {
    let house = House::new(Simulated::new());
    let (machine, client) = (house.machine.clone(), Client::new(":1.1", 7));
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        machine.open_elsewhere(0);
    });
    let error = house.attach(&client, Lifetime::Persistent).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert_eq!(house.engine.list()[0].state, State::Detaching);
    house.start_udev(0);
    house.machine.close_elsewhere(0);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_others_do_is_seen() {
    let house = House::with_udev();
    let before = house.machine.attach_elsewhere(1);
    house.engine.resync().await;
    let foreign = house.engine.list();
    assert_eq!((foreign.len(), foreign[0].ownership.as_ref()), (1, None));
    let later = house.machine.attach_elsewhere(1);
    house.settle().await;
    assert_eq!(house.engine.list().len(), 2);
    house.agree();
    house.machine.detach_elsewhere(before);
    house.settle().await;
    let located = house.engine.locate(later).await.unwrap();
    house.engine.detach(located.id, false).await.unwrap();
    assert_eq!(house.engine.locate(later).await.unwrap_err().kind, ErrorKind::NotFound);

    let ours = house.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    house.machine.detach_elsewhere(ours.device.number);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_number_that_changed_hands_is_not_taken_for_the_old_one() {
    let house = House::new(Simulated::new());
    house.machine.set_udev(false);
    let ours = house.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    house.machine.detach_elsewhere(ours.device.number);
    assert_eq!(house.machine.attach_elsewhere(1), ours.device.number);
    // No event has come yet: the handle of yesterday must not detach the device of today.
    let _gone = house.engine.detach(ours.id, false).await;
    assert_eq!(house.machine.bound().len(), 1);
    house.engine.resync().await;
    house.agree_after_telling().await;
    assert_eq!(house.engine.list()[0].ownership, None);
}

#[tokio::test(start_paused = true)]
async fn a_node_made_for_an_attach_is_removed_with_it() {
    let house = House::with_udev();
    let request = AttachRequest { number: Some(77), ..AttachRequest::default() };
    let attached = house.attach_with(&Client::new(":1.1", 7), request).await.unwrap();
    house.engine.detach(attached.id, false).await.unwrap();
    house.assert_empty().await;
    assert_eq!(house.machine.removed_nodes(), [77]);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_attach_has_all_its_partitions_and_they_stay() {
    let house = House::with_udev();
    house.machine.set_partitions(3);
    let client = Client::new(":1.1", 7);
    let attached = house.attach(&client, Lifetime::Client).await.unwrap();
    let kinds: Vec<_> =
        attached.partitions.iter().map(|partition| partition.file_system.kind.as_str()).collect();
    assert_eq!(kinds, vec![format!("fs{}", attached.id); 3], "udev has processed each of them");
    // BLKRRPART by udev or anyone else.
    house.machine.drop_partitions(attached.device.number);
    house.settle().await;
    let partitions = house.engine.find(attached.id).unwrap().partitions;
    let kinds: Vec<_> = partitions.iter().map(|partition| partition.file_system.kind.as_str()).collect();
    assert_eq!(kinds, vec![format!("fs{}", attached.id); 3], "they were made again");
    house.agree();

    let request = AttachRequest { partition_scan: false, ..AttachRequest::default() };
    assert!(house.attach_with(&client, request).await.unwrap().partitions.is_empty());
    client.vanish(&house.engine);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_can_be_changed_and_a_lazy_detach_taken_back() {
    let house = House::with_udev();
    let (owner, other) = (Client::new(":1.1", 7), Client::new(":1.2", 0));
    let attached = house.attach(&owner, Lifetime::Client).await.unwrap();
    let (id, number) = (attached.id, attached.device.number);
    house.engine.set_lifetime(id, Lifetime::Persistent, &other).await.unwrap();
    owner.vanish(&house.engine);
    house.settle().await;
    let persistent = house.engine.find(id).unwrap();
    assert!(!persistent.device.autoclear);
    assert_eq!(
        persistent.ownership.as_ref().map(|ownership| (ownership.uid, ownership.client.clone())),
        Some((7, None))
    );
    house.agree();

    house.machine.open_elsewhere(number);
    house.engine.detach(id, true).await.unwrap();
    house.engine.set_lifetime(id, Lifetime::Client, &other).await.unwrap();
    house.machine.close_elsewhere(number);
    house.settle().await;
    assert_eq!(house.engine.find(id).unwrap().state, State::Attached);
    house.agree();
    other.vanish(&house.engine);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn one_who_vanished_before_the_lifetime_was_bound_takes_it_along() {
    let house = House::with_udev();
    let owner = Client::new(":1.1", 7);
    let attached = house.attach(&owner, Lifetime::Persistent).await.unwrap();
    let (leaving, engine) = (owner.clone(), Arc::clone(&house.engine));
    house.machine.interfere(move |_| {
        leaving.vanish(&engine);
        Interference::None
    });
    house.engine.set_lifetime(attached.id, Lifetime::Client, &owner).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_that_fails_at_any_step_changes_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let other = if lifetime == Lifetime::Client { Lifetime::Persistent } else { Lifetime::Client };
        for failing in 1.. {
            let house = House::with_udev();
            let client = Client::new(":1.1", 7);
            let attached = house.attach(&client, lifetime).await.unwrap();
            let before = house.machine.bound();
            let reached = house.fail_at(failing);
            let changed = house.engine.set_lifetime(attached.id, other, &client).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(failing > 1 && changed.is_ok(), "no step failed");
                break;
            }
            house.settle().await;
            house.agree();
            if changed.is_err() {
                assert_eq!(house.engine.find(attached.id).unwrap().ownership, attached.ownership);
                assert_eq!(house.machine.bound(), before);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_others_attached_can_be_adopted() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 0);
    house.machine.attach_elsewhere(1);
    house.settle().await;
    let foreign = house.engine.list().remove(0);
    house.engine.set_lifetime(foreign.id, Lifetime::Client, &client).await.unwrap();
    house.settle().await;
    house.agree();
    client.vanish(&house.engine);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn udev_is_told_of_what_users_other_than_root_have_chosen() {
    let house = House::with_udev();
    let (user, root) = (Client::new(":1.1", 7), Client::new(":1.2", 0));
    let is_untrusted = |id| {
        let sequence = house.engine.find(id).unwrap().device.disk_sequence;
        house.machine.is_untrusted(sequence)
    };
    let of_user = house.attach(&user, Lifetime::Client).await.unwrap().id;
    let of_root = house.attach(&root, Lifetime::Client).await.unwrap().id;
    assert!(is_untrusted(of_user) && !is_untrusted(of_root));
    house.engine.replace_backing_file(of_user, 2, 0).await.unwrap();
    house.engine.replace_backing_file(of_root, 2, 0).await.unwrap();
    assert!(is_untrusted(of_user) && !is_untrusted(of_root), "replaced by root");
    house.engine.replace_backing_file(of_root, 3, 7).await.unwrap();
    assert!(is_untrusted(of_root), "replaced by a user");
    for (client, expected) in [(&root, false), (&user, true)] {
        let number = house.machine.attach_elsewhere(9);
        house.settle().await;
        let foreign = house.engine.list().into_iter().find(|shown| shown.device.number == number).unwrap();
        house.engine.set_lifetime(foreign.id, Lifetime::Client, client).await.unwrap();
        assert_eq!(is_untrusted(foreign.id), expected, "adopted");
    }
    user.vanish(&house.engine);
    root.vanish(&house.engine);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_replaced_file_keeps_its_object() {
    for moment in 0..60 {
        let house = House::new(Simulated::random(moment));
        house.start_udev(0);
        let client = Client::new(":1.1", 7);
        let attached = house.attach(&client, Lifetime::Client).await.unwrap();
        house.engine.replace_backing_file(attached.id, 2, 0).await.unwrap();
        house.settle().await;
        let replaced = house.engine.find(attached.id).unwrap();
        assert_eq!(replaced.device.backing_inode, 2);
        assert!(replaced.device.disk_sequence.0 > attached.device.disk_sequence.0);
        assert_eq!(replaced.file_system.kind, format!("fs{}", replaced.device.disk_sequence));
        house.agree();
        client.vanish(&house.engine);
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_is_not_attached_twice_where_that_is_not_wanted() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let with = |overlap, offset| AttachRequest {
        overlap,
        offset,
        lifetime: Lifetime::Persistent,
        ..AttachRequest::default()
    };
    // All at once: one attaches, the others find it.
    let mut attaches = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (engine, client) = (Arc::clone(&house.engine), client.clone());
        let request = with(Overlap::Reuse, 0);
        attaches.spawn(async move { engine.attach(Order { file: 1, request }, &client).await.unwrap().id });
    }
    let ids: HashSet<_> = attaches.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    for request in [with(Overlap::Refuse, 0), with(Overlap::Reuse, 512)] {
        let error = house.attach_with(&client, request).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Overlap, "{error}");
    }
    let id = *ids.iter().next().unwrap();
    house.machine.open_elsewhere(0);
    house.engine.detach(id, true).await.unwrap();
    let stranger = Client::new(":1.2", 8);
    let error = house.attach_with(&stranger, with(Overlap::Reuse, 0)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overlap, "a detach of others is not taken back");
    let reused = house.attach_with(&client, with(Overlap::Reuse, 0)).await.unwrap();
    assert_eq!((reused.id, reused.state), (id, State::Attached));
    house.machine.close_elsewhere(0);
    house.settle().await;
    house.agree();
    house.engine.detach(id, false).await.unwrap();

    // One that no event has told of yet.
    house.machine.attach_elsewhere(1);
    let error = house.attach_with(&client, with(Overlap::Refuse, 0)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overlap);
}

/// Another user could show other bytes on such a device while the one that it is given to reads it.
#[tokio::test(start_paused = true)]
async fn a_device_that_others_can_change_is_not_given_back() {
    let (root, owner, stranger) = (Client::new(":1.1", 0), Client::new(":1.2", 7), Client::new(":1.3", 8));
    let reuse = || AttachRequest {
        overlap: Overlap::Reuse,
        lifetime: Lifetime::Persistent,
        ..AttachRequest::default()
    };
    for (first, given, refused) in [(&owner, &owner, vec![&root, &stranger]), (&root, &stranger, vec![])] {
        let house = House::with_udev();
        let id = house.attach_with(first, reuse()).await.unwrap().id;
        for other in refused {
            let error = house.attach_with(other, reuse()).await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Overlap);
            assert!(error.message.contains("it belongs to user 7"), "{error}");
        }
        assert_eq!(house.attach_with(given, reuse()).await.unwrap().id, id);
        let other_blocks = AttachRequest { block_size: 4096, ..reuse() };
        let error = house.attach_with(given, other_blocks).await.unwrap_err();
        assert!(error.message.contains("block size"), "{error}");
        house.engine.detach(id, false).await.unwrap();
    }
    // What another daemon has set up for a user is foreign to loopd, and that user's anyway.
    for (uid, is_given) in [(0, true), (7, false)] {
        let house = House::with_udev();
        let number = house.machine.set_up(1, uid);
        let reused = house.attach_with(&root, reuse()).await;
        assert_eq!(reused.is_ok_and(|reused| reused.device.number == number), is_given, "uid {uid}");
    }
}

/// Linux 6.1 reads the table anew while udev probes the partitions of the first reading.
#[tokio::test(start_paused = true)]
async fn a_waiting_attach_waits_for_partitions_that_are_made_anew() {
    for moment in 0..100 {
        let house = House::new(Simulated::random(moment));
        house.start_udev(0);
        house.machine.set_partitions(2);
        house.machine.set_scans_itself();
        let machine = house.machine.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 150)).await;
            machine.reread_partitions(0);
        });
        let client = Client::new(":1.1", 7);
        let attached = house.attach(&client, Lifetime::Client).await.unwrap();
        let kinds = |attached: &Snapshot| -> Vec<_> {
            attached.partitions.iter().map(|partition| partition.file_system.kind.clone()).collect()
        };
        assert_eq!(kinds(&attached), vec![format!("fs{}", attached.id); 2], "moment {moment}");
        house.settle().await;
        assert_eq!(kinds(&house.engine.find(attached.id).unwrap()), kinds(&attached), "moment {moment}");
        house.agree();
        client.vanish(&house.engine);
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_uid_cannot_take_everything() {
    let house = House::with_udev();
    let greedy = Client::new(":1.1", 7);
    let limit = Settings::default().attachments.each;
    for _ in 0..limit {
        house.attach(&greedy, Lifetime::Client).await.unwrap();
    }
    let error = house.attach(&greedy, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LimitExceeded);
    house.attach(&Client::new(":1.2", 8), Lifetime::Client).await.unwrap();
    greedy.vanish(&house.engine);
    house.settle().await;
    assert_eq!(house.engine.list().len(), 1);
    house.attach(&greedy.again(), Lifetime::Client).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn partitions_count_against_their_owner() {
    let house = House::with_udev();
    let settings = Settings { partitions: Limits { each: 100, all: 150 }, ..Settings::default() };
    house.engine.configure(settings);
    house.machine.set_partitions(60);
    let (user, other, root) = (Client::new(":1.1", 7), Client::new(":1.2", 8), Client::new(":1.3", 0));
    let first = house.attach(&user, Lifetime::Client).await.unwrap();
    let error = house.attach(&user, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LimitExceeded);
    assert!(error.message.contains("has 60 partitions") && error.message.contains("may have 100"), "{error}");
    house.settle().await;
    assert_eq!(house.machine.bound().len(), 1, "it is undone");
    house.agree();
    for _ in 0..5 {
        house.attach(&root, Lifetime::Client).await.unwrap();
    }

    // A table that is read again has no way round the limit either.
    house.machine.set_partitions(150);
    let error = house.engine.rescan(first.id).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LimitExceeded);
    house.settle().await;
    assert_eq!(house.engine.find(first.id).unwrap().partitions.len(), 100);
    house.agree();

    // What all users have together is bounded too, and what has gone is free again.
    house.machine.set_partitions(60);
    house.attach(&other, Lifetime::Client).await.unwrap();
    let error = house.attach(&Client::new(":1.4", 9), Lifetime::Client).await.unwrap_err();
    assert!(error.message.contains("all users together have"), "{error}");
    user.vanish(&house.engine);
    house.settle().await;
    house.attach(&user.again(), Lifetime::Client).await.unwrap();
    for client in [&user.again(), &other, &root] {
        client.vanish(&house.engine);
    }
    house.assert_empty().await;
    assert!(house.engine.partitions_of_a_uid.is_empty());
}

impl Client {
    pub fn again(&self) -> Self {
        Self::new(":1.9", self.uid)
    }
}

impl House {
    async fn agree_after_telling(&self) {
        self.engine.told().await;
        self.agree();
    }
}

/// What the events of an image with as many partitions as there can be come to: each names one partition.
#[tokio::test(start_paused = true)]
async fn the_work_for_an_event_does_not_grow_with_the_partitions() {
    const PARTITIONS: u32 = 255;
    let most = 10 * PARTITIONS as usize;
    for scans_itself in [false, true] {
        let house = House::with_udev();
        house.machine.set_partitions(PARTITIONS);
        if scans_itself {
            house.machine.set_scans_itself();
        }
        let client = Client::new(":1.1", 7);
        let work =
            || (house.machine.partitions_read(), partitions_shown(), house.events.load(Ordering::Relaxed));
        let before = work();
        let attached = house.attach(&client, Lifetime::Client).await.unwrap();
        house.settle().await;
        assert_eq!(house.engine.find(attached.id).unwrap().partitions.len(), PARTITIONS as usize);
        house.agree();
        let after = work();
        assert!(after.0 - before.0 <= most, "{} looks at a partition", after.0 - before.0);
        assert!(after.1 - before.1 <= most, "{} partitions compared", after.1 - before.1);
        assert_eq!(after.2 - before.2, 1, "it is told once, with its partitions");

        // All of them go and come back.
        let before = work();
        house.machine.drop_partitions(attached.device.number);
        house.settle().await;
        house.agree();
        let after = work();
        assert!(after.0 - before.0 <= most, "{} looks at a partition", after.0 - before.0);
        assert!(after.1 - before.1 <= most, "{} partitions compared", after.1 - before.1);
        client.vanish(&house.engine);
        house.assert_empty().await;
    }
}

/// An attach costs the same work whatever else is attached: each of its events names its own device.
#[tokio::test(start_paused = true)]
async fn the_work_for_an_attach_does_not_grow_with_what_else_is_attached() {
    for scans_itself in [false, true] {
        let house = House::with_udev();
        if scans_itself {
            house.machine.set_scans_itself();
        }
        let client = Client::new(":1.1", 7);
        let mut costs = Vec::new();
        for _ in 0..2 {
            house.machine.set_partitions(2);
            let before = (house.machine.partitions_read(), partitions_shown(), house.machine.looks());
            let attached = house.attach(&client, Lifetime::Persistent).await.unwrap();
            house.settle().await;
            house.engine.detach(attached.id, false).await.unwrap();
            house.settle().await;
            let after = (house.machine.partitions_read(), partitions_shown(), house.machine.looks());
            costs.push((after.0 - before.0, after.1 - before.1, after.2 - before.2));
            // What another user has attached in the meantime.
            house.machine.set_partitions(100);
            let other = Client::new(":1.2", 8);
            for _ in 0..5 {
                house.attach(&other, Lifetime::Client).await.unwrap();
            }
            house.settle().await;
            house.agree();
        }
        assert_eq!(costs[0], costs[1], "looks at partitions, partitions compared, looks at devices");
        assert!(costs[0].2 <= 40, "{} looks at devices for one attach and its end", costs[0].2);
    }
}

/// A mount costs nothing to whoever is not concerned.
#[tokio::test(start_paused = true)]
async fn a_mount_is_a_matter_of_its_device_alone() {
    let house = House::with_udev();
    house.machine.set_partitions(255);
    let client = Client::new(":1.1", 7);
    let large = house.attach(&client, Lifetime::Client).await.unwrap();
    house.machine.set_partitions(0);
    let small = house.attach(&client, Lifetime::Client).await.unwrap();
    house.settle().await;
    let before = partitions_shown();
    house.machine.mount(small.device.number);
    house.settle().await;
    assert_eq!(partitions_shown(), before);
    assert_eq!(house.engine.outline(small.id).unwrap().mount_points, [PathBuf::from("/mnt")]);
    house.machine.mount_on(large.device.number, Some(200), PathBuf::from("/mnt/p"));
    house.settle().await;
    assert_ne!(partitions_shown(), before);
    house.agree();
    house.machine.unmount(small.device.number);
    house.machine.unmount(large.device.number);
    house.settle().await;
    client.vanish(&house.engine);
    house.assert_empty().await;
}

/// Random clients do random things on a slow machine whose events get lost. `LOOPD_STORMS` sets
/// how many storms there are; each names its seed where it fails.
#[tokio::test(start_paused = true)]
async fn storms_leave_engine_kernel_and_bus_in_agreement() {
    let storms = std::env::var("LOOPD_STORMS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 1..=storms {
        println!("storm {seed}");
        storm(seed).await;
    }
}

async fn storm(seed: u64) {
    let house = Arc::new(House::new(Simulated::random(seed)));
    house.start_udev(seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut clients = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for step in 0..500 {
        if clients.len() < 6 {
            clients.push(Client::new(&format!(":1.{step}"), 1000 + random.u32(..3)));
        }
        let client = clients[random.usize(..clients.len())].clone();
        let number = random.u32(..8);
        let house = Arc::clone(&house);
        match random.u8(..21) {
            17..=18 => {
                tasks.spawn(async move {
                    if let Ok(attachment) = house.engine.locate(number).await {
                        let partition = Some(step % 3).filter(|partition| *partition > 0);
                        let volume = VolumeId { partition, ..whole(&attachment) };
                        let _busy_or_gone = house.engine.mount(volume, &wanted(), &client).await;
                    }
                });
            }
            19 => {
                let lazy = random.bool();
                tasks.spawn(async move {
                    if let Ok(attachment) = house.engine.locate(number).await {
                        let _not_mounted =
                            house.engine.unmount(whole(&attachment), lazy, client.uid, false).await;
                    }
                });
            }
            20 => {
                let request = AttachRequest { lifetime: Lifetime::Mount, ..AttachRequest::default() };
                tasks.spawn(async move { drop(house.attach_with(&client, request).await) });
            }
            14 => {
                let lifetimes = [Lifetime::Client, Lifetime::Persistent, Lifetime::Mount];
                let lifetime = lifetimes[random.usize(..lifetimes.len())];
                tasks.spawn(async move {
                    if let Ok(attachment) = house.engine.locate(number).await {
                        let _gone = house.engine.set_lifetime(attachment.id, lifetime, &client).await;
                    }
                });
            }
            15 => {
                tasks.spawn(async move {
                    if let Ok(attachment) = house.engine.locate(number).await {
                        let _gone = house.engine.replace_backing_file(attachment.id, 2, 0).await;
                    }
                });
            }
            16 => {
                let overlap = if random.bool() { Overlap::Reuse } else { Overlap::Refuse };
                let offset = random.u64(..3) * 512;
                let request = AttachRequest { overlap, offset, size_limit: 512, ..AttachRequest::default() };
                tasks.spawn(async move { drop(house.attach_with(&client, request).await) });
            }
            0..=4 => {
                let lifetime = if random.bool() { Lifetime::Client } else { Lifetime::Persistent };
                house.machine.set_partitions(random.u32(..3));
                let request = AttachRequest { lifetime, wait: random.bool(), ..AttachRequest::default() };
                tasks.spawn(async move { drop(house.attach_with(&client, request).await) });
            }
            5..=7 => {
                let lazy = random.u8(..4) == 0;
                tasks.spawn(async move {
                    if let Ok(attachment) = house.engine.locate(number).await {
                        let _busy_or_gone = house.engine.detach(attachment.id, lazy).await;
                    }
                });
            }
            8 => house.machine.open_elsewhere(number),
            9 => house.machine.close_elsewhere(number),
            10 => house.machine.mount(number),
            11 => house.machine.unmount(number),
            13 if random.bool() => house.machine.drop_partitions(number),
            13 => house.machine.reread_partitions(number),
            12 => {
                clients.retain(|other| other.id != client.id);
                client.vanish(&house.engine);
            }
            _ if random.bool() => drop(house.machine.attach_elsewhere(1)),
            _ => house.machine.detach_elsewhere(number),
        }
        tokio::time::sleep(Duration::from_micros(random.u64(..4000))).await;
    }
    while tasks.join_next().await.is_some() {}
    calm(&house, &clients).await;
}

/// Everyone goes, everything is closed: nothing may be left but what is persistent.
pub(super) async fn calm(house: &House, clients: &[Client]) {
    for client in clients {
        client.vanish(&house.engine);
    }
    for (number, _, _) in house.machine.bound() {
        for _ in 0..500 {
            house.machine.close_elsewhere(number);
            house.machine.unmount(number);
        }
    }
    house.settle().await;
    house.engine.resync().await;
    house.agree_after_telling().await;
    for attachment in house.engine.list() {
        let client = attachment.ownership.as_ref().and_then(|ownership| ownership.client.as_ref());
        assert_eq!(client, None, "the client of {} is gone", attachment.device.node());
        let detached = house.engine.detach(attachment.id, false).await;
        // One that nobody has mounted may have come to its end just now.
        let awaits_mount = attachment.ownership.is_some_and(|owner| owner.lifetime == Lifetime::Mount);
        assert!(detached.is_ok() || awaits_mount, "{detached:?}");
    }
    house.assert_empty().await;
}
