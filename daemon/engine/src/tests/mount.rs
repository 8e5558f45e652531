//! Mounting on a simulated machine: every step fails, callers disconnect and the daemon stops at every moment, other
//! programs unmount and detach.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, State};

use super::harness::{Client, Harness};
use super::restart::{connected, run_daemon};
use crate::mount_table::MountTable;
use crate::simulated::{Files, Interference, Simulated};
use crate::{AttachRequest, Caller as _, MountRequest, Mounter as _, Snapshot, VolumeId};

/// The mount point of the first mount of uid 7: the simulated images have neither labels nor names.
const MOUNT_POINT: &str = "/run/media/user7/image";

pub fn wanted() -> MountRequest {
    MountRequest { filesystem: "ext2".to_owned(), ..MountRequest::default() }
}

pub fn whole(attachment: &Snapshot) -> VolumeId {
    VolumeId { attachment: attachment.id, partition: None, is_cleartext: false }
}

fn part(attachment: &Snapshot, number: u32) -> VolumeId {
    VolumeId { attachment: attachment.id, partition: Some(number), is_cleartext: false }
}

async fn attached(harness: &Harness, client: &Client, lifetime: Lifetime) -> Snapshot {
    harness.attach(client, lifetime).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_mount_is_published_and_all_ends_with_it() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Mount).await;
    let directory = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    assert!(directory.starts_with("/run/media/user7"), "{directory:?}");
    let shown = harness.engine.find(attachment.id).unwrap();
    assert_eq!(shown.mount_points, std::slice::from_ref(&directory));
    assert_eq!(shown.ownership.unwrap().client, None, "it ends with its last mount now");
    client.disconnect(&harness.engine);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
    assert!(harness.engine.is_mounted_for(whole(&attachment), 7));
    assert!(!harness.engine.is_mounted_for(whole(&attachment), 8));
    harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    assert_eq!(harness.engine.find(attachment.id), None, "the reply comes after the end");
    assert_eq!(harness.mounts.directories(), Vec::<PathBuf>::new());
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_unmount_by_any_program_ends_it() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Mount).await;
    let number = attachment.device.number;
    let first = harness.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap();
    let second = harness.engine.mount(part(&attachment, 2), &wanted(), &client).await.unwrap();
    assert_ne!(first, second);
    // root mounts it too.
    harness.machine.mount_on(number, Some(1), PathBuf::from("/mnt"));
    for path in [&first, &second] {
        harness.machine.unmount_from(path);
        harness.settle().await;
        assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
        assert!(!harness.mounts.directories().contains(path));
    }
    harness.machine.unmount_from(Path::new("/mnt"));
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_mount_it_outlives_its_client_for_a_while() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Mount).await;
    client.disconnect(&harness.engine);
    let grace = harness.engine.settings().mount_grace;
    tokio::time::sleep(grace - Duration::from_secs(1)).await;
    assert_eq!(harness.engine.find(attachment.id).unwrap().ownership.unwrap().client, None);
    harness.agree();
    tokio::time::sleep(Duration::from_secs(2)).await;
    harness.assert_empty().await;

    // Mounted in time, it stays.
    let attachment = attached(&harness, &client.again(), Lifetime::Mount).await;
    client.again().disconnect(&harness.engine);
    tokio::time::sleep(grace - Duration::from_secs(1)).await;
    harness.machine.mount(attachment.device.number);
    tokio::time::sleep(2 * grace).await;
    assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
    harness.machine.unmount(attachment.device.number);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_becomes_mount_and_back() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Persistent).await;
    harness.machine.mount(attachment.device.number);
    harness.engine.set_lifetime(attachment.id, Lifetime::Mount, &client).await.unwrap();
    client.disconnect(&harness.engine);
    harness.settle().await;
    harness.agree();
    assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
    harness.engine.set_lifetime(attachment.id, Lifetime::Persistent, &client).await.unwrap();
    harness.machine.unmount(attachment.device.number);
    harness.settle().await;
    assert_eq!(harness.engine.find(attachment.id).unwrap().state, State::Attached);
    // The client is gone already: the grace time begins.
    harness.engine.set_lifetime(attachment.id, Lifetime::Mount, &client).await.unwrap();
    tokio::time::sleep(harness.engine.settings().mount_grace + Duration::from_secs(1)).await;
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_fails_at_any_step_leaves_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
        for failing in 1.. {
            let harness = Harness::with_udev();
            let client = Client::new(":1.1", 7);
            let attachment = attached(&harness, &client, lifetime).await;
            let reached = harness.fail_at(failing);
            let mounted = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(failing > 2 && mounted.is_ok(), "no step failed");
                break;
            }
            mounted.unwrap_err();
            harness.settle().await;
            assert_eq!(harness.mounts.directories(), Vec::<PathBuf>::new());
            let now = harness.engine.find(attachment.id);
            // If it was mounted for a moment, it has ended with that mount.
            assert!(now.is_none_or(|now| now.mount_points.is_empty()));
            let _ended = harness.engine.detach(attachment.id, false).await;
            harness.assert_empty().await;
        }
    }
}

/// A mount of a caller that has disconnected, or of a daemon that stops, leaves nothing.
#[tokio::test(start_paused = true)]
async fn a_caller_that_disconnects_during_a_mount_leaves_nothing() {
    for moment in 0..80 {
        for lifetime in [Lifetime::Client, Lifetime::Mount] {
            let harness = Harness::with_random_udev(moment);
            let client = Client::new(":1.1", 7);
            let attachment = attached(&harness, &client, lifetime).await;
            let (leaving, engine) = (client.clone(), Arc::clone(&harness.engine));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(moment * 250)).await;
                leaving.disconnect(&engine);
            });
            let mounted = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
            harness.settle().await;
            match mounted {
                // It got the reply before it disconnected.
                Ok(directory) => assert!(harness.machine.unmount_from(&directory)),
                Err(_) => assert!(!harness.machine.unmount_from(Path::new(MOUNT_POINT))),
            }
            tokio::time::sleep(harness.engine.settings().mount_grace).await;
            harness.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_stops_aborts_its_mounts() {
    for moment in 0..60 {
        let harness = Harness::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = attached(&harness, &client, Lifetime::Persistent).await;
        let engine = Arc::clone(&harness.engine);
        harness.mounts.set_hangs(moment % 2 == 0);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 300)).await;
            engine.abort_calls();
        });
        let mounted = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
        harness.settle().await;
        match mounted {
            Ok(directory) => assert!(harness.machine.unmount_from(&directory)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}"),
        }
        harness.engine.detach(attachment.id, false).await.unwrap();
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn interference_during_a_mount_leaves_nothing() {
    for moment in 0..80 {
        let harness = Harness::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = attached(&harness, &client, Lifetime::Mount).await;
        let (machine, number) = (harness.machine.clone(), attachment.device.number);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 250)).await;
            if moment % 2 == 0 {
                machine.detach_elsewhere(number);
            }
            machine.unmount_from(Path::new(MOUNT_POINT));
        });
        let mounted = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
        harness.settle().await;
        if let Ok(directory) = mounted {
            harness.machine.unmount_from(&directory);
        }
        client.disconnect(&harness.engine);
        tokio::time::sleep(harness.engine.settings().mount_grace).await;
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_and_its_partitions_are_not_mounted_at_once() {
    let harness = Harness::with_udev();
    harness.machine.set_partitions(2);
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Persistent).await;
    let first = harness.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap();
    for volume in [part(&attachment, 1), whole(&attachment)] {
        let error = harness.engine.mount(volume, &wanted(), &client).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(first.to_str().unwrap()), "{error}");
    }
    let error = harness.engine.mount(part(&attachment, 3), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    harness.engine.unmount(part(&attachment, 1), false, 7, true).await.unwrap();
    let error = harness.engine.unmount(part(&attachment, 1), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    let error = harness.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap_err();
    assert!(error.to_string().contains("the whole device /dev/loop0 is mounted on"), "{error}");
    harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_used_file_system_stays_mounted_unless_unmounted_lazily() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Mount).await;
    let directory = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    harness.mounts.set_used(&directory, true);
    let error = harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("/run/media/user7/"), "{error}");
    let before = harness.engine.find(attachment.id).unwrap();
    assert_eq!((before.state, before.mount_points), (State::Attached, vec![directory.clone()]));
    let error = harness.engine.detach(attachment.id, false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    harness.engine.unmount(whole(&attachment), true, 7, true).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_unmount_that_fails_at_any_step_can_be_repeated() {
    for failing in 1.. {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let attachment = attached(&harness, &client, Lifetime::Mount).await;
        harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
        let reached = harness.fail_at(failing);
        let unmounted = harness.engine.unmount(whole(&attachment), false, 7, true).await;
        if !reached.load(Ordering::Relaxed) {
            assert!(failing > 1 && unmounted.is_ok());
            harness.assert_empty().await;
            break;
        }
        if unmounted.is_err() {
            harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
        }
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn mounts_of_others_are_not_unmounted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Mount).await;
    let directory = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    harness.machine.mount(attachment.device.number);
    let error = harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied);
    assert_eq!(harness.engine.find(attachment.id).unwrap().mount_points.len(), 2);
    harness.engine.unmount(whole(&attachment), false, 7, false).await.unwrap();
    assert!(!harness.mounts.directories().contains(&directory));
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_mount_waits_for_udev_if_the_attach_did_not() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let request = AttachRequest { wait: false, lifetime: Lifetime::Mount, ..AttachRequest::default() };
    let attachment = harness.attach_with(&client, request).await.unwrap();
    let error =
        harness.engine.mount(whole(&attachment), &MountRequest::default(), &client).await.unwrap_err();
    // udev's result has arrived by then, and names a file system that is not allowed.
    assert!(error.to_string().contains(&format!("the file system fs{}", attachment.id)), "{error}");
    client.disconnect(&harness.engine);
    tokio::time::sleep(harness.engine.settings().mount_grace).await;
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn names_in_use_get_numbers_up_to_the_limit_of_the_uid() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let limit = harness.engine.settings().mounts.each;
    let attach = async |file: usize| {
        let request = AttachRequest { wait: false, ..AttachRequest::default() };
        harness.engine.attach((file as u64).into(), request, &client).await.unwrap()
    };
    for number in 0..limit {
        let attachment = attach(number).await;
        let directory = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
        let expected = if number == 0 { "image".to_owned() } else { format!("image{number}") };
        assert_eq!(directory.file_name().unwrap().to_str(), Some(&*expected));
    }
    let more = attach(limit).await;
    let error = harness.engine.mount(whole(&more), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    let other = Client::new(":1.2", 8);
    let directory = harness.engine.mount(whole(&more), &wanted(), &other).await.unwrap();
    assert_eq!(directory, Path::new("/run/media/user8/image"));
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_hangs_is_a_timeout_and_undone() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Client).await;
    harness.mounts.set_hangs(true);
    let error = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(harness.mounts.directories(), Vec::<PathBuf>::new());
    harness.machine.interfere(|_| Interference::None);
    assert!(!client.is_disconnected());
    client.disconnect(&harness.engine);
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_cannot_be_undone_stays_its_users() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Persistent).await;
    harness.mounts.ignore_undo();
    // The last step of the mount fails, when it is mounted already.
    for failing in 1.. {
        let reached = harness.fail_at(failing);
        let mounted = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
        assert!(reached.load(Ordering::Relaxed), "no step leaves it mounted: {mounted:?}");
        if harness.machine.mount_table() != MountTable::default() {
            break;
        }
    }
    harness.machine.interfere(|_| Interference::None);
    harness.settle().await;
    assert_eq!(harness.mounts.directories().len(), 1, "something is mounted on it");
    harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    assert_eq!(harness.mounts.directories(), Vec::<PathBuf>::new());
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_mounted_while_the_mount_table_cannot_be_read() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Persistent).await;
    harness.machine.set_unreadable(true);
    let error = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Kernel);
    harness.machine.set_unreadable(false);
    harness.engine.detach(attachment.id, false).await.unwrap();
    harness.assert_empty().await;
}

/// An attachment of the same file as `attached` gives, which is file 1.
async fn read_only(harness: &Harness, client: &Client) -> Snapshot {
    let request =
        AttachRequest { read_only: true, lifetime: Lifetime::Persistent, ..AttachRequest::default() };
    harness.attach_with(client, request).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_are_not_mounted_twice() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let ours = attached(&harness, &client, Lifetime::Persistent).await;
    let foreign = harness.machine.attach_elsewhere(1);
    harness.machine.mount_on(foreign, None, PathBuf::from("/mnt/other"));
    let error = harness.engine.mount(whole(&ours), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("/dev/loop1 is mounted on /mnt/other"), "{error}");
    assert_eq!(harness.mounts.directories(), Vec::<PathBuf>::new());
    harness.machine.unmount(foreign);
    harness.engine.mount(whole(&ours), &wanted(), &client).await.unwrap();
    let other_file = harness.machine.attach_elsewhere(2);
    harness.machine.mount_on(other_file, None, PathBuf::from("/mnt/another"));
    harness.engine.unmount(whole(&ours), false, 7, true).await.unwrap();
    harness.engine.mount(whole(&ours), &wanted(), &client).await.unwrap();
    harness.engine.unmount(whole(&ours), false, 7, true).await.unwrap();
    harness.machine.unmount(other_file);
    for number in [foreign, other_file] {
        harness.machine.detach_elsewhere(number);
    }
    harness.engine.detach(ours.id, false).await.unwrap();
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn two_devices_that_cannot_be_written_to_are_both_mounted() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let writable = attached(&harness, &client, Lifetime::Persistent).await;
    let (one, other) = (read_only(&harness, &client).await, read_only(&harness, &client).await);
    harness.engine.mount(whole(&one), &wanted(), &client).await.unwrap();
    harness.engine.mount(whole(&other), &wanted(), &client).await.unwrap();
    let read_only = MountRequest { read_only: true, ..wanted() };
    let error = harness.engine.mount(whole(&writable), &read_only, &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "even read-only, a journal may be replayed");
    for volume in [&one, &other] {
        harness.engine.unmount(whole(volume), false, 7, true).await.unwrap();
    }
    for volume in [&writable, &one, &other] {
        harness.engine.detach(volume.id, false).await.unwrap();
    }
    harness.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn of_two_mounts_of_a_file_at_once_one_is_made() {
    for seed in 0..40 {
        let harness = Harness::with_random_udev(seed);
        let client = Client::new(":1.1", 7);
        let one = attached(&harness, &client, Lifetime::Persistent).await;
        let other = attached(&harness, &client, Lifetime::Persistent).await;
        let wanted = wanted();
        let (first, second) = tokio::join!(
            harness.engine.mount(whole(&one), &wanted, &client),
            harness.engine.mount(whole(&other), &wanted, &client),
        );
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        let (mounted, error) = match (first, second) {
            (Ok(_), Err(error)) => (&one, error),
            (_, second) => (&other, second.unwrap_err()),
        };
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        harness.engine.unmount(whole(mounted), false, 7, true).await.unwrap();
        for volume in [&one, &other] {
            harness.engine.detach(volume.id, false).await.unwrap();
        }
        harness.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_is_claimed_while_its_bytes_are_mounted_elsewhere() {
    let harness = Harness::with_udev();
    let client = Client::new(":1.1", 7);
    let ours = attached(&harness, &client, Lifetime::Persistent).await;
    let foreign = harness.machine.attach_elsewhere(1);
    harness.mounts.set_hangs(true);
    let engine = Arc::clone(&harness.engine);
    let (volume, caller) = (whole(&ours), client.clone());
    let mounting = tokio::spawn(async move { engine.mount(volume, &wanted(), &caller).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!harness.machine.mount_on(foreign, None, PathBuf::from("/mnt")));
    mounting.await.unwrap().unwrap_err();
    assert!(harness.machine.mount_on(foreign, None, PathBuf::from("/mnt")), "the claim ends with the call");
    harness.machine.unmount(foreign);
    harness.machine.detach_elsewhere(foreign);
    harness.engine.detach(ours.id, false).await.unwrap();
    harness.assert_empty().await;
}

/// A device whose backing file does not answer may show the same bytes.
#[tokio::test(start_paused = true)]
async fn a_mount_beside_a_device_that_hangs_is_a_timeout() {
    let harness = Harness::new(Simulated::new());
    harness.machine.set_udev(false);
    let client = Client::new(":1.1", 7);
    let attachment = attached(&harness, &client, Lifetime::Persistent).await;
    let hung = harness.machine.attach_elsewhere(9);
    harness.machine.hang(hung);
    harness.machine.mount(hung);
    let error = harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

/// A mount directory of another program is never saved, so the next daemon does not undo that program's mount.
#[test]
fn a_daemon_that_dies_during_a_mount_leaves_the_mounts_of_others() {
    for write in 0..4 {
        let machine = Simulated::new();
        let files = Files::on(&machine);
        let client = Client::new(":1.1", 7);
        run_daemon(&machine, &files, async |harness| {
            harness.start_udev(0);
            let attachment = attached(harness, &client, Lifetime::Persistent).await;
            harness.settle().await;
            assert!(files.mounts.make(PathBuf::from(MOUNT_POINT), 7).await.unwrap());
            let foreign = machine.attach_elsewhere(9);
            assert!(machine.mount_on(foreign, None, PathBuf::from(MOUNT_POINT)));
            files.die_at(write, true);
            let _mounted_or_dead = harness.engine.mount(whole(&attachment), &wanted(), &client).await;
        });
        machine.die();
        run_daemon(&machine, &files, async |harness| {
            harness.engine.restore(connected([client.clone()])).await;
            harness.engine.resync().await;
            harness.start_udev(0);
            harness.settle().await;
        })
        .unwrap();
        assert!(
            machine.mount_table().has(Path::new(MOUNT_POINT)),
            "write {write}: the mount of others is gone"
        );
        assert!(files.mounts.directories().contains(&PathBuf::from(MOUNT_POINT)), "write {write}");
    }
}

/// An unmount for a user ends only the mounts that were checked, even if others mount the volume in the meantime.
#[tokio::test(start_paused = true)]
async fn a_mount_made_after_the_check_is_not_taken_from_its_owner() {
    for read in 0..6 {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let attachment = attached(&harness, &client, Lifetime::Persistent).await;
        harness.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
        let (machine, number) = (harness.machine.clone(), attachment.device.number);
        let reads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reads);
        harness.machine.watch_mount_table(Arc::new(move || {
            if counted.fetch_add(1, Ordering::Relaxed) == read {
                assert!(machine.mount_on(number, None, PathBuf::from("/mnt")));
            }
        }));
        harness.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
        harness.machine.unwatch();
        let is_mounted = harness.machine.mount_table().has(Path::new("/mnt"));
        assert_eq!(is_mounted, reads.load(Ordering::Relaxed) > read, "read {read}");
        harness.machine.unmount(number);
        harness.settle().await;
        harness.engine.detach(attachment.id, false).await.unwrap();
        harness.assert_empty().await;
    }
}
