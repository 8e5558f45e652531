//! Requests for a file that is attached already.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use loopd_common::{ErrorKind, Lifetime, Overlap, State};

use super::harness::{Client, Harness};
use crate::AttachRequest;
use crate::simulated::Simulated;

#[tokio::test(start_paused = true)]
async fn a_file_is_not_attached_twice_if_overlap_is_refused() {
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
        attaches.spawn(async move { engine.attach(1.into(), request, &client).await.unwrap().id });
    }
    let ids: HashSet<_> = attaches.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    for request in [with(Overlap::Refuse, 0), with(Overlap::Reuse, 512)] {
        let error = harness.attach_with(&client, request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overlap, "{error}");
    }
    let id = *ids.iter().next().unwrap();
    harness.machine.open_elsewhere(0);
    harness.engine.detach(id, true).await.unwrap();
    let stranger = Client::new(":1.2", 8);
    let error = harness.attach_with(&stranger, with(Overlap::Reuse, 0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overlap, "a detach of another user is not reverted");
    let reused = harness.attach_with(&client, with(Overlap::Reuse, 0)).await.unwrap();
    assert_eq!((reused.id, reused.state), (id, State::Attached));
    harness.machine.close_elsewhere(0);
    harness.settle().await;
    harness.agree();
    harness.engine.detach(id, false).await.unwrap();

    // A device whose event has not arrived yet.
    harness.machine.attach_elsewhere(1);
    let error = harness.attach_with(&client, with(Overlap::Refuse, 0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overlap);
}

/// The other user could show other bytes on the device while the caller reads it.
#[tokio::test(start_paused = true)]
async fn a_device_that_others_can_change_is_not_reused() {
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
            assert_eq!(error.kind(), ErrorKind::Overlap);
            assert!(error.to_string().contains("it belongs to user 7"), "{error}");
        }
        assert_eq!(harness.attach_with(given, reuse()).await.unwrap().id, id);
        let other_blocks = AttachRequest { block_size: 4096, ..reuse() };
        let error = harness.attach_with(given, other_blocks).await.unwrap_err();
        assert!(error.to_string().contains("block size"), "{error}");
        harness.engine.detach(id, false).await.unwrap();
    }
    // A device that another daemon has set up for a user is foreign, and that user can change it.
    for (uid, is_given) in [(0, true), (7, false)] {
        let harness = Harness::with_udev();
        let number = harness.machine.set_up(1, uid);
        let reused = harness.attach_with(&root, reuse()).await;
        assert_eq!(reused.is_ok_and(|reused| reused.device.number == number), is_given, "uid {uid}");
    }
}

fn request(overlap: Overlap, lifetime: Lifetime) -> AttachRequest {
    AttachRequest { overlap, lifetime, ..AttachRequest::default() }
}

#[tokio::test(start_paused = true)]
async fn another_file_and_another_part_of_the_file_do_not_overlap() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let part =
        |offset| AttachRequest { offset, size_limit: 512, ..request(Overlap::Refuse, Lifetime::Persistent) };
    harness.engine.attach(1.into(), part(0), &client).await.unwrap();
    harness.engine.attach(2.into(), part(0), &client).await.unwrap();
    harness.engine.attach(1.into(), part(512), &client).await.unwrap();
    let error = harness.engine.attach(1.into(), part(0), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overlap);
}

#[tokio::test(start_paused = true)]
async fn a_device_is_reused_only_if_it_satisfies_the_request() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let reuse = |file: u64, read_only: bool, number: Option<u32>| {
        let request = AttachRequest { read_only, number, ..request(Overlap::Reuse, Lifetime::Persistent) };
        harness.engine.attach(file.into(), request, &client)
    };
    let read_only = reuse(1, true, None).await.unwrap();
    let error = reuse(1, false, None).await.unwrap_err();
    assert!(error.to_string().contains("it is read-only"), "{error}");
    assert_eq!(reuse(1, true, None).await.unwrap().id, read_only.id);

    let writable = reuse(2, false, None).await.unwrap();
    assert_eq!(reuse(2, false, None).await.unwrap().id, writable.id);
    assert_eq!(reuse(2, true, None).await.unwrap().id, writable.id);
    let number = writable.device.number;
    assert_eq!(reuse(2, false, Some(number)).await.unwrap().id, writable.id);
    let error = reuse(2, false, Some(number + 7)).await.unwrap_err();
    assert!(error.to_string().contains("it is not the requested device"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_foreign_device_is_reused_only_if_only_root_writes_its_file() {
    for users_write in [false, true] {
        let harness = Harness::with_udev();
        if users_write {
            harness.machine.let_users_write();
        }
        let number = harness.machine.attach_elsewhere(1);
        let client = Client::new(":1.1", 7);
        let reused = harness.attach_with(&client, request(Overlap::Reuse, Lifetime::Persistent));
        match reused.await {
            Ok(reused) => assert!(!users_write && reused.device.number == number),
            Err(error) => assert!(
                users_write && error.to_string().contains("users other than root can write to its file"),
                "{error}"
            ),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn reuse_extends_only_a_lifetime_that_would_end_too_early() {
    use Lifetime::{Client as Bound, Mount, Persistent};
    let (first, second) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
    let root = Client::new(":1.3", 0);
    let of_first = Some(first.id.clone());
    let of_second = Some(second.id.clone());
    for (owner, had, is_mounted, wanted, expected) in [
        (&first, Bound, false, Persistent, (Persistent, None)),
        (&first, Bound, false, Bound, (Bound, of_first.clone())),
        (&first, Bound, false, Mount, (Bound, of_first.clone())),
        (&first, Persistent, false, Bound, (Persistent, None)),
        (&first, Persistent, false, Mount, (Persistent, None)),
        (&first, Persistent, false, Persistent, (Persistent, None)),
        (&first, Mount, false, Bound, (Mount, of_first)),
        (&first, Mount, false, Mount, (Mount, of_second)),
        (&first, Mount, true, Mount, (Mount, None)),
        (&first, Mount, false, Persistent, (Persistent, None)),
        (&root, Bound, false, Persistent, (Bound, Some(root.id.clone()))),
        (&root, Mount, false, Mount, (Mount, Some(root.id.clone()))),
    ] {
        let case = format!("{had:?}, mounted: {is_mounted}, reused as {wanted:?}");
        let harness = Harness::with_udev();
        let attached = harness.attach(owner, had).await.unwrap();
        if is_mounted {
            harness.machine.mount(attached.device.number);
            harness.settle().await;
        }
        let reused = harness.attach_with(&second, request(Overlap::Reuse, wanted)).await.unwrap();
        assert_eq!(reused.id, attached.id, "{case}");
        let ownership = reused.ownership.unwrap();
        assert_eq!((ownership.lifetime, ownership.client), expected, "{case}");
        assert_eq!(ownership.uid, owner.uid, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_cannot_be_examined_is_an_error_and_one_that_hangs_is_a_timeout() {
    let harness = Harness::new(Simulated::new());
    harness.machine.set_udev(false);
    let client = Client::new(":1.1", 7);
    // It shows the same file.
    harness.machine.attach_elsewhere(1);
    // The second step reads the state of the foreign device.
    let reached = harness.fail_at(2);
    let refuse = || request(Overlap::Refuse, Lifetime::Persistent);
    let error = harness.attach_with(&client, refuse()).await.unwrap_err();
    assert!(reached.load(Ordering::Relaxed));
    assert_eq!(error.kind(), ErrorKind::Kernel);
    assert!(error.to_string().contains("cannot tell whether"), "{error}");
    let error = harness.attach_with(&client, refuse()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overlap, "it can be examined now");

    let hung = harness.machine.attach_elsewhere(9);
    harness.machine.hang(hung);
    let error = harness.engine.attach(2.into(), refuse(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("cannot tell whether"), "{error}");
}

/// The server of a FUSE file has ended, for example. Otherwise no file could be attached any more.
#[tokio::test(start_paused = true)]
async fn a_backing_file_that_cannot_be_examined_is_no_overlap() {
    let harness = Harness::new(Simulated::new());
    harness.machine.set_udev(false);
    let broken = harness.machine.attach_elsewhere(9);
    harness.machine.break_file(broken);
    let request = request(Overlap::Refuse, Lifetime::Persistent);
    harness.attach_with(&Client::new(":1.1", 7), request).await.unwrap();
}
