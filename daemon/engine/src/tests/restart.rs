//! The daemon dies at every step of an operation, and the next one adopts what it has left.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use crate::simulated::{Files, Interference, Simulated};
use crate::{AttachRequest, Caller as _, ClientId, Phase, SavedAttachment, Snapshot, Store as _};

/// The file that replaces the first one.
const ANOTHER: u64 = 2;
/// The file of the mounted device: the same bytes are not mounted twice.
const MOUNTED: u64 = 5;

/// Runs a daemon until `body` has ended or the daemon dies: `None` if it died before.
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
    // All tasks of the daemon end here, with the runtime.
}

/// When the daemon dies.
#[derive(Clone, Copy, Debug)]
pub enum Death {
    /// At this step of the machine, counted from 1.
    Step(usize),
    /// In this write, counted from 0; `true` if it is done.
    Write(usize, bool),
}

impl Death {
    pub fn arm(self, machine: &Simulated, files: &Files) {
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

/// An operation during which the daemon dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Attach(Lifetime),
    Detach,
    DetachPersistent,
    DetachLazily,
    DetachMountedLazily,
    DetachBusy,
    MakePersistent,
    BindToClient,
    Disconnect,
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
    Operation::MakePersistent,
    Operation::BindToClient,
    Operation::Disconnect,
];

/// The attachments before the operation, and its result.
#[derive(Clone)]
struct Before {
    bound: Snapshot,
    persistent: Snapshot,
    mounted: Snapshot,
    attached: Option<Snapshot>,
    done: bool,
    /// The state files that the first daemon left.
    written: Vec<SavedAttachment>,
}

#[test]
fn a_daemon_that_dies_at_any_step_loses_nothing() {
    for stores_holds in [true, false] {
        for operation in OPERATIONS {
            let mut last = (0, 0);
            for step in 1.. {
                last.0 = step;
                if dies_during(operation, Death::Step(step), stores_holds) {
                    break;
                }
            }
            for write in 0.. {
                last.1 = write;
                let done =
                    [false, true].map(|done| dies_during(operation, Death::Write(write, done), stores_holds));
                if done == [true, true] {
                    break;
                }
            }
            assert!(last.0 > 1 || last.1 > 0, "{operation:?} has neither steps nor writes");
        }
    }
}

/// Returns whether the operation was done before the daemon died.
fn dies_during(operation: Operation, death: Death, stores_holds: bool) -> bool {
    println!("{operation:?}, {death:?}, stores_holds {stores_holds}");
    let machine = Simulated::new();
    if stores_holds {
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
        let mounted = harness.engine.attach(MOUNTED.into(), request, &client).await.unwrap();
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
        // A dead daemon does not reply.
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
        // Events are delivered only after the daemon listens.
        harness.start_udev(0);
        harness.settle().await;
        check(operation, harness, &files, &before, stores_holds);
        machine.unmount(before.mounted.device.number);
        machine.unmount(before.persistent.device.number);
        end_everything(harness, &[client.clone(), other.clone()]).await;
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
        assert!(files.announced().is_empty());
    })
    .expect("the second one lives");
    done.is_some()
}

/// Whether a client is connected, as the bus reports it.
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
        Operation::MakePersistent => {
            engine.set_lifetime(before.bound.id, Lifetime::Persistent, client).await.unwrap()
        }
        Operation::BindToClient => {
            engine.set_lifetime(before.persistent.id, Lifetime::Client, client).await.unwrap();
        }
        Operation::Disconnect => client.disconnect(engine),
        Operation::Mount => drop(engine.mount(whole(&before.persistent), &wanted(), client).await.unwrap()),
        Operation::Unmount => {
            engine.unmount(whole(&before.persistent), false, client.uid, false).await.unwrap()
        }
        Operation::Replace => {
            engine.replace_backing_file(before.persistent.id, ANOTHER.into(), 0).await.unwrap()
        }
        Operation::ReplaceBound => {
            engine.replace_backing_file(before.bound.id, ANOTHER.into(), 0).await.unwrap()
        }
    }
    None
}

/// Checks that the second daemon has everything that the first one had returned or published, and no more.
fn check(operation: Operation, harness: &Harness, files: &Files, before: &Before, stores_holds: bool) {
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
        // Both results are possible.
        Operation::Detach if before.done => gone(&before.bound),
        Operation::Detach => {}
        Operation::Disconnect => gone(&before.bound),
        Operation::MakePersistent if stores_holds || before.done => {
            rebound(&before.bound, Lifetime::Persistent)
        }
        // The kernel may have made the change already, and nothing was saved.
        Operation::MakePersistent => {}
        _ if stores_holds => unchanged(&before.bound),
        _ => gone(&before.bound),
    }
    match operation {
        Operation::DetachPersistent | Operation::DetachLazily if before.done => gone(&before.persistent),
        Operation::DetachPersistent | Operation::DetachLazily => {}
        Operation::BindToClient if stores_holds => rebound(&before.persistent, Lifetime::Client),
        Operation::BindToClient if before.done => gone(&before.persistent),
        Operation::BindToClient => {}
        _ => unchanged(&before.persistent),
    }
    match operation {
        Operation::Disconnect => {
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
        Operation::ReplaceBound if stores_holds => replaced(&before.bound),
        _ => {}
    }
    let known = [&before.bound, &before.persistent, &before.mounted];
    let new: Vec<_> = list.iter().filter(|found| known.iter().all(|known| known.id != found.id)).collect();
    match &before.attached {
        Some(attached) if stores_holds || operation == Operation::Attach(Lifetime::Persistent) => {
            unchanged(attached);
            assert_eq!(new.len(), 1);
        }
        // It was not published, or has no hold. But the first daemon may have been about to publish it.
        _ => {
            let about_to_publish =
                |id| before.written.iter().any(|saved| saved.id == id && saved.phase == Phase::Attached);
            assert!(new.iter().all(|found| about_to_publish(found.id)), "left behind: {new:?}");
        }
    }
    check_directories(operation, harness, files, before);
    let written: Vec<_> = files.read().iter().map(|saved| saved.id).collect();
    let ours = list.iter().filter(|found| found.ownership.is_some());
    let mut listed: Vec<_> = ours.map(|found| found.id).collect();
    listed.sort_unstable();
    assert_eq!(written, listed);
    for found in &list {
        let number = found.device.number;
        let holds = harness.machine.holds(number);
        assert_eq!(
            harness.machine.stored_copies(number),
            if stores_holds { holds } else { 0 },
            "/dev/loop{number}"
        );
    }
}

/// Checks that the directories are those that something is mounted on, and that all of them are saved.
fn check_directories(operation: Operation, harness: &Harness, files: &Files, before: &Before) {
    let directories = files.mounts.directories();
    let known: Vec<_> = files.read_mount_directories().into_iter().map(|directory| directory.path).collect();
    assert_eq!(directories, known);
    let table = harness.machine.mount_table();
    assert!(directories.iter().all(|directory| table.has(directory)), "{directories:?}");
    match operation {
        Operation::Mount if before.done => assert_eq!(directories.len(), 1),
        Operation::Unmount if before.done => assert!(directories.is_empty(), "{directories:?}"),
        // Both results are possible.
        Operation::Mount | Operation::Unmount => {}
        _ => assert!(directories.is_empty(), "{directories:?}"),
    }
}

/// All clients disconnect and all users close the devices: only persistent attachments may be left.
async fn end_everything(harness: &Harness, clients: &[Client]) {
    for client in clients {
        client.disconnect(&harness.engine);
    }
    for (number, _, _) in harness.machine.bound() {
        for _ in 0..500 {
            harness.machine.close_elsewhere(number);
            harness.machine.unmount(number);
        }
    }
    harness.settle().await;
    harness.engine.resync().await;
    harness.agree_after_flush().await;
    for attachment in harness.engine.list() {
        let client = attachment.ownership.as_ref().and_then(|ownership| ownership.client.as_ref());
        assert_eq!(client, None, "the client of {} is gone", attachment.device.node());
        let detached = harness.engine.detach(attachment.id, false).await;
        // An attachment that was not mounted may have ended just now.
        let awaits_mount = attachment.ownership.is_some_and(|owner| owner.lifetime == Lifetime::Mount);
        assert!(detached.is_ok() || awaits_mount, "{detached:?}");
    }
    harness.assert_empty().await;
}

#[test]
fn a_device_whose_partitions_cannot_be_read_is_adopted_later_and_stays_mounted() {
    let machine = Simulated::new();
    machine.keep_holds();
    machine.set_partitions(2);
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&client, Lifetime::Mount).await.unwrap();
        machine.mount_on(attached.device.number, Some(2), "/mnt".into());
        harness.settle().await;
        attached
    });
    let (id, number) = attached.map(|attached| (attached.id, attached.device.number)).unwrap();
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        machine.set_unreadable(true);
        harness.engine.restore(connected([])).await;
        assert!(harness.engine.find(id).is_none(), "it is not adopted yet");
        machine.set_unreadable(false);
        harness.start_udev(0);
        let adopted = harness.engine.locate(number).await.unwrap();
        assert_eq!((adopted.id, adopted.state), (id, State::Attached), "a partition is mounted");
        machine.unmount_from("/mnt".as_ref());
        harness.assert_empty().await;
    })
    .expect("the second one lives");
}
