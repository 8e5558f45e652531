//! Unlocking and locking on a simulated machine: every step fails, callers disconnect and the daemon stops at every
//! moment, other programs map, unmap and mount.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use loopd_common::{EncryptionType, ErrorKind, Lifetime, State};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use crate::kernel::FileSystem;
use crate::quota::Limits;
use crate::simulated::{Files, Interference, Simulated, SimulatedFile};
use crate::{
    AttachRequest, CleartextSnapshot, Error, MappingEvent, MountRequest, Settings, Snapshot, UnlockRequest,
    VolumeId,
};

/// All lifetimes.
const LIFETIMES: [Lifetime; 3] = [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent];

/// A request with the type, since the simulated images have no signatures.
pub fn secret() -> UnlockRequest<SimulatedFile> {
    UnlockRequest {
        secret: 0.into(),
        key_files: Vec::new(),
        header: None,
        kind: Some(EncryptionType::Luks),
        read_only: false,
        discard: false,
        key_size: 0,
        key_offset: 0,
        pim: 0,
        hidden: false,
        system: false,
    }
}

/// The cleartext of the whole device.
pub fn cleartext(attachment: &Snapshot) -> VolumeId {
    VolumeId { is_cleartext: true, ..whole(attachment) }
}

fn part(attachment: &Snapshot, number: u32) -> VolumeId {
    VolumeId { partition: Some(number), ..whole(attachment) }
}

async fn unlock(
    harness: &Harness,
    attachment: &Snapshot,
    client: &Client,
) -> Result<CleartextSnapshot, Error> {
    harness.engine.unlock(whole(attachment), secret(), client).await
}

/// An attachment of uid 7 that is unlocked.
async fn unlocked(harness: &Harness, client: &Client, lifetime: Lifetime) -> (Snapshot, CleartextSnapshot) {
    let attachment = harness.attach(client, lifetime).await.unwrap();
    let unlocked = unlock(harness, &attachment, client).await.unwrap();
    (attachment, unlocked)
}

fn crypto(usage: &str, kind: &str) -> FileSystem {
    FileSystem { usage: usage.to_owned(), kind: kind.to_owned(), ..FileSystem::default() }
}

/// Ends everything: what is unlocked is locked first. From now on no step fails.
async fn end(harness: &Harness, attachment: &Snapshot) {
    harness.machine.interfere(|_| Interference::None);
    match harness.engine.lock(whole(attachment), false).await {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    match harness.engine.detach(attachment.id, false).await {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_is_unlocked_mounted_unmounted_and_locked() {
    for lifetime in LIFETIMES {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let (attachment, unlocked) = unlocked(&harness, &client, lifetime).await;
        assert_eq!(unlocked.mapping.name, format!("loopd-{}", attachment.id));
        assert_eq!(unlocked.file_system.kind, format!("fs{}", unlocked.mapping.disk_sequence));
        assert_eq!(harness.engine.find(attachment.id).unwrap().cleartext, Some(unlocked.clone()));
        let held = usize::from(lifetime != Lifetime::Persistent);
        assert_eq!(harness.machine.mapping_holds(unlocked.mapping.number), Some((held, 0, held == 1)));
        harness.agree_after_flush().await;
        let directory = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
        let shown = harness.engine.find(attachment.id).unwrap();
        assert_eq!((shown.cleartext.unwrap().mount_points, shown.mount_points), (vec![directory], vec![]));
        assert!(harness.engine.is_mounted_for(cleartext(&attachment), 7));
        assert!(!harness.engine.is_mounted_for(cleartext(&attachment), 8));
        harness.engine.unmount(cleartext(&attachment), false, 7, true).await.unwrap();
        if lifetime == Lifetime::Mount {
            assert_eq!(harness.engine.find(attachment.id), None, "the reply comes after the end");
        } else {
            harness.engine.lock(whole(&attachment), false).await.unwrap();
            assert_eq!(harness.engine.find(attachment.id).unwrap().cleartext, None);
            assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
            let error = harness.engine.lock(whole(&attachment), false).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            harness.engine.detach(attachment.id, false).await.unwrap();
        }
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlock_that_fails_at_any_step_leaves_nothing() {
    for lifetime in LIFETIMES {
        for failing in 1.. {
            let harness = Harness::with_udev();
            let client = Client::new(":1.1", 7);
            let attachment = harness.attach(&client, lifetime).await.unwrap();
            let reached = harness.fail_at(failing);
            let result = unlock(&harness, &attachment, &client).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(failing > 3 && result.is_ok(), "no step failed");
                end(&harness, &attachment).await;
                break;
            }
            result.unwrap_err();
            harness.settle().await;
            harness.agree();
            assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
            assert!(harness.engine.cleartext_quota.is_empty());
            unlock(&harness, &attachment, &client).await.unwrap();
            end(&harness, &attachment).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_fails_at_any_step_can_be_repeated() {
    for lifetime in LIFETIMES {
        for lazy in [false, true] {
            for failing in 1.. {
                let harness = Harness::with_udev();
                let client = Client::new(":1.1", 7);
                let (attachment, _) = unlocked(&harness, &client, lifetime).await;
                let reached = harness.fail_at(failing);
                let locked = harness.engine.lock(whole(&attachment), lazy).await;
                if !reached.load(Ordering::Relaxed) {
                    assert!(failing > 1 && locked.is_ok(), "no step failed");
                    end(&harness, &attachment).await;
                    break;
                }
                harness.settle().await;
                harness.agree();
                end(&harness, &attachment).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_disconnects_during_an_unlock_leaves_nothing() {
    for moment in 0..60 {
        for lifetime in LIFETIMES {
            let harness = Harness::with_random_udev(moment);
            let (client, owner) = (Client::new(":1.1", 7), Client::new(":1.2", 7));
            let attachment = harness.attach(&owner, lifetime).await.unwrap();
            let (leaving, engine) = (client.clone(), Arc::clone(&harness.engine));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(moment * 250)).await;
                leaving.disconnect(&engine);
            });
            let result = unlock(&harness, &attachment, &client).await;
            harness.settle().await;
            harness.agree();
            if let Err(error) = result {
                assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}");
                assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
            }
            end(&harness, &attachment).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_stops_aborts_its_unlocks() {
    for moment in 0..60 {
        let harness = Harness::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        let engine = Arc::clone(&harness.engine);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 250)).await;
            engine.abort_calls();
        });
        let result = unlock(&harness, &attachment, &client).await;
        harness.settle().await;
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}");
            assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
        }
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlock_whose_mapping_is_removed_at_any_moment_leaves_nothing() {
    for moment in 0..60 {
        let harness = Harness::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        let (machine, number) = (harness.machine.clone(), attachment.device.number);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 250)).await;
            for (_, mapping) in machine.mappings_on(number) {
                machine.unmap_elsewhere(mapping.number);
            }
        });
        let result = unlock(&harness, &attachment, &client).await;
        harness.settle().await;
        harness.agree();
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        }
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_unlocks_at_once_one_is_refused() {
    for seed in 0..20 {
        let harness = Harness::with_random_udev(seed);
        let client = Client::new(":1.1", 7);
        let attachment = harness.attach(&client, Lifetime::Client).await.unwrap();
        let (one, other) =
            tokio::join!(unlock(&harness, &attachment, &client), unlock(&harness, &attachment, &client));
        let (made, refused) = if one.is_ok() { (one, other) } else { (other, one) };
        let (made, refused) = (made.unwrap(), refused.unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("another request unlocks it already"), "{refused}");
        harness.settle().await;
        assert_eq!(harness.engine.find(attachment.id).unwrap().cleartext, Some(made));
        let refused = unlock(&harness, &attachment, &client).await.unwrap_err();
        assert!(refused.to_string().contains("it is unlocked as /dev/dm-0 already"), "{refused}");
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_secret_costs_no_further_step() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    harness.machine.set_wrong_secret(true);
    let before = harness.machine.steps();
    let error = unlock(&harness, &attachment, &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongSecret, "{error}");
    assert_eq!(harness.machine.steps() - before, 3, "the secret, the other devices, and the key");
    harness.agree_after_flush().await;
    harness.machine.set_wrong_secret(false);
    unlock(&harness, &attachment, &client).await.unwrap();
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn a_mapping_of_another_program_with_the_same_name_is_left_alone() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    let (machine, number, before) =
        (harness.machine.clone(), attachment.device.number, harness.machine.steps());
    let name = format!("loopd-{}", attachment.id);
    harness.machine.interfere(move |step| {
        // The program is about to make it.
        if step == before + 3 {
            assert!(machine.map_elsewhere(number, None, &name));
        }
        Interference::None
    });
    let error = unlock(&harness, &attachment, &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert_eq!(harness.machine.steps() - before, 3, "nothing is undone");
    harness.settle().await;
    assert_eq!(harness.machine.mapping_holds(0), Some((0, 0, false)));
    assert!(harness.machine.unmap_elsewhere(0));
    harness.settle().await;
    end(&harness, &attachment).await;
}

/// Begins an unlock, which waits for its secret.
async fn begin_unlock(
    harness: &Harness,
    attachment: &Snapshot,
    request: UnlockRequest<SimulatedFile>,
    client: &Client,
) -> JoinHandle<Result<CleartextSnapshot, Error>> {
    harness.machine.set_secret_withheld(true);
    let (engine, volume, client) = (Arc::clone(&harness.engine), whole(attachment), client.clone());
    let unlocking = tokio::spawn(async move { engine.unlock(volume, request, &client).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!unlocking.is_finished());
    unlocking
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_is_withheld_delays_nobody() {
    let harness = Harness::with_udev();
    let (client, other) = (Client::new(":1.1", 7), Client::new(":1.2", 8));
    let both = twice(&harness, &client, [false, false]).await;
    let unlocking = begin_unlock(&harness, &both[0], secret(), &client).await;
    let begin = Instant::now();
    // The same file, through another device.
    harness.engine.mount(whole(&both[1]), &wanted(), &other).await.unwrap();
    harness.engine.unmount(whole(&both[1]), false, 8, true).await.unwrap();
    // The same device.
    harness.engine.set_lifetime(both[0].id, Lifetime::Client, &client).await.unwrap();
    let again = unlock(&harness, &both[0], &client).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Busy);
    assert!(again.to_string().contains("another request unlocks it already"), "{again}");
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert!(!unlocking.is_finished());
    harness.machine.set_secret_withheld(false);
    let unlocked = unlocking.await.unwrap().unwrap();
    assert_eq!(
        harness.machine.mapping_holds(unlocked.mapping.number),
        Some((1, 0, true)),
        "its new lifetime"
    );
    harness.engine.lock(whole(&both[0]), false).await.unwrap();
    harness.engine.detach(both[1].id, false).await.unwrap();
    end(&harness, &both[0]).await;
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_never_ends_leaves_nothing() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    let before = harness.machine.steps();
    let unlocking = begin_unlock(&harness, &attachment, secret(), &client).await;
    let error = unlocking.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let unlocking = begin_unlock(&harness, &attachment, secret(), &client).await;
    client.disconnect(&harness.engine);
    let error = unlocking.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}");
    assert_eq!(harness.machine.steps() - before, 2, "nothing was made, and nothing is undone");
    assert!(harness.engine.cleartext_quota.is_empty());
    harness.machine.set_secret_withheld(false);
    unlock(&harness, &attachment, &client.again()).await.unwrap();
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn what_changes_before_the_secret_ends_is_noticed() {
    let detected = || UnlockRequest { kind: None, ..secret() };
    for (change, expected, text) in [
        ("mount", ErrorKind::Busy, "is mounted on"),
        ("mount the other", ErrorKind::Busy, ""),
        ("replace", ErrorKind::Busy, "it has changed since its secret was read"),
        ("configure", ErrorKind::NotSupported, "the type luks is not among those"),
        ("detach", ErrorKind::NotFound, "is gone"),
    ] {
        let harness = Harness::with_udev();
        harness.machine.set_file_system(crypto("crypto", "crypto_LUKS"));
        let client = Client::new(":1.1", 7);
        // Only a read-only device can show another file.
        let both = twice(&harness, &client, [change == "replace", false]).await;
        harness.settle().await;
        let number = both[0].device.number;
        let unlocking = begin_unlock(&harness, &both[0], detected(), &client).await;
        match change {
            "mount" => harness.machine.mount(number),
            "mount the other" => harness.machine.mount(both[1].device.number),
            "replace" => {
                harness.machine.set_file_system(crypto("crypto", "BitLocker"));
                harness.engine.replace_backing_file(both[0].id, 5.into(), 7).await.unwrap();
                harness.settle().await;
            }
            "configure" => {
                let settings = harness.engine.settings();
                let unlock_types = vec![EncryptionType::BitLocker];
                harness.engine.configure(Settings { unlock_types, ..settings });
            }
            _ => harness.engine.detach(both[0].id, false).await.unwrap(),
        }
        harness.machine.set_secret_withheld(false);
        let error = unlocking.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), expected, "{change}: {error}");
        assert!(error.to_string().contains(text), "{change}: {error}");
        assert!(harness.engine.cleartext_quota.is_empty());
        both.iter().for_each(|attachment| harness.machine.unmount(attachment.device.number));
        harness.settle().await;
        harness.agree();
        assert_eq!(harness.machine.mappings_on(number), []);
        harness.engine.detach(both[1].id, false).await.unwrap();
        end(&harness, &both[0]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_used_cleartext_is_not_locked_unless_lazily() {
    for lifetime in LIFETIMES {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let (attachment, unlocked) = unlocked(&harness, &client, lifetime).await;
        let number = unlocked.mapping.number;
        let before = harness.engine.find(attachment.id);
        harness.machine.open_mapping_elsewhere(number);
        let error = harness.engine.lock(whole(&attachment), false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("it is opened by a process"), "{error}");
        harness.settle().await;
        assert_eq!(harness.engine.find(attachment.id), before);
        harness.agree();
        harness.machine.close_mapping_elsewhere(number);

        let directory = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
        let before = harness.engine.find(attachment.id);
        let error = harness.engine.lock(whole(&attachment), false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let expected = format!("mounted on {}; end that first, or lock lazily", directory.display());
        assert!(error.to_string().contains(&expected), "{error}");
        assert_eq!(harness.engine.find(attachment.id), before);
        harness.agree_after_flush().await;

        harness.engine.lock(whole(&attachment), true).await.unwrap();
        harness.settle().await;
        harness.agree();
        assert!(harness.machine.mount_table().has(&directory), "what is mounted stays");
        let error = unlock(&harness, &attachment, &client).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        harness.engine.unmount(cleartext(&attachment), false, 7, true).await.unwrap();
        harness.settle().await;
        assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlocked_device_is_not_detached_unless_lazily() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        for mounted in [false, true] {
            let harness = Harness::with_udev();
            let client = Client::new(":1.1", 7);
            let (attachment, _) = unlocked(&harness, &client, lifetime).await;
            let mut expected = "it is unlocked as /dev/dm-0".to_owned();
            if mounted {
                let directory =
                    harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
                expected.push_str(&format!(", which is mounted on {}", directory.display()));
            }
            let before = harness.engine.find(attachment.id);
            let error = harness.engine.detach(attachment.id, false).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(error.to_string().contains(&format!("{expected}; end that")), "{error}");
            assert_eq!(harness.engine.find(attachment.id), before);
            harness.agree_after_flush().await;
            harness.engine.detach(attachment.id, true).await.unwrap();
            if mounted {
                harness.settle().await;
                assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Detaching);
                harness.agree();
                harness.engine.unmount(cleartext(&attachment), false, 7, true).await.unwrap();
            }
            harness.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lazy_detach_of_a_mounted_cleartext_can_be_taken_back() {
    for (before, after) in
        [(Lifetime::Client, Lifetime::Persistent), (Lifetime::Persistent, Lifetime::Client)]
    {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let (attachment, _) = unlocked(&harness, &client, before).await;
        harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
        harness.engine.detach(attachment.id, true).await.unwrap();
        harness.engine.set_lifetime(attachment.id, after, &client).await.unwrap();
        harness.settle().await;
        harness.agree();
        harness.engine.unmount(cleartext(&attachment), false, 7, true).await.unwrap();
        harness.settle().await;
        assert!(harness.engine.find(attachment.id).unwrap().cleartext.is_some(), "it stays");
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_takes_the_cleartext_with_it() {
    for before in LIFETIMES {
        for after in LIFETIMES {
            for failing in 1.. {
                let harness = Harness::with_udev();
                let client = Client::new(":1.1", 7);
                let (attachment, _) = unlocked(&harness, &client, before).await;
                harness.settle().await;
                let shown = harness.engine.find(attachment.id).unwrap();
                let reached = harness.fail_at(failing);
                let changed = harness.engine.set_lifetime(attachment.id, after, &client).await;
                harness.settle().await;
                harness.agree();
                let now = harness.engine.find(attachment.id).unwrap();
                assert_eq!(now.cleartext, shown.cleartext);
                if changed.is_err() {
                    assert_eq!(now.ownership, shown.ownership, "nothing has changed");
                }
                end(&harness, &attachment).await;
                if !reached.load(Ordering::Relaxed) {
                    changed.unwrap();
                    break;
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_mounted_cleartext_outlives_its_client_until_it_is_unmounted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, unlocked) = unlocked(&harness, &client, Lifetime::Client).await;
    let directory = PathBuf::from("/mnt");
    assert!(harness.machine.mount_mapping(unlocked.mapping.number, directory.clone()));
    client.disconnect(&harness.engine);
    harness.settle().await;
    let shown = harness.engine.find(attachment.id).unwrap();
    assert_eq!(
        (shown.state, shown.cleartext.unwrap().mount_points),
        (State::Detaching, vec![directory.clone()])
    );
    harness.agree();
    harness.machine.unmount_from(&directory);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn the_lifetime_mount_counts_cleartexts() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, _) = unlocked(&harness, &client, Lifetime::Mount).await;
    let directory = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
    assert_eq!(harness.engine.find(attachment.id).unwrap().ownership.unwrap().client, None);
    client.disconnect(&harness.engine);
    tokio::time::sleep(Duration::from_secs(300)).await;
    harness.agree();
    assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
    harness.machine.unmount_from(&directory);
    harness.assert_empty().await;

    // Without a mount it ends after the grace time.
    let (_, _) = unlocked(&harness, &client.again(), Lifetime::Mount).await;
    client.again().disconnect(&harness.engine);
    tokio::time::sleep(harness.engine.settings().mount_grace).await;
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_mount_may_end_with_a_cleartext_that_is_locked_lazily() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, _) = unlocked(&harness, &client, Lifetime::Mount).await;
    let directory = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap();
    harness.engine.lock(whole(&attachment), true).await.unwrap();
    harness.machine.unmount_from(&directory);
    // The event of the mapping comes before that of the mount table.
    while let Some(event) = harness.machine.take_mapping_event() {
        harness.engine.observe_mapping(&event);
    }
    harness.assert_empty().await;
}

/// Attaches the same file twice, with these devices read-only.
async fn twice(harness: &Harness, client: &Client, read_only: [bool; 2]) -> [Snapshot; 2] {
    let mut both = Vec::new();
    for read_only in read_only {
        let request = AttachRequest { read_only, lifetime: Lifetime::Persistent, ..AttachRequest::default() };
        both.push(harness.attach_with(client, request).await.unwrap());
    }
    both.try_into().unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_are_used_twice_only_if_nobody_writes() {
    for read_only in [[false, false], [false, true], [true, false], [true, true]] {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let both = twice(&harness, &client, read_only).await;
        let writes = read_only != [true, true];
        unlock(&harness, &both[0], &client).await.unwrap();
        let again = unlock(&harness, &both[1], &client).await;
        assert_eq!(again.as_ref().err().map(Error::kind), writes.then_some(ErrorKind::Busy));
        if again.is_ok() {
            harness.engine.lock(whole(&both[1]), false).await.unwrap();
        }
        let mounted = harness.engine.mount(whole(&both[1]), &wanted(), &client).await;
        assert_eq!(mounted.as_ref().err().map(Error::kind), writes.then_some(ErrorKind::Busy));
        if mounted.is_ok() {
            harness.engine.unmount(whole(&both[1]), false, 7, true).await.unwrap();
        }
        harness.engine.lock(whole(&both[0]), false).await.unwrap();

        harness.machine.mount(both[0].device.number);
        let beside_a_mount = unlock(&harness, &both[1], &client).await;
        assert_eq!(beside_a_mount.as_ref().err().map(Error::kind), writes.then_some(ErrorKind::Busy));
        harness.machine.unmount(both[0].device.number);
        if beside_a_mount.is_ok() {
            harness.engine.lock(whole(&both[1]), false).await.unwrap();
        }
        harness.settle().await;
        harness.engine.detach(both[0].id, false).await.unwrap();
        harness.engine.detach(both[1].id, false).await.unwrap();
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_quota_is_for_each_user() {
    let harness = Harness::with_udev();
    let settings = harness.engine.settings();
    harness.engine.configure(Settings { cleartexts: Limits { each: 1, all: 10 }, ..settings });
    let (client, other) = (Client::new(":1.1", 7), Client::new(":1.2", 8));
    let attach = async |file: u64| {
        let request = AttachRequest { lifetime: Lifetime::Persistent, ..AttachRequest::default() };
        harness.engine.attach(file.into(), request, &client).await.unwrap()
    };
    let all = [attach(1).await, attach(2).await, attach(3).await];
    unlock(&harness, &all[0], &client).await.unwrap();
    let error = unlock(&harness, &all[1], &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
    unlock(&harness, &all[1], &other).await.unwrap();
    harness.engine.lock(whole(&all[0]), false).await.unwrap();
    unlock(&harness, &all[2], &client).await.unwrap();
    for attachment in &all {
        let _is_locked = harness.engine.lock(whole(attachment), false).await;
        harness.engine.detach(attachment.id, false).await.unwrap();
    }
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_mapping_that_another_program_removes_is_forgotten() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, unlocked) = unlocked(&harness, &client, Lifetime::Persistent).await;
    assert!(harness.machine.unmap_elsewhere(unlocked.mapping.number));
    harness.settle().await;
    harness.agree();
    assert_eq!(harness.engine.find(attachment.id).unwrap().cleartext, None);
    assert!(harness.engine.cleartext_quota.is_empty());

    // The event is lost.
    let again = unlock(&harness, &attachment, &client).await.unwrap();
    assert_ne!(again.mapping.disk_sequence, unlocked.mapping.disk_sequence);
    harness.settle().await;
    assert!(harness.machine.unmap_elsewhere(again.mapping.number));
    assert!(harness.machine.lose_uevents());
    harness.engine.events_lost();
    harness.settle().await;
    harness.agree();
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn events_of_mappings_update_what_is_on_them() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, unlocked) = unlocked(&harness, &client, Lifetime::Client).await;
    harness.settle().await;
    let event = |number, disk_sequence| MappingEvent {
        number,
        removed: false,
        disk_sequence: Some(disk_sequence),
        file_system: Some(crypto("filesystem", "xfs")),
    };
    let kind = || harness.engine.find(attachment.id).unwrap().cleartext.unwrap().file_system.kind;
    let (number, sequence) = (unlocked.mapping.number, unlocked.mapping.disk_sequence);
    let before = kind();
    harness.engine.observe_mapping(&event(number + 1, sequence));
    harness.engine.observe_mapping(&event(number, attachment.id));
    assert_eq!(kind(), before);
    harness.engine.observe_mapping(&event(number, sequence));
    assert_eq!(kind(), "xfs");
    // An event of an earlier mapping with this number.
    harness.engine.observe_mapping(&MappingEvent { removed: true, ..event(number, attachment.id) });
    assert_eq!(kind(), "xfs");
    harness.agree_after_flush().await;
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_another_program_has_mapped_is_not_unlocked() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    assert!(harness.machine.map_elsewhere(attachment.device.number, Some(1), "secret\u{1b}"));
    let error = harness.engine.unlock(part(&attachment, 1), secret(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("/dev/loop0p1 is held by /dev/dm-0 (secret\\u{1b}); end"), "{error}");
    let error = harness.engine.detach(attachment.id, false).await.unwrap_err();
    assert!(error.to_string().contains("it is held by /dev/dm-0 (secret\\u{1b})"), "{error}");
    harness.engine.unlock(part(&attachment, 2), secret(), &client).await.unwrap();
    let error = harness.engine.detach(attachment.id, false).await.unwrap_err();
    assert!(error.to_string().contains("it is /dev/loop0p2 is unlocked as /dev/dm-1, held by"), "{error}");
    harness.engine.lock(part(&attachment, 2), false).await.unwrap();
    assert!(harness.machine.unmap_elsewhere(0));
    harness.settle().await;
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_and_its_partitions_are_not_used_at_once() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    harness.machine.set_file_system(crypto("crypto", "crypto_LUKS"));
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    let first = harness.engine.unlock(part(&attachment, 1), secret(), &client).await.unwrap();
    assert_eq!(first.mapping.name, format!("loopd-{}p1", attachment.id));
    let error = harness.engine.unlock(whole(&attachment), secret(), &client).await.unwrap_err();
    assert!(error.to_string().contains("/dev/loop0p1 is unlocked as /dev/dm-0; lock it first"), "{error}");
    let error = harness.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.to_string().contains("it is unlocked as /dev/dm-0; mount that"), "{error}");
    let error = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap_err();
    assert!(error.to_string().contains("/dev/loop0p1 is unlocked as /dev/dm-0; lock it"), "{error}");
    harness.engine.unlock(part(&attachment, 2), secret(), &client).await.unwrap();
    harness.settle().await;
    harness.agree();
    let shown = harness.engine.find(attachment.id).unwrap();
    assert!(shown.partitions.iter().all(|shown| shown.cleartext.is_some()) && shown.cleartext.is_none());
    for number in [1, 2] {
        harness.engine.lock(part(&attachment, number), false).await.unwrap();
    }
    let error = harness.engine.lock(part(&attachment, 3), false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn only_what_may_be_encrypted_is_unlocked() {
    let detected = || UnlockRequest { kind: None, ..secret() };
    let with_header = || UnlockRequest { header: Some(0.into()), ..detected() };
    for (found, partitions, request, expected) in [
        (crypto("crypto", "crypto_LUKS"), 0, detected(), Ok(EncryptionType::Luks)),
        (crypto("crypto", "BitLocker"), 0, detected(), Ok(EncryptionType::BitLocker)),
        (crypto("crypto", "crypto_LUKS"), 1, detected(), Ok(EncryptionType::Luks)),
        (crypto("crypto", "other"), 0, detected(), Err("encrypted as other, which loopd does not unlock")),
        (crypto("filesystem", "ext4"), 0, secret(), Err("it is not encrypted: it is ext4")),
        (crypto("", ""), 0, detected(), Err("name the type (option type)")),
        (crypto("", ""), 0, with_header(), Ok(EncryptionType::Luks)),
        (crypto("", ""), 1, secret(), Err("it has a partition table")),
    ] {
        let harness = Harness::with_udev();
        harness.machine.set_partitions(partitions);
        harness.machine.set_file_system(found);
        let client = Client::new(":1.1", 7);
        let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
        let unlocked = harness.engine.unlock(whole(&attachment), request, &client).await;
        match (unlocked, expected) {
            (Ok(unlocked), Ok(kind)) => assert_eq!(unlocked.mapping.kind, kind),
            (Err(error), Err(text)) => {
                assert_eq!(error.kind(), ErrorKind::NotSupported);
                assert!(error.to_string().contains(text), "{error}");
            }
            (unlocked, expected) => panic!("{unlocked:?}, {expected:?}"),
        }
        end(&harness, &attachment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn types_and_cleartexts_are_refused_where_they_do_not_belong() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let (attachment, _) = unlocked(&harness, &client, Lifetime::Persistent).await;
    let error = harness.engine.unlock(cleartext(&attachment), secret(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
    harness.engine.lock(whole(&attachment), false).await.unwrap();
    let settings = harness.engine.settings();
    harness.engine.configure(Settings { unlock_types: vec![EncryptionType::BitLocker], ..settings });
    let error = unlock(&harness, &attachment, &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert!(error.to_string().contains("the type luks is not among those"), "{error}");
    let error = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn a_read_only_cleartext_is_mounted_read_only() {
    let harness = Harness::with_udev();
    harness.machine.set_cleartext_file_system(crypto("filesystem", "ext4"));
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    let request = UnlockRequest { read_only: true, ..secret() };
    let unlocked = harness.engine.unlock(whole(&attachment), request, &client).await.unwrap();
    assert!(unlocked.mapping.read_only);
    let writable = MountRequest { options: "rw".to_owned(), ..MountRequest::default() };
    let error = harness.engine.mount(cleartext(&attachment), &writable, &client).await.unwrap_err();
    assert!(error.to_string().contains("the device is read-only"), "{error}");
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn the_superblock_of_a_cleartext_is_checked() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let mut contents = vec![0; 4096];
    contents[1024 + 0x38..1024 + 0x3a].copy_from_slice(b"\x53\xef");
    contents[1024 + 0xe4] = 1;
    harness.machine.set_cleartext_contents(contents);
    let (attachment, _) = unlocked(&harness, &client, Lifetime::Persistent).await;
    let error = harness.engine.mount(cleartext(&attachment), &wanted(), &client).await.unwrap_err();
    assert!(error.to_string().contains("journal is on another block device"), "{error}");
    end(&harness, &attachment).await;
}

#[tokio::test(start_paused = true)]
async fn an_unlock_that_cannot_be_saved_is_undone() {
    let machine = Simulated::new();
    let files = Files::on(&machine);
    let harness = Harness::with_files(machine, files.clone());
    harness.start_udev(0);
    let client = Client::new(":1.1", 7);
    let attachment = harness.attach(&client, Lifetime::Persistent).await.unwrap();
    harness.settle().await;
    files.set_full();
    let error = unlock(&harness, &attachment, &client).await.unwrap_err();
    assert!(error.to_string().contains("no space is left"), "{error}");
    harness.settle().await;
    assert_eq!(harness.machine.mappings_on(attachment.device.number), []);
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_unlocked_while_the_mount_table_cannot_be_read() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let request = AttachRequest { lifetime: Lifetime::Persistent, ..AttachRequest::default() };
    harness.machine.set_file_system(crypto("crypto", "crypto_LUKS"));
    let attachment = harness.attach_with(&client, request).await.unwrap();
    harness.machine.set_unreadable(true);
    let error = harness.engine.unlock(whole(&attachment), secret(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Kernel);
    harness.machine.set_unreadable(false);
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}
