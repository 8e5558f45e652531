//! Lifetimes, and their changes.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Lifetime, State};

use super::harness::{Client, Harness};
use crate::AttachRequest;
use crate::simulated::{Interference, Simulated};

#[tokio::test(start_paused = true)]
async fn only_attachments_bound_to_the_client_end_with_it() {
    let harness = Harness::with_udev();
    let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
    let _ends = harness.attach(&first, Lifetime::Client).await.unwrap();
    let _ends_too = harness.attach(&first, Lifetime::Client).await.unwrap();
    let persistent = harness.attach(&first, Lifetime::Persistent).await.unwrap();
    let others = harness.attach(&second, Lifetime::Client).await.unwrap();
    first.disconnect(&harness.engine);
    harness.settle().await;
    let left: Vec<_> = harness.engine.list().iter().map(|attachment| attachment.id).collect();
    assert_eq!(left, [persistent.id, others.id]);
    harness.agree();
    second.disconnect(&harness.engine);
    harness.engine.detach(persistent.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_can_be_changed_and_a_lazy_detach_reverted() {
    let harness = Harness::with_udev();
    let (owner, other) = (Client::new(":1.1", 7), Client::new(":1.2", 0));
    let attached = harness.attach(&owner, Lifetime::Client).await.unwrap();
    let (id, number) = (attached.id, attached.device.number);
    harness.engine.set_lifetime(id, Lifetime::Persistent, &other).await.unwrap();
    owner.disconnect(&harness.engine);
    harness.settle().await;
    let persistent = harness.engine.find(id).unwrap();
    assert!(!persistent.device.autoclear);
    assert_eq!(
        persistent.ownership.as_ref().map(|ownership| (ownership.uid, ownership.client.clone())),
        Some((7, None))
    );
    harness.agree();

    harness.machine.open_elsewhere(number);
    harness.engine.detach(id, true).await.unwrap();
    harness.engine.set_lifetime(id, Lifetime::Client, &other).await.unwrap();
    harness.machine.close_elsewhere(number);
    harness.settle().await;
    assert_eq!(harness.engine.find(id).unwrap().state, State::Attached);
    harness.agree();
    other.disconnect(&harness.engine);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_attachment_bound_to_a_disconnected_client_ends() {
    let harness = Harness::with_udev();
    let owner = Client::new(":1.1", 7);
    let attached = harness.attach(&owner, Lifetime::Persistent).await.unwrap();
    let (leaving, engine) = (owner.clone(), Arc::clone(&harness.engine));
    harness.machine.interfere(move |_| {
        leaving.disconnect(&engine);
        Interference::None
    });
    harness.engine.set_lifetime(attached.id, Lifetime::Client, &owner).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_foreign_device_can_be_adopted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 0);
    harness.machine.attach_elsewhere(1);
    harness.settle().await;
    let foreign = harness.engine.list().remove(0);
    harness.engine.set_lifetime(foreign.id, Lifetime::Client, &client).await.unwrap();
    harness.settle().await;
    harness.agree();
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn files_that_hang_do_not_keep_the_other_attachments_of_their_client() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let mut attached = Vec::new();
    for _ in 0..20 {
        attached.push(harness.attach(&client, Lifetime::Client).await.unwrap());
    }
    let hung = [&attached[0], &attached[7], &attached[19]];
    hung.iter().for_each(|one| harness.machine.hang(one.device.number));
    client.disconnect(&harness.engine);
    tokio::time::sleep(Duration::from_millis(500)).await;
    harness.engine.flush_events().await;
    let left: Vec<_> = harness.engine.list().iter().map(|one| one.id).collect();
    assert_eq!(left, hung.map(|one| one.id), "the others have ended before any time limit");
    harness.settle().await;
    for one in hung {
        assert_eq!(harness.engine.find(one.id).unwrap().state, State::Detaching);
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_in_progress_does_not_keep_the_other_attachments_of_the_client() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let locked = harness.attach(&client, Lifetime::Client).await.unwrap();
    harness.attach(&client, Lifetime::Client).await.unwrap();
    let alone = harness.engine.lock_device(locked.id).await.unwrap();
    client.disconnect(&harness.engine);
    harness.settle().await;
    let left: Vec<_> = harness.engine.list().iter().map(|one| one.id).collect();
    assert_eq!(left, [locked.id]);
    drop(alone);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_client_looks_at_each_device_for_its_event_only() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    for _ in 0..20 {
        harness.attach(&client, Lifetime::Client).await.unwrap();
    }
    harness.settle().await;
    let before = harness.machine.looks();
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
    assert_eq!(harness.machine.looks() - before, 20);
}

#[tokio::test(start_paused = true)]
async fn a_device_that_cannot_be_read_stays_listed_after_the_end_of_its_client() {
    let harness = Harness::new(Simulated::new());
    let client = Client::new(":1.1", 7);
    let request = AttachRequest { wait: false, ..AttachRequest::default() };
    let attached = harness.attach_with(&client, request).await.unwrap();
    harness.machine.set_unreadable(true);
    client.disconnect(&harness.engine);
    harness.settle().await;
    assert_eq!(harness.engine.find(attached.id).unwrap().state, State::Detaching);
    harness.machine.set_unreadable(false);
    harness.start_udev(0);
    harness.assert_empty().await;
}
