//! The daemon dies at every step of an operation on a cleartext, and the next one adopts or closes what it has left.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use loopd_common::{ErrorKind, Lifetime, State};

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use super::restart::{Death, connected, run_daemon};
use super::unlock::{cleartext, secret};
use crate::kernel::DiskSequence;
use crate::simulated::{Files, Simulated};
use crate::{Snapshot, Store as _};

/// Where another program has mounted the cleartext.
const MOUNTED: &str = "/mnt";

/// What is asked of a daemon that dies over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Unlock,
    Lock,
    LockBusy,
    LockLazily,
    LockMountedLazily,
    DetachMountedLazily,
    SetLifetime(Lifetime),
    Mount,
    Vanish,
}

const OPERATIONS: [Operation; 11] = [
    Operation::Unlock,
    Operation::Lock,
    Operation::LockBusy,
    Operation::LockLazily,
    Operation::LockMountedLazily,
    Operation::DetachMountedLazily,
    Operation::SetLifetime(Lifetime::Client),
    Operation::SetLifetime(Lifetime::Mount),
    Operation::SetLifetime(Lifetime::Persistent),
    Operation::Mount,
    Operation::Vanish,
];

/// What a daemon does before it dies, and on what machine.
#[derive(Clone, Copy, Debug)]
struct Scene {
    operation: Operation,
    lifetime: Lifetime,
    stores_holds: bool,
    /// Whether the programs that unlock die with the daemon.
    programs_die: bool,
}

/// What there was when the operation began, and whether it was done.
#[derive(Clone)]
struct Before {
    attachment: Snapshot,
    done: bool,
}

/// The lifetimes and the machines on which an operation may differ.
fn scenes(operation: Operation) -> Vec<Scene> {
    let mut lifetimes = vec![Lifetime::Client, Lifetime::Persistent];
    let makes = matches!(operation, Operation::Unlock | Operation::Mount);
    lifetimes.extend(makes.then_some(Lifetime::Mount));
    let mut all = Vec::new();
    for lifetime in lifetimes {
        for stores_holds in [true, false] {
            all.push(Scene { operation, lifetime, stores_holds, programs_die: false });
            if operation == Operation::Unlock {
                all.push(Scene { operation, lifetime, stores_holds, programs_die: true });
            }
        }
    }
    all
}

#[test]
fn a_daemon_that_dies_at_any_step_loses_no_cleartext() {
    for scene in OPERATIONS.into_iter().flat_map(scenes) {
        let mut last = (0, 0);
        for step in 1.. {
            last.0 = step;
            if dies_during(scene, Death::Step(step)) {
                break;
            }
        }
        for write in 0.. {
            last.1 = write;
            let done = [false, true].map(|done| dies_during(scene, Death::Write(write, done)));
            if done == [true, true] {
                break;
            }
        }
        let nothing_to_die_over = last.0 <= 1 && last.1 < 1;
        let has_effect = scene.operation != Operation::Vanish || scene.lifetime == Lifetime::Client;
        assert!(!(nothing_to_die_over && has_effect), "{scene:?} has neither steps nor writes");
    }
}

/// Says whether the operation was done before the daemon died.
fn dies_during(scene: Scene, death: Death) -> bool {
    println!("{scene:?}, {death:?}");
    let machine = Simulated::new();
    if scene.stores_holds {
        machine.keep_holds();
    }
    if scene.programs_die {
        machine.let_programs_die();
    }
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let before = Arc::new(Mutex::new(None));
    let noted = Arc::clone(&before);
    let done = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let attachment = set_up(harness, scene, &client).await;
        *noted.lock().unwrap() = Some(Before { attachment: attachment.clone(), done: false });
        death.arm(&machine, &files);
        commit(harness, scene.operation, &attachment, &client).await;
        harness.engine.flush_events().await;
        // The dead give no answer.
        if let Some(before) = noted.lock().unwrap().as_mut().filter(|_| !machine.is_dead()) {
            before.done = true;
        }
        harness.settle().await;
    });
    let before = before.lock().unwrap().take().unwrap();
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([client.clone()])).await;
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        harness.agree();
        check(harness, scene, &before);
        machine.unmount_from(Path::new(MOUNTED));
        end_everything(harness, &client).await;
        assert!(files.read().is_empty(), "files are left: {:?}", files.read());
    })
    .expect("the second one lives");
    done.is_some()
}

async fn set_up(harness: &Harness, scene: Scene, client: &Client) -> Snapshot {
    let attachment = harness.attach(client, scene.lifetime).await.unwrap();
    if scene.operation != Operation::Unlock {
        let unlocked = harness.engine.unlock(whole(&attachment), secret(), client).await.unwrap();
        if matches!(
            scene.operation,
            Operation::LockMountedLazily | Operation::LockBusy | Operation::DetachMountedLazily
        ) {
            harness.machine.mount_mapping(unlocked.mapping.number, PathBuf::from(MOUNTED));
        }
    }
    harness.settle().await;
    harness.engine.find(attachment.id).unwrap()
}

async fn commit(harness: &Harness, operation: Operation, attachment: &Snapshot, client: &Client) {
    let engine = &harness.engine;
    let volume = whole(attachment);
    match operation {
        Operation::Unlock => drop(engine.unlock(volume, secret(), client).await.unwrap()),
        Operation::Lock => engine.lock(volume, false).await.unwrap(),
        Operation::LockBusy => drop(engine.lock(volume, false).await.unwrap_err()),
        Operation::LockLazily | Operation::LockMountedLazily => engine.lock(volume, true).await.unwrap(),
        Operation::DetachMountedLazily => engine.detach(attachment.id, true).await.unwrap(),
        Operation::SetLifetime(lifetime) => {
            engine.set_lifetime(attachment.id, lifetime, client).await.unwrap();
        }
        Operation::Mount => drop(engine.mount(cleartext(attachment), &wanted(), client).await.unwrap()),
        Operation::Vanish => client.vanish(engine),
    }
}

/// The second daemon has what the first one had promised.
fn check(harness: &Harness, scene: Scene, before: &Before) {
    let id = before.attachment.id;
    let found = harness.engine.find(id);
    let mapped: Vec<DiskSequence> = {
        let mappings = harness.machine.mappings_on(before.attachment.device.number).into_iter();
        mappings.map(|(_, mapping)| mapping.disk_sequence).collect()
    };
    let was_mounted = matches!(
        scene.operation,
        Operation::LockMountedLazily | Operation::LockBusy | Operation::DetachMountedLazily
    );
    let shown = found.as_ref().and_then(|found| found.cleartext.clone());
    if let (Some(now), Some(then)) = (&shown, &before.attachment.cleartext) {
        assert_eq!((&now.mapping, now.since), (&then.mapping, then.since));
    }
    let stays = scene.stores_holds || scene.lifetime == Lifetime::Persistent;
    match scene.operation {
        Operation::Unlock if before.done && stays => assert!(shown.is_some(), "it was unlocked"),
        Operation::Lock | Operation::LockLazily if before.done => assert_eq!(mapped, []),
        Operation::LockMountedLazily | Operation::DetachMountedLazily if before.done => {
            assert_eq!(mapped.len(), 1, "what is mounted stays");
            let saved = found.unwrap().saved_cleartexts;
            assert!(saved.iter().all(|saved| saved.closing), "{saved:?}");
        }
        Operation::LockBusy if stays => {
            let found = found.unwrap();
            assert_eq!((found.state, found.saved_cleartexts[0].closing), (State::Attached, false));
        }
        Operation::SetLifetime(lifetime)
            if before.done && (scene.stores_holds || lifetime == Lifetime::Persistent) =>
        {
            let found = found.unwrap();
            assert_eq!(found.ownership.unwrap().lifetime, lifetime);
            assert!(found.cleartext.is_some(), "it was unlocked");
        }
        Operation::Mount if before.done => assert_eq!(shown.unwrap().mount_points.len(), 1),
        _ if was_mounted => assert_eq!(mapped.len(), 1, "what is mounted stays"),
        _ => {}
    }
}

/// The client goes, and all is unmounted, locked and detached.
async fn end_everything(harness: &Harness, client: &Client) {
    client.vanish(&harness.engine);
    for found in harness.engine.list() {
        harness.machine.leave_alone(found.device.number);
    }
    harness.settle().await;
    harness.agree();
    for found in harness.engine.list() {
        for ended in
            [harness.engine.lock(whole(&found), false).await, harness.engine.detach(found.id, false).await]
        {
            assert!(
                ended.is_ok() || ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound),
                "{ended:?}"
            );
        }
    }
    harness.assert_empty().await;
}
