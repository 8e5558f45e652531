//! Calls and ends that meet: what was answered holds, and what was never finished is found again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use loopd_common::{Lifetime, Overlap, State};

use super::harness::{Client, Harness};
use super::restart::{connected, run_daemon};
use crate::simulated::{Files, Interference, Simulated};
use crate::{AttachRequest, Phase, Snapshot, Store as _};

/// Longer than any call on the simulated machine takes.
const LONGEST: u64 = 30_000;

/// The moments at which a client disconnects, in microseconds after a call has begun.
fn moments() -> impl Iterator<Item = Duration> {
    (0..LONGEST).step_by(500).map(Duration::from_micros)
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_that_was_changed_survives_the_end_of_the_client_before() {
    for (seed, moment) in moments().enumerate() {
        let harness = Harness::with_random_udev(seed as u64);
        let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
        let attached = harness.attach(&first, Lifetime::Client).await.unwrap();
        harness.settle().await;
        let (changed, ()) =
            tokio::join!(harness.engine.set_lifetime(attached.id, Lifetime::Persistent, &second), async {
                tokio::time::sleep(moment).await;
                first.vanish(&harness.engine);
            });
        harness.settle().await;
        let found = harness.engine.find(attached.id);
        match changed {
            Ok(()) => {
                assert_eq!(found.map(|found| found.state), Some(State::Attached), "{moment:?}");
                harness.engine.detach(attached.id, false).await.unwrap();
            }
            Err(error) => assert_eq!(found, None, "{moment:?}: {error}"),
        }
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_reused_as_persistent_survives_the_client_that_attached_it() {
    for (seed, moment) in moments().enumerate() {
        let harness = Harness::with_random_udev(seed as u64);
        let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
        harness.attach(&first, Lifetime::Client).await.unwrap();
        harness.settle().await;
        let request = AttachRequest {
            lifetime: Lifetime::Persistent,
            overlap: Overlap::Reuse,
            ..AttachRequest::default()
        };
        let (reused, ()) = tokio::join!(harness.attach_with(&second, request), async {
            tokio::time::sleep(moment).await;
            first.vanish(&harness.engine);
        });
        harness.settle().await;
        if let Ok(reused) = reused {
            let found = harness.engine.find(reused.id);
            assert_eq!(found.map(|found| found.state), Some(State::Attached), "{moment:?}");
            harness.engine.detach(reused.id, false).await.unwrap();
        }
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_persistent_attach_that_is_dropped_keeps_its_announcement() {
    let machine = Simulated::random(1);
    let files = Files::on(&machine);
    let harness = Harness::with_files(machine, files.clone());
    let client = Client::new(":1.1", 7);
    let attach = harness.attach(&client, Lifetime::Persistent);
    // The daemon ends while the kernel makes the device.
    assert!(tokio::time::timeout(Duration::from_micros(1), attach).await.is_err());
    assert_eq!(files.announced().len(), 1, "the next daemon would not know whose the device is");
    harness.start_udev(0);
    let finished = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    assert_eq!(files.announced().len(), 1, "a finished attach is announced no more");
    harness.engine.detach(finished.id, false).await.unwrap();
}

#[test]
fn an_error_at_the_start_detaches_nothing_of_a_connected_client() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        for failing in 1..12 {
            for vanishes in [false, true] {
                restarts_with_an_error(lifetime, failing, vanishes);
            }
        }
    }
}

/// One call to the kernel fails while the next daemon adopts the attachments of the last one.
fn restarts_with_an_error(lifetime: Lifetime, failing: usize, vanishes: bool) {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&client, lifetime).await.unwrap();
        harness.settle().await;
        attached
    });
    let attached = attached.unwrap();
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.fail_at(failing);
        harness.engine.restore(connected([client.clone()])).await;
        if vanishes {
            client.vanish(&harness.engine);
        }
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        machine.interfere(|_| Interference::None);
        let found = harness.engine.find(attached.id);
        if vanishes && lifetime == Lifetime::Client {
            assert_eq!(found, None, "step {failing}");
        } else {
            let found = found.unwrap_or_else(|| panic!("step {failing}: it is gone"));
            assert_eq!(found.state, State::Attached, "step {failing}");
            let owner = found.ownership.unwrap_or_else(|| panic!("step {failing}: nobody owns it"));
            assert_eq!((owner.uid, owner.lifetime), (7, lifetime), "step {failing}");
            harness.engine.detach(attached.id, false).await.unwrap();
        }
        harness.settle().await;
        assert_eq!(machine.bound(), [], "step {failing}");
        assert!(files.read().is_empty(), "step {failing}");
        harness.engine.attachment_quota.empty().await;
    })
    .unwrap();
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_and_is_gone_leaves_nothing() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        harness.attach(&client, Lifetime::Client).await.unwrap();
        harness.settle().await;
    });
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        machine.interfere(|_| Interference::Fail);
        harness.engine.restore(connected([client.clone()])).await;
        // Somebody else ends it before it can be looked at.
        machine.take_down(0);
        machine.interfere(|_| Interference::None);
        harness.start_udev(0);
        harness.settle().await;
        assert!(files.read().is_empty());
        harness.engine.attachment_quota.empty().await;
    })
    .unwrap();
}

/// Attaches for user 7, and ends the daemon.
fn attached_before(machine: &Simulated, files: &Files, client: &Client, lifetime: Lifetime) -> Snapshot {
    let attached = run_daemon(machine, files, async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(client, lifetime).await.unwrap();
        harness.settle().await;
        attached
    });
    machine.die();
    attached.unwrap()
}

#[test]
fn a_client_that_disconnected_between_daemons_ends_a_device_that_could_not_be_read() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        let machine = Simulated::new();
        machine.keep_holds();
        let files = Files::on(&machine);
        let client = Client::new(":1.1", 7);
        let attached = attached_before(&machine, &files, &client, lifetime);
        run_daemon(&machine, &files, async |harness| {
            harness.fail_at(1);
            harness.engine.restore(connected([])).await;
            assert_eq!(harness.engine.find(attached.id), None, "it could not be read");
            harness.engine.resync().await;
            harness.start_udev(0);
            let grace = harness.engine.settings().mount_grace;
            if lifetime == Lifetime::Mount {
                let owner = harness.engine.find(attached.id).unwrap().ownership.unwrap();
                assert!(owner.client.is_none() && owner.grace_ends.is_some());
                tokio::time::sleep(grace).await;
            }
            harness.assert_empty().await;
        })
        .unwrap();
    }
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_keeps_its_client() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        let machine = Simulated::new();
        machine.keep_holds();
        let files = Files::on(&machine);
        let client = Client::new(":1.1", 7);
        let attached = attached_before(&machine, &files, &client, lifetime);
        run_daemon(&machine, &files, async |harness| {
            harness.fail_at(1);
            harness.engine.restore(connected([client.clone()])).await;
            harness.engine.resync().await;
            let owner = harness.engine.find(attached.id).unwrap().ownership.unwrap();
            assert_eq!((owner.client, owner.grace_ends), (Some(client.id.clone()), None));
        })
        .unwrap();
    }
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_ends_with_its_last_mount() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = attached_before(&machine, &files, &client, Lifetime::Mount);
    machine.revive();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([client.clone()])).await;
        machine.mount(attached.device.number);
        harness.start_udev(0);
        harness.settle().await;
    });
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.fail_at(1);
        harness.engine.restore(connected([])).await;
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        let owner = harness.engine.find(attached.id).unwrap().ownership.unwrap();
        assert_eq!((owner.mounted, owner.grace_ends), (true, None));
        machine.unmount(attached.device.number);
        harness.assert_empty().await;
    })
    .unwrap();
}

#[test]
fn a_number_that_another_program_took_between_two_daemons_is_not_adopted() {
    let machine = Simulated::new();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = attached_before(&machine, &files, &client, Lifetime::Persistent);
    machine.take_down(attached.device.number);
    assert_eq!(machine.attach_elsewhere(9), attached.device.number);
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        harness.engine.resync().await;
        let list = harness.engine.list();
        assert_eq!((list.len(), &list[0].ownership), (1, &None));
        assert!(files.read().is_empty());
    })
    .unwrap();
}

#[test]
fn only_a_device_with_an_announced_mark_is_undone() {
    let machine = Simulated::new();
    let files = Files::on(&machine);
    files.announce(7).unwrap();
    let ours = machine.attach_marked_elsewhere(1, 7);
    let others = machine.attach_marked_elsewhere(2, 8);
    let unmarked = machine.attach_elsewhere(3);
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        let bound: Vec<u32> = machine.bound().into_iter().map(|(number, ..)| number).collect();
        assert_eq!(bound, [others, unmarked], "{ours} is undone");
        assert!(files.announced().is_empty());
    })
    .unwrap();
}

/// The daemon died after it wrote the file and before it took the announcement back.
#[test]
fn a_saved_attachment_is_kept_if_it_is_still_announced() {
    let machine = Simulated::new();
    let files = Files::on(&machine);
    let attached = attached_before(&machine, &files, &Client::new(":1.1", 7), Lifetime::Persistent);
    machine.revive();
    files.announce(attached.device.mark).unwrap();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        harness.settle().await;
        assert_eq!(harness.engine.find(attached.id).unwrap().state, State::Attached);
        assert!(files.announced().is_empty());
    })
    .unwrap();
}

#[test]
fn the_next_daemon_marks_devices_of_users_untrusted() {
    for (uid, expected) in [(0, false), (7, true)] {
        let machine = Simulated::new();
        let files = Files::on(&machine);
        let attached = attached_before(&machine, &files, &Client::new(":1.1", uid), Lifetime::Persistent);
        machine.forget_untrusted();
        run_daemon(&machine, &files, async |harness| {
            harness.engine.restore(connected([])).await;
            assert_eq!(machine.is_untrusted(attached.device.disk_sequence), expected, "uid {uid}");
        })
        .unwrap();
    }
}

/// The daemon died as it made the device persistent: without a hold it must not become autoclear again.
#[test]
fn a_device_without_a_hold_is_not_made_autoclear() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = attached_before(&machine, &files, &client, Lifetime::Client);
    machine.set_autoclear(attached.device.number, false);
    run_daemon(&machine, &files, async |harness| {
        // The first step reads the device, the second takes the hold.
        let reached = harness.fail_at(2);
        harness.engine.restore(connected([client.clone()])).await;
        assert!(reached.load(Ordering::Relaxed));
        assert_eq!(machine.bound().len(), 1, "it is gone");
        assert!(!machine.bound()[0].2, "it would go at its next close");
    })
    .unwrap();
}

#[test]
fn an_unfinished_attach_is_undone_and_not_published() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    run_daemon(&machine, &files, async |harness| {
        // Without udev the attach waits.
        let attach = harness.attach(&client, Lifetime::Client);
        assert!(tokio::time::timeout(Duration::from_secs(1), attach).await.is_err());
        assert_eq!(files.saved()[0].phase, Phase::Attaching);
        machine.die();
        std::future::pending::<()>().await;
    });
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([client.clone()])).await;
        harness.assert_empty().await;
        assert_eq!(harness.events.load(Ordering::Relaxed), 0);
    })
    .unwrap();
}

#[test]
fn partitions_are_the_same_after_a_restart() {
    let machine = Simulated::new();
    machine.set_partitions(3);
    let files = Files::on(&machine);
    let attached = attached_before(&machine, &files, &Client::new(":1.1", 7), Lifetime::Persistent);
    assert_eq!(attached.partitions.len(), 3);
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        assert_eq!(harness.engine.find(attached.id).unwrap().partitions, attached.partitions);
    })
    .unwrap();
}

#[test]
fn the_grace_time_continues_after_a_restart() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let attached = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&client, Lifetime::Mount).await.unwrap();
        client.vanish(&harness.engine);
        harness.engine.flush_events().await;
        attached
    });
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        harness.start_udev(0);
        assert!(harness.engine.find(attached.unwrap().id).is_some());
        tokio::time::sleep(harness.engine.settings().mount_grace).await;
        harness.assert_empty().await;
    })
    .unwrap();
}

#[test]
fn a_lazy_detach_continues_after_a_restart() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    let detaching = run_daemon(&machine, &files, async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&client, Lifetime::Mount).await.unwrap();
        machine.open_elsewhere(attached.device.number);
        harness.engine.detach(attached.id, true).await.unwrap();
        harness.settle().await;
        harness.engine.find(attached.id).unwrap()
    });
    machine.die();
    run_daemon(&machine, &files, async |harness| {
        harness.engine.restore(connected([])).await;
        let found = harness.engine.find(detaching.as_ref().unwrap().id).unwrap();
        assert_eq!((found.state, found.ownership), (State::Detaching, detaching.unwrap().ownership));
    })
    .unwrap();
}
