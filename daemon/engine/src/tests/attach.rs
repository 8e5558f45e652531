//! Attaching: each step that fails and each client that disconnects is undone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, State};

use super::harness::{Client, Harness};
use crate::AttachRequest;
use crate::simulated::{Files, Interference, Simulated};

#[tokio::test(start_paused = true)]
async fn an_attach_is_published_and_ends_with_its_client() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
    assert_eq!(attached.file_system.kind, format!("fs{}", attached.id), "it waited for udev");
    harness.engine.flush_events().await;
    harness.agree();
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn every_step_fails_in_turn_and_is_undone() {
    for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
        for failing in 1.. {
            let harness = Harness::with_udev();
            harness
                .machine
                .interfere(move |step| if step == failing { Interference::Fail } else { Interference::None });
            let client = Client::new(":1.1", 7);
            match harness.attach(&client, lifetime).await {
                Ok(_) => {
                    assert!(failing > 1, "no step failed");
                    break;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Kernel),
            }
            harness.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_disconnects_at_any_step_leaves_nothing() {
    for wait in [true, false] {
        for disconnecting in 1.. {
            let harness = Harness::with_udev();
            let client = Client::new(":1.1", 7);
            let reached = Arc::new(AtomicBool::new(false));
            let (seen, leaving, engine) = (Arc::clone(&reached), client.clone(), Arc::clone(&harness.engine));
            harness.machine.interfere(move |step| {
                if step == disconnecting {
                    seen.store(true, Ordering::Relaxed);
                    leaving.disconnect(&engine);
                }
                Interference::None
            });
            let request = AttachRequest { wait, ..AttachRequest::default() };
            let attached = harness.attach_with(&client, request).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(disconnecting > 1 && attached.is_ok(), "the client never disconnected");
                break;
            }
            assert_eq!(attached.unwrap_err().kind(), ErrorKind::AccessDenied);
            harness.assert_empty().await;
        }
    }
}

/// The steps above are calls of the kernel. This client also disconnects between them.
#[tokio::test(start_paused = true)]
async fn a_client_that_disconnects_at_any_moment_leaves_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        for moment in 0..120 {
            let harness = Harness::new(Simulated::random(moment));
            harness.start_udev(0);
            let client = Client::new(":1.1", 7);
            let (leaving, engine) = (client.clone(), Arc::clone(&harness.engine));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(moment * 80)).await;
                leaving.disconnect(&engine);
            });
            let attached = harness.attach(&client, lifetime).await;
            harness.settle().await;
            match attached {
                // It was attached before the client disconnected, and does not end with it.
                Ok(attached) if lifetime == Lifetime::Persistent => {
                    harness.engine.detach(attached.id, false).await.unwrap();
                }
                _ => {}
            }
            harness.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_attach_waits_for_udev_only_if_it_runs_and_times_out() {
    let harness = Harness::new(Simulated::new());
    let client = Client::new(":1.1", 7);
    let error = harness.attach(&client, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    harness.assert_empty().await;
    harness.machine.set_udev(false);
    let attached = harness.attach(&client, Lifetime::Client).await.unwrap();
    harness.engine.detach(attached.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_fails_while_in_use_is_published_until_its_last_close() {
    let harness = Harness::new(Simulated::new());
    let (machine, client) = (harness.machine.clone(), Client::new(":1.1", 7));
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        machine.open_elsewhere(0);
    });
    let error = harness.attach(&client, Lifetime::Persistent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(harness.engine.list()[0].state, State::Detaching);
    harness.start_udev(0);
    harness.machine.close_elsewhere(0);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_number_that_is_attached_again_is_another_attachment() {
    let harness = Harness::new(Simulated::new());
    harness.machine.set_udev(false);
    let ours = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    harness.machine.detach_elsewhere(ours.device.number);
    assert_eq!(harness.machine.attach_elsewhere(1), ours.device.number);
    // No event has arrived yet: the old identity must not detach the new device.
    let _gone = harness.engine.detach(ours.id, false).await;
    assert_eq!(harness.machine.bound().len(), 1);
    harness.engine.resync().await;
    harness.agree_after_flush().await;
    assert_eq!(harness.engine.list()[0].ownership, None);
}

#[tokio::test(start_paused = true)]
async fn a_node_made_for_an_attach_is_removed_at_its_end() {
    let harness = Harness::with_udev();
    let request = AttachRequest { number: Some(77), ..AttachRequest::default() };
    let attached = harness.attach_with(&Client::new(":1.1", 7), request).await.unwrap();
    harness.engine.detach(attached.id, false).await.unwrap();
    harness.assert_empty().await;
    assert_eq!(harness.machine.removed_nodes(), [77]);
}

#[tokio::test(start_paused = true)]
async fn an_attachment_that_cannot_be_saved_is_undone() {
    for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
        let machine = Simulated::new();
        let files = Files::on(&machine);
        let harness = Harness::with_files(machine, files.clone());
        harness.start_udev(0);
        files.set_full();
        for wait in [true, false] {
            let request = AttachRequest { lifetime, wait, ..AttachRequest::default() };
            let error = harness.attach_with(&Client::new(":1.1", 7), request).await.unwrap_err();
            assert!(error.to_string().contains("no space"), "{error}");
            harness.assert_empty().await;
        }
    }
}
