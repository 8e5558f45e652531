//! The work for an event or a call does not depend on other attachments.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use loopd_common::Lifetime;

use super::harness::{Client, Harness};
use crate::record::partitions_shown;

/// An image with the most partitions: each of its events names one partition.
#[tokio::test(start_paused = true)]
async fn the_work_for_an_event_does_not_grow_with_the_partitions() {
    const PARTITIONS: u32 = 255;
    let most = 10 * PARTITIONS as usize;
    for scans_itself in [false, true] {
        let harness = Harness::with_udev();
        harness.machine.set_partitions(PARTITIONS);
        if scans_itself {
            harness.machine.set_scans_itself();
        }
        let client = Client::new(":1.1", 7);
        let work = || {
            (harness.machine.partitions_read(), partitions_shown(), harness.events.load(Ordering::Relaxed))
        };
        let before = work();
        let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
        harness.settle().await;
        assert_eq!(harness.engine.find(attached.id).unwrap().partitions.len(), PARTITIONS as usize);
        harness.agree();
        let after = work();
        assert!(after.0 - before.0 <= most, "{} reads of a partition", after.0 - before.0);
        assert!(after.1 - before.1 <= most, "{} partitions compared", after.1 - before.1);
        assert_eq!(after.2 - before.2, 1, "it is published once, with its partitions");

        // All of them are removed and made again.
        let before = work();
        harness.machine.drop_partitions(attached.device.number);
        harness.settle().await;
        harness.agree();
        let after = work();
        assert!(after.0 - before.0 <= most, "{} reads of a partition", after.0 - before.0);
        assert!(after.1 - before.1 <= most, "{} partitions compared", after.1 - before.1);
        client.disconnect(&harness.engine);
        harness.assert_empty().await;
    }
}

/// The events of an attach name only its own device.
#[tokio::test(start_paused = true)]
async fn the_work_for_an_attach_does_not_grow_with_other_attachments() {
    for scans_itself in [false, true] {
        let harness = Harness::with_udev();
        if scans_itself {
            harness.machine.set_scans_itself();
        }
        let client = Client::new(":1.1", 7);
        let mut costs = Vec::new();
        for _ in 0..2 {
            harness.machine.set_partitions(2);
            let before = (harness.machine.partitions_read(), partitions_shown(), harness.machine.looks());
            let attached = harness.attach(&client, Lifetime::Persistent).await.unwrap();
            harness.settle().await;
            harness.engine.detach(attached.id, false).await.unwrap();
            harness.settle().await;
            let after = (harness.machine.partitions_read(), partitions_shown(), harness.machine.looks());
            costs.push((after.0 - before.0, after.1 - before.1, after.2 - before.2));
            // Attachments of another user.
            harness.machine.set_partitions(100);
            let other = Client::new(":1.2", 8);
            for _ in 0..5 {
                harness.attach(&other, Lifetime::Client).await.unwrap();
            }
            harness.settle().await;
            harness.agree();
        }
        assert_eq!(costs[0], costs[1], "reads of partitions, partitions compared, reads of devices");
        assert!(costs[0].2 <= 40, "{} reads of devices for one attach and its end", costs[0].2);
    }
}

/// A mount causes no work for other devices.
#[tokio::test(start_paused = true)]
async fn a_mount_causes_work_for_its_device_only() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(255);
    let client = Client::new(":1.1", 7);
    let large = harness.attach(&client, Lifetime::Client).await.unwrap();
    harness.machine.set_partitions(0);
    let small = harness.attach(&client, Lifetime::Client).await.unwrap();
    harness.settle().await;
    let before = partitions_shown();
    harness.machine.mount(small.device.number);
    harness.settle().await;
    assert_eq!(partitions_shown(), before);
    assert_eq!(harness.engine.outline(small.id).unwrap().mount_points, [PathBuf::from("/mnt")]);
    harness.machine.mount_on(large.device.number, Some(200), PathBuf::from("/mnt/p"));
    harness.settle().await;
    assert_ne!(partitions_shown(), before);
    harness.agree();
    harness.machine.unmount(small.device.number);
    harness.machine.unmount(large.device.number);
    harness.settle().await;
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
}

/// udev's result for a device is kept until its record has it, those for partitions until they are removed.
#[tokio::test(start_paused = true)]
async fn what_udev_found_is_not_kept_for_free_devices() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    let kept = || harness.engine.state().processed.len();
    for round in 0..5 {
        let client = Client::new(&format!(":1.{round}"), 7);
        harness.attach(&client, Lifetime::Client).await.unwrap();
        let other = harness.machine.attach_elsewhere(1);
        harness.settle().await;
        assert_eq!(kept(), 2, "of the partitions");
        harness.machine.detach_elsewhere(other);
        client.disconnect(&harness.engine);
        harness.assert_empty().await;
        harness.settle().await;
        assert_eq!(kept(), 0);
    }
}
