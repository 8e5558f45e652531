//! Detaches, lazy and not lazy.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, State};

use super::harness::{Client, Harness};
use crate::AttachRequest;
use crate::kernel::FileSystem;
use crate::simulated::Simulated;

#[tokio::test(start_paused = true)]
async fn a_mounted_device_outlives_its_client_until_it_is_unmounted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
    harness.machine.mount(attached.device.number);
    client.disconnect(&harness.engine);
    harness.settle().await;
    assert_eq!(harness.engine.find(attached.id).unwrap().state, State::Detaching);
    harness.agree();
    harness.machine.unmount(attached.device.number);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_busy_device_is_unchanged() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let attached = harness.attach(&client, lifetime).await.unwrap();
        let before = harness.machine.bound();
        let number = attached.device.number;

        harness.machine.mount(number);
        let error = harness.engine.detach(attached.id, false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("mounted on /mnt"), "{error}");
        harness.machine.unmount(number);

        harness.machine.open_elsewhere(number);
        let error = harness.engine.detach(attached.id, false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("opened by a process"), "{error}");
        harness.engine.flush_events().await;
        harness.agree();
        assert_eq!(harness.machine.bound(), before);

        let (machine, engine) = (harness.machine.clone(), Arc::clone(&harness.engine));
        let passing = tokio::spawn(async move { engine.detach(attached.id, false).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        machine.close_elsewhere(number);
        passing.await.unwrap().unwrap();
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_detach_whose_event_is_lost_is_found_at_the_deadline() {
    let harness = Harness::new(Simulated::unhurried());
    let request = AttachRequest { wait: false, ..AttachRequest::default() };
    let attached = harness.attach_with(&Client::new(":1.1", 7), request).await.unwrap();
    let number = attached.device.number;
    harness.machine.open_elsewhere(number);
    let engine = Arc::clone(&harness.engine);
    let detaching = tokio::spawn(async move { engine.detach(attached.id, false).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    harness.machine.close_elsewhere(number);
    assert!(harness.machine.lose_uevents());
    detaching.await.unwrap().unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_lazy_detach_ends_at_the_last_close() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let harness = Harness::with_udev();
        let attached = harness.attach(&Client::new(":1.1", 7), lifetime).await.unwrap();
        harness.machine.open_elsewhere(attached.device.number);
        harness.engine.detach(attached.id, true).await.unwrap();
        assert_eq!(harness.engine.find(attached.id).unwrap().state, State::Detaching);
        harness.machine.close_elsewhere(attached.device.number);
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_used_device_names_devices_stacked_on_it() {
    for partition in [None, Some(2)] {
        let harness = Harness::with_udev();
        harness.machine.set_partitions(2);
        let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
        harness.machine.stack_on(harness.machine.attach_elsewhere(0), None);
        let stacked = harness.machine.stack_on(attached.device.number, partition);
        // Not settled: it is found without its event.
        let error = harness.engine.detach(attached.id, false).await.unwrap_err();
        let expected = format!("it is held by /dev/loop{stacked}, whose file is /dev/disk; end");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_claimed_device_names_possible_claimants() {
    for (kind, on) in [("ext4", ""), ("swap", " on /dev/loop0, /dev/loop0p1")] {
        let harness = Harness::with_udev();
        harness.machine.set_partitions(1);
        harness.machine.set_file_system(FileSystem { kind: kind.to_owned(), ..FileSystem::default() });
        let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
        harness.machine.claim_elsewhere(attached.device.number);
        let error = harness.engine.detach(attached.id, false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(&format!("it is claimed by swap{on}, by a file")), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_attachment_whose_device_cannot_be_read_is_not_ended() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(1);
    let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    let number = attached.device.number;
    harness.machine.set_unreadable(true);
    // Sends an event.
    harness.machine.drop_partitions(number);
    harness.settle().await;
    assert_eq!(harness.engine.locate(number).await.unwrap_err().kind(), ErrorKind::Kernel);
    assert!(harness.engine.find(attached.id).is_some(), "it is attached");
    harness.machine.set_unreadable(false);
    assert_eq!(harness.engine.locate(number).await.unwrap().id, attached.id);
    harness.engine.detach(attached.id, false).await.unwrap();
    harness.assert_empty().await;
}
