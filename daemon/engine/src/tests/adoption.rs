//! What the next daemon adopts, and what it undoes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::harness::{Client, Harness};
use super::restart::{connected, run_daemon};
use crate::simulated::{Files, Interference, Simulated};
use crate::{Phase, Snapshot, Store as _};

/// A machine on which one daemon follows another, and a client of user 7.
struct Machine {
    simulated: Simulated,
    files: Files,
    client: Client,
}

impl Machine {
    fn new() -> Self {
        let simulated = Simulated::new();
        Self { files: Files::on(&simulated), simulated, client: Client::new(":1.1", 7) }
    }

    /// A service manager stores copies of holds.
    fn with_stored_holds() -> Self {
        let machine = Self::new();
        machine.simulated.keep_holds();
        machine
    }

    /// Runs a daemon that dies when the body has ended.
    fn daemon<T>(&self, body: impl AsyncFnOnce(&Harness) -> T) -> T {
        let done = run_daemon(&self.simulated, &self.files, body);
        self.simulated.die();
        done.expect("the daemon lives until then")
    }

    /// A daemon attaches for the client and dies.
    fn attached_before(&self, lifetime: Lifetime) -> Snapshot {
        self.attached_before_by(&self.client, lifetime)
    }

    fn attached_before_by(&self, client: &Client, lifetime: Lifetime) -> Snapshot {
        self.daemon(async |harness| {
            harness.start_udev(0);
            let attached = harness.attach(client, lifetime).await.unwrap();
            harness.settle().await;
            attached
        })
    }
}

#[test]
fn an_error_at_the_start_detaches_nothing_of_a_connected_client() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        for failing in 1..12 {
            for disconnects in [false, true] {
                restarts_with_an_error(lifetime, failing, disconnects);
            }
        }
    }
}

/// One call to the kernel fails while the next daemon adopts the attachments of the last one.
fn restarts_with_an_error(lifetime: Lifetime, failing: usize, disconnects: bool) {
    let machine = Machine::with_stored_holds();
    let attached = machine.daemon(async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&machine.client, lifetime).await.unwrap();
        harness.settle().await;
        attached
    });
    machine.daemon(async |harness| {
        harness.fail_at(failing);
        harness.engine.restore(connected([machine.client.clone()])).await;
        if disconnects {
            machine.client.disconnect(&harness.engine);
        }
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        machine.simulated.interfere(|_| Interference::None);
        let found = harness.engine.find(attached.id);
        if disconnects && lifetime == Lifetime::Client {
            assert_eq!(found, None, "step {failing}");
        } else {
            let found = found.unwrap_or_else(|| panic!("step {failing}: it is gone"));
            assert_eq!(found.state, State::Attached, "step {failing}");
            let owner = found.ownership.unwrap_or_else(|| panic!("step {failing}: nobody owns it"));
            assert_eq!((owner.uid, owner.lifetime), (7, lifetime), "step {failing}");
            harness.engine.detach(attached.id, false).await.unwrap();
        }
        harness.settle().await;
        assert_eq!(machine.simulated.bound(), [], "step {failing}");
        assert!(machine.files.read().is_empty(), "step {failing}");
        harness.engine.attachment_quota.empty().await;
    });
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_and_is_gone_leaves_nothing() {
    let machine = Machine::with_stored_holds();
    machine.daemon(async |harness| {
        harness.start_udev(0);
        harness.attach(&machine.client, Lifetime::Client).await.unwrap();
        harness.settle().await;
    });
    machine.daemon(async |harness| {
        machine.simulated.interfere(|_| Interference::Fail);
        harness.engine.restore(connected([machine.client.clone()])).await;
        // Another program ends it before it is read again.
        machine.simulated.take_down(0);
        machine.simulated.interfere(|_| Interference::None);
        harness.start_udev(0);
        harness.settle().await;
        assert!(machine.files.read().is_empty());
        harness.engine.attachment_quota.empty().await;
    });
}

#[test]
fn a_client_that_disconnected_between_daemons_ends_a_device_that_could_not_be_read() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        let machine = Machine::with_stored_holds();
        let attached = machine.attached_before(lifetime);
        machine.daemon(async |harness| {
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
        });
    }
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_keeps_its_client() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        let machine = Machine::with_stored_holds();
        let attached = machine.attached_before(lifetime);
        machine.daemon(async |harness| {
            harness.fail_at(1);
            harness.engine.restore(connected([machine.client.clone()])).await;
            harness.engine.resync().await;
            let owner = harness.engine.find(attached.id).unwrap().ownership.unwrap();
            assert_eq!((owner.client, owner.grace_ends), (Some(machine.client.id.clone()), None));
        });
    }
}

#[test]
fn a_device_that_could_not_be_read_at_the_start_ends_with_its_last_mount() {
    let machine = Machine::with_stored_holds();
    let attached = machine.attached_before(Lifetime::Mount);
    machine.daemon(async |harness| {
        harness.engine.restore(connected([machine.client.clone()])).await;
        machine.simulated.mount(attached.device.number);
        harness.start_udev(0);
        harness.settle().await;
    });
    machine.daemon(async |harness| {
        harness.fail_at(1);
        harness.engine.restore(connected([])).await;
        harness.engine.resync().await;
        harness.start_udev(0);
        harness.settle().await;
        let owner = harness.engine.find(attached.id).unwrap().ownership.unwrap();
        assert_eq!((owner.mounted, owner.grace_ends), (true, None));
        machine.simulated.unmount(attached.device.number);
        harness.assert_empty().await;
    });
}

#[test]
fn a_number_that_another_program_took_between_two_daemons_is_not_adopted() {
    let machine = Machine::new();
    let attached = machine.attached_before(Lifetime::Persistent);
    machine.simulated.take_down(attached.device.number);
    assert_eq!(machine.simulated.attach_elsewhere(9), attached.device.number);
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        harness.engine.resync().await;
        let list = harness.engine.list();
        assert_eq!((list.len(), &list[0].ownership), (1, &None));
        assert!(machine.files.read().is_empty());
    });
}

#[test]
fn only_a_device_with_an_announced_mark_is_undone() {
    let machine = Machine::new();
    machine.files.announce(7).unwrap();
    let ours = machine.simulated.attach_marked_elsewhere(1, 7);
    let others = machine.simulated.attach_marked_elsewhere(2, 8);
    let unmarked = machine.simulated.attach_elsewhere(3);
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        let bound: Vec<u32> = machine.simulated.bound().into_iter().map(|(number, ..)| number).collect();
        assert_eq!(bound, [others, unmarked], "{ours} is undone");
        assert!(machine.files.announced().is_empty());
    });
}

#[test]
fn a_device_that_cannot_be_read_is_undone_by_a_later_daemon() {
    let machine = Machine::new();
    machine.files.announce(7).unwrap();
    machine.simulated.attach_marked_elsewhere(1, 7);
    machine.daemon(async |harness| {
        let reached = harness.fail_at(1);
        harness.engine.restore(connected([])).await;
        assert!(reached.load(Ordering::Relaxed));
        assert_eq!((machine.simulated.bound().len(), machine.files.announced()), (1, vec![7]));
    });
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        assert_eq!((machine.simulated.bound().len(), machine.files.announced()), (0, vec![]));
    });
}

/// The daemon died after it wrote the file and before it retracted the announcement.
#[test]
fn a_saved_attachment_is_kept_if_it_is_still_announced() {
    let machine = Machine::new();
    let attached = machine.attached_before(Lifetime::Persistent);
    machine.simulated.revive();
    machine.files.announce(attached.device.mark).unwrap();
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        harness.settle().await;
        assert_eq!(harness.engine.find(attached.id).unwrap().state, State::Attached);
        assert!(machine.simulated.has_attach(attached.id));
        assert!(machine.files.announced().is_empty());
    });
}

#[test]
fn the_next_daemon_marks_devices_of_users_untrusted() {
    for (uid, expected) in [(0, false), (7, true)] {
        let machine = Machine::new();
        let attached = machine.attached_before_by(&Client::new(":1.1", uid), Lifetime::Persistent);
        machine.simulated.forget_untrusted();
        machine.daemon(async |harness| {
            harness.engine.restore(connected([])).await;
            assert_eq!(machine.simulated.is_untrusted(attached.device.disk_sequence), expected, "uid {uid}");
        });
    }
}

/// The daemon died as it made the device persistent: without a hold it must not become autoclear again.
#[test]
fn a_device_without_a_hold_is_not_made_autoclear() {
    let machine = Machine::with_stored_holds();
    let attached = machine.attached_before(Lifetime::Client);
    machine.simulated.set_autoclear(attached.device.number, false);
    machine.daemon(async |harness| {
        // The first step reads the device, the second takes the hold.
        let reached = harness.fail_at(2);
        harness.engine.restore(connected([machine.client.clone()])).await;
        assert!(reached.load(Ordering::Relaxed));
        assert_eq!(machine.simulated.bound().len(), 1, "it is gone");
        assert!(!machine.simulated.bound()[0].2, "it would go at its next close");
    });
}

#[test]
fn an_unfinished_attach_is_undone_and_not_published() {
    let machine = Machine::with_stored_holds();
    machine.daemon(async |harness| {
        // Without udev the attach waits.
        let attach = harness.attach(&machine.client, Lifetime::Client);
        assert!(tokio::time::timeout(Duration::from_secs(1), attach).await.is_err());
        assert_eq!(machine.files.read()[0].phase, Phase::Attaching);
    });
    machine.daemon(async |harness| {
        harness.engine.restore(connected([machine.client.clone()])).await;
        harness.assert_empty().await;
        assert_eq!(harness.events.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn partitions_are_the_same_after_a_restart() {
    let machine = Machine::new();
    machine.simulated.set_partitions(3);
    let attached = machine.attached_before(Lifetime::Persistent);
    assert_eq!(attached.partitions.len(), 3);
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        assert_eq!(harness.engine.find(attached.id).unwrap().partitions, attached.partitions);
    });
}

#[test]
fn the_grace_time_continues_after_a_restart() {
    let machine = Machine::with_stored_holds();
    let attached = machine.daemon(async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&machine.client, Lifetime::Mount).await.unwrap();
        machine.client.disconnect(&harness.engine);
        harness.engine.flush_events().await;
        attached
    });
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        harness.start_udev(0);
        assert!(harness.engine.find(attached.id).is_some());
        tokio::time::sleep(harness.engine.settings().mount_grace).await;
        harness.assert_empty().await;
    });
}

#[test]
fn a_lazy_detach_continues_after_a_restart() {
    let machine = Machine::with_stored_holds();
    let detaching = machine.daemon(async |harness| {
        harness.start_udev(0);
        let attached = harness.attach(&machine.client, Lifetime::Mount).await.unwrap();
        machine.simulated.open_elsewhere(attached.device.number);
        harness.engine.detach(attached.id, true).await.unwrap();
        harness.settle().await;
        harness.engine.find(attached.id).unwrap()
    });
    machine.daemon(async |harness| {
        harness.engine.restore(connected([])).await;
        let found = harness.engine.find(detaching.id).unwrap();
        assert_eq!((found.state, found.ownership), (State::Detaching, detaching.ownership));
    });
}

/// The last daemon died while it reverted the detach: the kernel no longer ends the device, and no event was published.
#[test]
fn a_half_reverted_detach_continues_after_a_restart() {
    for lifetime in [Lifetime::Mount, Lifetime::Persistent] {
        let machine = Machine::with_stored_holds();
        let detaching = machine.daemon(async |harness| {
            harness.start_udev(0);
            let attached = harness.attach(&machine.client, lifetime).await.unwrap();
            machine.simulated.open_elsewhere(attached.device.number);
            harness.engine.detach(attached.id, true).await.unwrap();
            harness.settle().await;
            attached
        });
        let number = detaching.device.number;
        machine.simulated.set_autoclear(number, false);
        machine.daemon(async |harness| {
            harness.start_udev(0);
            harness.engine.restore(connected([])).await;
            assert_eq!(harness.engine.find(detaching.id).unwrap().state, State::Detaching);
            machine.simulated.close_elsewhere(number);
            harness.settle().await;
            harness.assert_empty().await;
        });
    }
}
