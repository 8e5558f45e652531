//! udev that does not run, whose events do not arrive, or that is slow.

use std::time::Duration;

use loopd_common::Lifetime;
use tokio::time::Instant;

use super::harness::{Client, Harness};
use crate::simulated::Simulated;
use crate::warning::Silence;
use crate::{Snapshot, Warning};

const SOON: Duration = Duration::from_secs(1);

async fn attach(harness: &Harness) -> (Snapshot, Duration) {
    let begin = Instant::now();
    let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    (attached, begin.elapsed())
}

#[tokio::test(start_paused = true)]
async fn without_udev_an_attach_takes_less_than_a_second_and_the_next_none() {
    let harness = Harness::new(Simulated::new());
    harness.machine.end_udev();
    harness.machine.set_partitions(2);
    let (attached, took) = attach(&harness).await;
    assert!(took < SOON, "{took:?}");
    assert_eq!(attached.warnings, [Warning::UdevSilent(Silence::NotRunning)]);
    assert_eq!(attached.partitions.len(), 2);
    let (next, took) = attach(&harness).await;
    assert_eq!(next.warnings, attached.warnings);
    assert_eq!(took, Duration::ZERO);
}

/// As in another network namespace: udev processes the device, and its events do not arrive.
#[tokio::test(start_paused = true)]
async fn results_of_udev_whose_events_do_not_arrive_are_read_from_its_database() {
    let harness = Harness::new(Simulated::new());
    let deaf = tokio::spawn({
        let machine = harness.machine.clone();
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                machine.lose_uevents();
            }
        }
    });
    let (attached, took) = attach(&harness).await;
    assert!(took < SOON, "{took:?}");
    assert_eq!(attached.warnings, [Warning::UdevSilent(Silence::NotHeard)]);
    assert_ne!(attached.file_system, crate::kernel::FileSystem::default());
    deaf.abort();
}

#[tokio::test(start_paused = true)]
async fn an_attach_waits_for_a_slow_udev_without_a_warning() {
    let harness = Harness::new(Simulated::new());
    let (engine, machine) = (std::sync::Arc::clone(&harness.engine), harness.machine.clone());
    let slow = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(5)).await;
        while let Some(event) = machine.take_uevent() {
            engine.observe(event);
        }
    });
    let (attached, took) = attach(&harness).await;
    assert_eq!((attached.warnings, took.as_secs()), (vec![], 5));
    slow.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_udev_that_returns_ends_the_silence() {
    let harness = Harness::new(Simulated::new());
    harness.machine.end_udev();
    let (attached, _) = attach(&harness).await;
    while let Some(event) = harness.machine.take_uevent() {
        harness.engine.observe(event);
    }
    assert_eq!(harness.engine.find(attached.id).unwrap().warnings, []);
}
