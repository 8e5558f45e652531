//! Partitions of attachments.

use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime};

use super::harness::{Client, Harness};
use crate::simulated::Simulated;
use crate::{AttachRequest, Limits, Settings, Snapshot};

#[tokio::test(start_paused = true)]
async fn a_waiting_attach_has_all_its_partitions_and_they_stay() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(3);
    let client = Client::new(":1.1", 7);
    let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
    let kinds: Vec<_> =
        attached.partitions.iter().map(|partition| partition.file_system.kind.as_str()).collect();
    assert_eq!(kinds, vec![format!("fs{}", attached.id); 3], "udev has processed each of them");
    // BLKRRPART by udev or anyone else.
    harness.machine.drop_partitions(attached.device.number);
    harness.settle().await;
    let partitions = harness.engine.find(attached.id).unwrap().partitions;
    let kinds: Vec<_> = partitions.iter().map(|partition| partition.file_system.kind.as_str()).collect();
    assert_eq!(kinds, vec![format!("fs{}", attached.id); 3], "they were made again");
    harness.agree();

    let request = AttachRequest { partition_scan: false, ..AttachRequest::default() };
    assert!(harness.attach_with(&client, request).await.unwrap().partitions.is_empty());
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
}

/// Linux 6.1 reads the table again while udev probes the partitions of the first reading.
#[tokio::test(start_paused = true)]
async fn a_waiting_attach_waits_for_partitions_that_are_made_again() {
    for moment in 0..100 {
        let harness = Harness::new(Simulated::random(moment));
        harness.start_udev(0);
        harness.machine.set_partitions(2);
        harness.machine.set_scans_itself();
        let machine = harness.machine.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 150)).await;
            machine.reread_partitions(0);
        });
        let client = Client::new(":1.1", 7);
        let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
        let kinds = |attached: &Snapshot| -> Vec<_> {
            attached.partitions.iter().map(|partition| partition.file_system.kind.clone()).collect()
        };
        assert_eq!(kinds(&attached), vec![format!("fs{}", attached.id); 2], "moment {moment}");
        harness.settle().await;
        assert_eq!(kinds(&harness.engine.find(attached.id).unwrap()), kinds(&attached), "moment {moment}");
        harness.agree();
        client.disconnect(&harness.engine);
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn partitions_count_against_their_owner() {
    let harness = Harness::with_udev();
    let settings = Settings { partitions: Limits { each: 100, all: 150 }, ..Settings::default() };
    harness.engine.configure(settings);
    harness.machine.set_partitions(60);
    let (user, other, root) = (Client::new(":1.1", 7), Client::new(":1.2", 8), Client::new(":1.3", 0));
    let first = harness.attach(&user, Lifetime::Client).await.unwrap();
    let error = harness.attach(&user, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(
        error.to_string().contains("has 60 partitions") && error.to_string().contains("may have 100"),
        "{error}"
    );
    harness.settle().await;
    assert_eq!(harness.machine.bound().len(), 1, "it is undone");
    harness.agree();
    for _ in 0..5 {
        harness.attach(&root, Lifetime::Client).await.unwrap();
    }

    // The limit also applies when the table is read again.
    harness.machine.set_partitions(150);
    let error = harness.engine.rescan(first.id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    harness.settle().await;
    assert_eq!(harness.engine.find(first.id).unwrap().partitions.len(), 100);
    harness.agree();

    // There is a limit for all users together, and ended partitions no longer count.
    harness.machine.set_partitions(60);
    harness.attach(&other, Lifetime::Client).await.unwrap();
    let error = harness.attach(&Client::new(":1.4", 9), Lifetime::Client).await.unwrap_err();
    assert!(error.to_string().contains("all users together have"), "{error}");
    user.disconnect(&harness.engine);
    harness.settle().await;
    harness.attach(&user.again(), Lifetime::Client).await.unwrap();
    for client in [&user.again(), &other, &root] {
        client.disconnect(&harness.engine);
    }
    harness.assert_empty().await;
    assert!(harness.engine.partition_quota.is_empty());
}
