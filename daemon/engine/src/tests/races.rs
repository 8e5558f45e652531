//! Calls and ends that meet: what was answered holds, and what was never finished is found again.

use std::time::Duration;

use loopd_common::{Lifetime, Overlap, State};

use super::harness::{Client, Harness};
use super::restart::{connected, run_daemon};
use crate::simulated::{Files, Interference, Simulated};
use crate::{AttachRequest, Store as _};

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
async fn a_device_that_is_given_back_for_good_survives_the_client_that_attached_it() {
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
async fn a_persistent_attach_that_is_given_up_half_way_keeps_its_announcement() {
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
fn an_error_at_the_start_of_the_daemon_costs_a_living_client_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Mount] {
        for failing in 1..12 {
            for vanishes in [false, true] {
                restarts_with_an_error(lifetime, failing, vanishes);
            }
        }
    }
}

/// One call to the kernel fails while the next daemon takes up what the last one has left.
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
fn what_could_not_be_looked_at_and_is_gone_leaves_nothing() {
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
