//! Changes of an attached device.

use std::sync::atomic::Ordering;
use std::time::Duration;

use loopd_common::Lifetime;

use super::harness::{Client, Harness};
use crate::Store as _;
use crate::kernel::Change;
use crate::simulated::{Files, Simulated};

#[tokio::test(start_paused = true)]
async fn a_change_that_fails_at_any_step_changes_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let other = if lifetime == Lifetime::Client { Lifetime::Persistent } else { Lifetime::Client };
        for failing in 1.. {
            let harness = Harness::with_udev();
            let client = Client::new(":1.1", 7);
            let attached = harness.attach(&client, lifetime).await.unwrap();
            let before = harness.machine.bound();
            let reached = harness.fail_at(failing);
            let changed = harness.engine.set_lifetime(attached.id, other, &client).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(failing > 1 && changed.is_ok(), "no step failed");
                break;
            }
            harness.settle().await;
            harness.agree();
            if changed.is_err() {
                assert_eq!(harness.engine.find(attached.id).unwrap().ownership, attached.ownership);
                assert_eq!(harness.machine.bound(), before);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn devices_of_users_other_than_root_are_marked_untrusted() {
    let harness = Harness::with_udev();
    let (user, root) = (Client::new(":1.1", 7), Client::new(":1.2", 0));
    let is_untrusted = |id| {
        let sequence = harness.engine.find(id).unwrap().device.disk_sequence;
        harness.machine.is_untrusted(sequence)
    };
    let of_user = harness.attach(&user, Lifetime::Client).await.unwrap().id;
    let of_root = harness.attach(&root, Lifetime::Client).await.unwrap().id;
    assert!(is_untrusted(of_user) && !is_untrusted(of_root));
    harness.engine.replace_backing_file(of_user, 2.into(), 0).await.unwrap();
    harness.engine.replace_backing_file(of_root, 2.into(), 0).await.unwrap();
    assert!(is_untrusted(of_user) && !is_untrusted(of_root), "replaced by root");
    harness.engine.replace_backing_file(of_root, 3.into(), 7).await.unwrap();
    assert!(is_untrusted(of_root), "replaced by a user");
    for (client, expected) in [(&root, false), (&user, true)] {
        let number = harness.machine.attach_elsewhere(9);
        harness.settle().await;
        let foreign = harness.engine.list().into_iter().find(|shown| shown.device.number == number).unwrap();
        harness.engine.set_lifetime(foreign.id, Lifetime::Client, client).await.unwrap();
        assert_eq!(is_untrusted(foreign.id), expected, "adopted");
    }
    user.disconnect(&harness.engine);
    root.disconnect(&harness.engine);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_replaced_file_keeps_its_object() {
    for moment in 0..60 {
        let harness = Harness::new(Simulated::random(moment));
        harness.start_udev(0);
        let client = Client::new(":1.1", 7);
        let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
        harness.engine.replace_backing_file(attached.id, 2.into(), 0).await.unwrap();
        harness.settle().await;
        let replaced = harness.engine.find(attached.id).unwrap();
        assert_eq!(replaced.device.backing_inode, 2);
        assert!(replaced.device.disk_sequence.0 > attached.device.disk_sequence.0);
        assert_eq!(replaced.file_system.kind, format!("fs{}", replaced.device.disk_sequence));
        harness.agree();
        client.disconnect(&harness.engine);
        harness.assert_empty().await;
    }
}

/// Otherwise the next daemon would take another program's device for this one.
#[tokio::test(start_paused = true)]
async fn no_other_file_is_expected_after_a_replacement() {
    for failing in 1.. {
        let machine = Simulated::new();
        let files = Files::on(&machine);
        let harness = Harness::with_files(machine, files.clone());
        harness.start_udev(0);
        let client = Client::new(":1.1", 7);
        let attached = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        let reached = harness.fail_at(failing);
        let replaced = harness.engine.replace_backing_file(attached.id, 2.into(), 0).await;
        let saved = files.read();
        assert_eq!(saved.iter().map(|saved| saved.next_file).collect::<Vec<_>>(), [None], "{failing}");
        harness.settle().await;
        let shown = harness.engine.find(attached.id).unwrap().device.disk_sequence;
        assert_eq!(files.read()[0].disk_sequence, shown, "{failing}");
        if !reached.load(Ordering::Relaxed) {
            return replaced.unwrap();
        }
    }
}

/// A scan for an earlier event reads the device while it is changed.
#[tokio::test(start_paused = true)]
async fn a_change_is_visible_at_the_reply_despite_scans() {
    for seed in 0..300 {
        let harness = Harness::new(Simulated::unhurried_random(seed));
        harness.start_udev(0);
        let client = Client::new(":1.1", 7);
        let attached = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        for block_size in [1024, 2048, 4096] {
            harness.engine.events_lost();
            tokio::time::sleep(Duration::from_micros(seed * 17)).await;
            harness.engine.change(attached.id, Change::BlockSize(block_size)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(3)).await;
            let shown = harness.engine.find(attached.id).unwrap().device.block_size;
            assert_eq!(shown, block_size, "seed {seed}");
        }
    }
}

/// A scan that has read the device before the change does not count.
#[tokio::test(start_paused = true)]
async fn each_change_of_a_device_is_counted() {
    let harness = Harness::with_udev();
    let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Client).await.unwrap();
    let engine = &harness.engine;
    let changes = || engine.state().records.get(&attached.id).unwrap().changes;
    let before = changes();
    engine.update(attached.id, |_| {});
    assert_eq!(changes(), before, "nothing has changed");
    // The device is as requested already, but a scan may have read an earlier state.
    engine.change(attached.id, Change::DirectIo(false)).await.unwrap();
    assert_eq!(changes(), before + 1);
    engine.update(attached.id, |record| record.device.size += 512);
    assert_eq!(changes(), before + 2);
}

#[tokio::test(start_paused = true)]
async fn a_change_of_a_partition_is_recorded_and_published() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    let attached = harness.attach(&Client::new(":1.1", 7), Lifetime::Client).await.unwrap();
    harness.settle().await;
    let before = harness.events.load(Ordering::Relaxed);
    for _ in 0..2 {
        harness.engine.update_partition(attached.id, 2, |partition| {
            partition.file_system.label = "new".to_owned();
        });
    }
    harness.engine.flush_events().await;
    let labels = harness.engine.find(attached.id).unwrap().partitions;
    let labels: Vec<_> = labels.iter().map(|partition| partition.file_system.label.as_str()).collect();
    assert_eq!(labels, ["", "new"]);
    assert_eq!(harness.events.load(Ordering::Relaxed), before + 1, "the second time nothing has changed");
    harness.agree();
}
