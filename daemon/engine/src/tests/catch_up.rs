//! A list of all devices shows the current state, even if events have not arrived yet.

use loopd_common::{ErrorKind, Lifetime};

use super::harness::{Client, Harness};
use crate::simulated::Simulated;

fn numbers(harness: &Harness) -> Vec<u32> {
    harness.engine.list().iter().map(|shown| shown.device.number).collect()
}

#[tokio::test(start_paused = true)]
async fn a_device_of_another_program_is_there_before_its_event() {
    let harness = Harness::with_udev();
    let own = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    let foreign = harness.machine.attach_elsewhere(5);
    assert_eq!(numbers(&harness), [own.device.number], "the event has not arrived");
    harness.engine.catch_up().await.unwrap();
    let mut expected = [own.device.number, foreign];
    expected.sort_unstable();
    assert_eq!(numbers(&harness), expected);
    harness.machine.detach_elsewhere(foreign);
    harness.machine.mount_on(own.device.number, None, "/mnt/data".into());
    harness.engine.catch_up().await.unwrap();
    assert_eq!(numbers(&harness), [own.device.number]);
    assert_eq!(harness.engine.find(own.id).unwrap().mount_points.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn devices_that_are_as_before_are_not_read_again() {
    let harness = Harness::with_udev();
    for _ in 0..8 {
        harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    }
    harness.agree_after_flush().await;
    let before = harness.machine.status_reads();
    harness.engine.catch_up().await.unwrap();
    assert_eq!(harness.machine.status_reads(), before);
}

/// A hung file delays a list for a bounded time, and does not make it fail.
#[tokio::test(start_paused = true)]
async fn a_device_whose_file_hangs_delays_a_list_for_a_bounded_time() {
    let harness = Harness::new(Simulated::new());
    let hung = harness.machine.attach_elsewhere(5);
    harness.machine.hang(hung);
    let other = harness.machine.attach_elsewhere(6);
    let begin = tokio::time::Instant::now();
    harness.engine.catch_up().await.unwrap();
    assert!(begin.elapsed() <= crate::catch_up::PATIENCE, "{:?}", begin.elapsed());
    assert_eq!(numbers(&harness), [other]);
}

/// Many lists at the same time cost no more than a few.
#[tokio::test(start_paused = true)]
async fn lists_at_the_same_time_share_one_look() {
    let harness = Harness::new(Simulated::unhurried());
    harness.machine.attach_elsewhere(5);
    let lists = (0..100).map(|_| {
        let engine = std::sync::Arc::clone(&harness.engine);
        async move { engine.catch_up().await.unwrap() }
    });
    let mut all: tokio::task::JoinSet<()> = lists.collect();
    // A call during the first look needs another look.
    tokio::time::sleep(std::time::Duration::from_micros(100)).await;
    let foreign = harness.machine.attach_elsewhere(6);
    harness.engine.catch_up().await.unwrap();
    assert!(numbers(&harness).contains(&foreign));
    while all.join_next().await.is_some() {}
    assert!(harness.machine.full_looks() <= 3, "{}", harness.machine.full_looks());
}

#[tokio::test(start_paused = true)]
async fn a_list_that_cannot_be_brought_up_to_date_is_an_error() {
    let harness = Harness::with_udev();
    harness.machine.set_unreadable(true);
    assert_eq!(harness.engine.catch_up().await.unwrap_err().kind(), ErrorKind::Kernel);
    harness.machine.set_unreadable(false);
    harness.engine.catch_up().await.unwrap();
}
