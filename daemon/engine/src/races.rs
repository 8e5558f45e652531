//! Calls and ends that meet: what was answered holds, and what was never finished is found again.

use std::time::Duration;

use loopd_common::{Lifetime, Overlap, State};

use super::crash::{Files, life, living};
use super::simulation::{Client, House};
use super::*;
use crate::simulated::{Interference, Simulated};

/// Longer than any call on the simulated machine takes.
const LONGEST: u64 = 30_000;

/// The moments at which a client disconnects, in microseconds after a call has begun.
fn moments() -> impl Iterator<Item = Duration> {
    (0..LONGEST).step_by(500).map(Duration::from_micros)
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_that_was_changed_survives_the_end_of_the_client_before() {
    for (seed, moment) in moments().enumerate() {
        let house = House::with_random_udev(seed as u64);
        let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
        let attached = house.attach(&first, Lifetime::Client).await.unwrap();
        house.settle().await;
        let (changed, ()) =
            tokio::join!(house.engine.set_lifetime(attached.id, Lifetime::Persistent, &second), async {
                tokio::time::sleep(moment).await;
                first.vanish(&house.engine);
            });
        house.settle().await;
        let found = house.engine.find(attached.id);
        match changed {
            Ok(()) => {
                assert_eq!(found.map(|found| found.state), Some(State::Attached), "{moment:?}");
                house.engine.detach(attached.id, false).await.unwrap();
            }
            Err(error) => assert_eq!(found, None, "{moment:?}: {error}"),
        }
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_is_given_back_for_good_survives_the_client_that_attached_it() {
    for (seed, moment) in moments().enumerate() {
        let house = House::with_random_udev(seed as u64);
        let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
        house.attach(&first, Lifetime::Client).await.unwrap();
        house.settle().await;
        let request = AttachRequest {
            lifetime: Lifetime::Persistent,
            overlap: Overlap::Reuse,
            ..AttachRequest::default()
        };
        let (reused, ()) = tokio::join!(house.attach_with(&second, request), async {
            tokio::time::sleep(moment).await;
            first.vanish(&house.engine);
        });
        house.settle().await;
        if let Ok(reused) = reused {
            let found = house.engine.find(reused.id);
            assert_eq!(found.map(|found| found.state), Some(State::Attached), "{moment:?}");
            house.engine.detach(reused.id, false).await.unwrap();
        }
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_persistent_attach_that_is_given_up_half_way_keeps_its_announcement() {
    let machine = Simulated::random(1);
    let files = Files::on(&machine);
    let house = House::with_files(machine, files.clone());
    let client = Client::new(":1.1", 7);
    let attach = house.attach(&client, Lifetime::Persistent);
    // The daemon ends while the kernel makes the device.
    assert!(tokio::time::timeout(Duration::from_micros(1), attach).await.is_err());
    assert_eq!(files.announced().len(), 1, "the next daemon would not know whose the device is");
    house.start_udev(0);
    let finished = house.attach(&client, Lifetime::Persistent).await.unwrap();
    assert_eq!(files.announced().len(), 1, "a finished attach is announced no more");
    house.engine.detach(finished.id, false).await.unwrap();
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
    let attached = life(&machine, &files, async |house| {
        house.start_udev(0);
        let attached = house.attach(&client, lifetime).await.unwrap();
        house.settle().await;
        attached
    });
    let attached = attached.unwrap();
    machine.die();
    life(&machine, &files, async |house| {
        house.fail_at(failing);
        house.engine.restore(living([client.clone()])).await;
        if vanishes {
            client.vanish(&house.engine);
        }
        house.engine.resync().await;
        house.start_udev(0);
        house.settle().await;
        machine.interfere(|_| Interference::None);
        let found = house.engine.find(attached.id);
        if vanishes && lifetime == Lifetime::Client {
            assert_eq!(found, None, "step {failing}");
        } else {
            let found = found.unwrap_or_else(|| panic!("step {failing}: it is gone"));
            assert_eq!(found.state, State::Attached, "step {failing}");
            let owner = found.ownership.unwrap_or_else(|| panic!("step {failing}: nobody owns it"));
            assert_eq!((owner.uid, owner.lifetime), (7, lifetime), "step {failing}");
            house.engine.detach(attached.id, false).await.unwrap();
        }
        house.settle().await;
        assert_eq!(machine.bound(), [], "step {failing}");
        assert!(files.read().is_empty(), "step {failing}");
        house.engine.attachments_of_a_uid.empty().await;
    })
    .unwrap();
}

#[test]
fn what_could_not_be_looked_at_and_is_gone_leaves_nothing() {
    let machine = Simulated::new();
    machine.keep_holds();
    let files = Files::on(&machine);
    let client = Client::new(":1.1", 7);
    life(&machine, &files, async |house| {
        house.start_udev(0);
        house.attach(&client, Lifetime::Client).await.unwrap();
        house.settle().await;
    });
    machine.die();
    life(&machine, &files, async |house| {
        machine.interfere(|_| Interference::Fail);
        house.engine.restore(living([client.clone()])).await;
        // Somebody else ends it before it can be looked at.
        machine.take_down(0);
        machine.interfere(|_| Interference::None);
        house.start_udev(0);
        house.settle().await;
        assert!(files.read().is_empty());
        house.engine.attachments_of_a_uid.empty().await;
    })
    .unwrap();
}
