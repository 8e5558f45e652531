//! A client disconnects or the daemon ends during a call: the result stays as it was returned.

use std::time::Duration;

use loopd_common::{Lifetime, Overlap, State};

use super::harness::{Client, Harness};
use crate::simulated::{Files, Simulated};
use crate::{AttachRequest, Store as _};

/// Longer than any call on the simulated machine takes.
const LONGEST: u64 = 30_000;

/// The moments at which a client disconnects, in microseconds after a call has begun.
fn moments() -> impl Iterator<Item = Duration> {
    (0..LONGEST).step_by(500).map(Duration::from_micros)
}

#[tokio::test(start_paused = true)]
async fn a_changed_lifetime_survives_the_end_of_the_earlier_client() {
    for (seed, moment) in moments().enumerate() {
        let harness = Harness::with_random_udev(seed as u64);
        let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
        let attached = harness.attach(&first, Lifetime::Client).await.unwrap();
        harness.settle().await;
        let (changed, ()) =
            tokio::join!(harness.engine.set_lifetime(attached.id, Lifetime::Persistent, &second), async {
                tokio::time::sleep(moment).await;
                first.disconnect(&harness.engine);
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
            first.disconnect(&harness.engine);
        });
        harness.settle().await;
        // If the device has ended at that moment, the file is attached again.
        let reused = reused.unwrap_or_else(|error| panic!("{moment:?}: {error}"));
        let found = harness.engine.find(reused.id);
        assert_eq!(found.map(|found| found.state), Some(State::Attached), "{moment:?}");
        harness.engine.detach(reused.id, false).await.unwrap();
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
    assert_eq!(files.announced().len(), 1, "the next daemon could not recognize the device");
    harness.start_udev(0);
    let finished = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    assert_eq!(files.announced().len(), 1, "a finished attach is no longer announced");
    harness.engine.detach(finished.id, false).await.unwrap();
}
