//! Requests for a file that is attached already.

use std::collections::HashSet;
use std::sync::Arc;

use loopd_common::{ErrorKind, Lifetime, Overlap, State};

use super::harness::{Client, Harness};
use crate::AttachRequest;

#[tokio::test(start_paused = true)]
async fn a_file_is_not_attached_twice_where_that_is_not_wanted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let with = |overlap, offset| AttachRequest {
        overlap,
        offset,
        lifetime: Lifetime::Persistent,
        ..AttachRequest::default()
    };
    // All at once: one attaches, the others find it.
    let mut attaches = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (engine, client) = (Arc::clone(&harness.engine), client.clone());
        let request = with(Overlap::Reuse, 0);
        attaches.spawn(async move { engine.attach(1, request, &client).await.unwrap().id });
    }
    let ids: HashSet<_> = attaches.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    for request in [with(Overlap::Refuse, 0), with(Overlap::Reuse, 512)] {
        let error = harness.attach_with(&client, request).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Overlap, "{error}");
    }
    let id = *ids.iter().next().unwrap();
    harness.machine.open_elsewhere(0);
    harness.engine.detach(id, true).await.unwrap();
    let stranger = Client::new(":1.2", 8);
    let error = harness.attach_with(&stranger, with(Overlap::Reuse, 0)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overlap, "a detach of others is not taken back");
    let reused = harness.attach_with(&client, with(Overlap::Reuse, 0)).await.unwrap();
    assert_eq!((reused.id, reused.state), (id, State::Attached));
    harness.machine.close_elsewhere(0);
    harness.settle().await;
    harness.agree();
    harness.engine.detach(id, false).await.unwrap();

    // One that no event has told of yet.
    harness.machine.attach_elsewhere(1);
    let error = harness.attach_with(&client, with(Overlap::Refuse, 0)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overlap);
}

/// Another user could show other bytes on such a device while the one that it is given to reads it.
#[tokio::test(start_paused = true)]
async fn a_device_that_others_can_change_is_not_given_back() {
    let (root, owner, stranger) = (Client::new(":1.1", 0), Client::new(":1.2", 7), Client::new(":1.3", 8));
    let reuse = || AttachRequest {
        overlap: Overlap::Reuse,
        lifetime: Lifetime::Persistent,
        ..AttachRequest::default()
    };
    for (first, given, refused) in [(&owner, &owner, vec![&root, &stranger]), (&root, &stranger, vec![])] {
        let harness = Harness::with_udev();
        let id = harness.attach_with(first, reuse()).await.unwrap().id;
        for other in refused {
            let error = harness.attach_with(other, reuse()).await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Overlap);
            assert!(error.message.contains("it belongs to user 7"), "{error}");
        }
        assert_eq!(harness.attach_with(given, reuse()).await.unwrap().id, id);
        let other_blocks = AttachRequest { block_size: 4096, ..reuse() };
        let error = harness.attach_with(given, other_blocks).await.unwrap_err();
        assert!(error.message.contains("block size"), "{error}");
        harness.engine.detach(id, false).await.unwrap();
    }
    // What another daemon has set up for a user is foreign to loopd, and that user's anyway.
    for (uid, is_given) in [(0, true), (7, false)] {
        let harness = Harness::with_udev();
        let number = harness.machine.set_up(1, uid);
        let reused = harness.attach_with(&root, reuse()).await;
        assert_eq!(reused.is_ok_and(|reused| reused.device.number == number), is_given, "uid {uid}");
    }
}
