//! Warnings appear with an attachment, change with it, and outlive the daemon.

use loopd_common::Lifetime;

use super::harness::{Client, Harness};
use super::restart::{Death, run_daemon};
use crate::kernel::{Change, Describer, Findings, ImageFormat};
use crate::simulated::{Files, Simulated, SimulatedFile};
use crate::{AttachRequest, Snapshot, Warning};

fn file(inode: u64, size: u64, findings: &Findings) -> SimulatedFile {
    SimulatedFile { size, findings: findings.clone(), ..inode.into() }
}

fn described(bytes: u64) -> Findings {
    Findings { described: Some((Describer::PartitionTable, bytes)), ..Findings::default() }
}

fn of_format(format: ImageFormat) -> Findings {
    Findings { format: Some(format), ..Findings::default() }
}

async fn attach(harness: &Harness, file: SimulatedFile, lifetime: Lifetime) -> Snapshot {
    let client = Client::new(":1.1", 7);
    let request = AttachRequest { lifetime, ..AttachRequest::default() };
    harness.engine.attach(file, request, &client).await.unwrap()
}

fn warnings(harness: &Harness, attached: &Snapshot) -> Vec<Warning> {
    harness.engine.find(attached.id).unwrap().warnings
}

fn missing(described: u64, bytes: u64) -> Warning {
    Warning::Truncated { by: Describer::PartitionTable, described, bytes }
}

fn tail(bytes: u64, sector: u32) -> Warning {
    Warning::UnreachableTail { bytes, sector }
}

#[tokio::test(start_paused = true)]
async fn an_attachment_has_its_warnings_when_it_is_published() {
    let harness = Harness::with_udev();
    for (size, findings, expected) in [
        (4096, Findings::default(), vec![]),
        (1_000_001, Findings::default(), vec![tail(65, 512)]),
        (4096, described(8192), vec![missing(8192, 4096)]),
        (4100, described(8192), vec![missing(8192, 4092), tail(4, 512)]),
        (4096, of_format(ImageFormat::Xz), vec![Warning::NotRaw(ImageFormat::Xz)]),
    ] {
        let attached = attach(&harness, file(1, size, &findings), Lifetime::Persistent).await;
        assert_eq!(attached.warnings, expected);
        harness.agree_after_flush().await;
        assert_eq!(warnings(&harness, &attached), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn warnings_change_with_the_size() {
    let harness = Harness::with_udev();
    let attached = attach(&harness, file(1, 4100, &described(8192)), Lifetime::Persistent).await;
    let number = attached.device.number;
    let resize = async |size, findings| {
        harness.machine.rewrite_file(number, size, findings);
        harness.engine.change(attached.id, Change::Capacity).await.unwrap();
        harness.agree_after_flush().await;
        warnings(&harness, &attached)
    };
    // The end of a file of another size is not known.
    assert_eq!(resize(6150, described(8192)).await, [missing(8192, 8192 - 6144)]);
    assert_eq!(resize(8192, described(8192)).await, []);
    assert_eq!(resize(4100, described(8192)).await, [missing(8192, 4092), tail(4, 512)]);
    assert_eq!(resize(4096 + 512, described(4096 + 600)).await, [tail(88, 512)]);
    assert_eq!(resize(8192, of_format(ImageFormat::Qcow2)).await, [Warning::NotRaw(ImageFormat::Qcow2)]);
}

#[tokio::test(start_paused = true)]
async fn warnings_change_with_the_block_size() {
    let harness = Harness::with_udev();
    let attached = attach(&harness, file(1, 5000, &Findings::default()), Lifetime::Persistent).await;
    assert_eq!(attached.warnings, [tail(5000 - 4608, 512)]);
    for (bytes, expected) in [(4096, tail(5000 - 4096, 4096)), (512, tail(5000 - 4608, 512))] {
        harness.engine.change(attached.id, Change::BlockSize(bytes)).await.unwrap();
        assert_eq!(warnings(&harness, &attached), [expected]);
        harness.agree_after_flush().await;
    }
}

#[tokio::test(start_paused = true)]
async fn warnings_change_with_the_file() {
    let harness = Harness::with_udev();
    let attached = attach(&harness, file(1, 4100, &described(8192)), Lifetime::Persistent).await;
    for (inode, size, findings, expected) in [
        (2, 4096, of_format(ImageFormat::Gzip), vec![Warning::NotRaw(ImageFormat::Gzip)]),
        (3, 4097, Findings::default(), vec![tail(1, 512)]),
        (4, 4096, Findings::default(), vec![]),
    ] {
        let next = file(inode, size, &findings);
        harness.engine.replace_backing_file(attached.id, next, 0).await.unwrap();
        assert_eq!(warnings(&harness, &attached), expected, "{inode}");
        harness.settle().await;
        harness.agree();
        assert_eq!(warnings(&harness, &attached), expected, "{inode}");
    }
}

#[tokio::test(start_paused = true)]
async fn warnings_change_with_the_partitions() {
    let harness = Harness::with_udev();
    let attached = attach(&harness, file(1, 4096, &described(8192)), Lifetime::Persistent).await;
    harness.machine.rewrite_file(attached.device.number, 4096, Findings::default());
    harness.agree_after_flush().await;
    let before = harness.events.load(std::sync::atomic::Ordering::Relaxed);
    harness.engine.rescan(attached.id).await.unwrap();
    harness.agree_after_flush().await;
    assert_eq!(warnings(&harness, &attached), []);
    assert_eq!(harness.events.load(std::sync::atomic::Ordering::Relaxed), before + 1, "one change");
    harness.engine.rescan(attached.id).await.unwrap();
    harness.agree_after_flush().await;
    assert_eq!(harness.events.load(std::sync::atomic::Ordering::Relaxed), before + 1, "nothing has changed");
}

#[test]
fn warnings_outlive_the_daemon() {
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let machine = Simulated::new();
        machine.keep_holds();
        let files = Files::on(&machine);
        let expected = [missing(8192, 4092), tail(4, 512)];
        let attached = run_daemon(&machine, &files, async |harness| {
            harness.start_udev(0);
            let attached = attach(harness, file(1, 4100, &described(8192)), lifetime).await;
            assert_eq!(attached.warnings, expected);
            attached
        });
        let attached = attached.unwrap();
        machine.die();
        for _ in 0..2 {
            let found = run_daemon(&machine, &files, async |harness| {
                harness.start_udev(0);
                harness.engine.restore(|_| async { true }).await;
                harness.settle().await;
                harness.agree();
                warnings(harness, &attached)
            });
            assert_eq!(found.unwrap(), expected, "{lifetime}");
            machine.die();
        }
    }
}

/// The daemon dies at each step of a replacement: no warning is about a file that is not attached.
#[test]
fn no_warning_of_a_replaced_file_is_left() {
    let mut replaced = 0;
    for step in 1.. {
        let machine = Simulated::new();
        let files = Files::on(&machine);
        let attached = run_daemon(&machine, &files, async |harness| {
            harness.start_udev(0);
            attach(harness, file(1, 4100, &described(8192)), Lifetime::Persistent).await
        });
        let attached = attached.unwrap();
        machine.die();
        let survived = run_daemon(&machine, &files, async |harness| {
            harness.engine.restore(|_| async { true }).await;
            Death::Step(step).arm(&machine, &files);
            let next = file(2, 4101, &of_format(ImageFormat::Zip));
            harness.engine.replace_backing_file(attached.id, next, 0).await.unwrap();
        });
        machine.die();
        let (device, found) = run_daemon(&machine, &files, async |harness| {
            harness.engine.restore(|_| async { true }).await;
            harness.settle().await;
            (harness.engine.find(attached.id).unwrap().device, warnings(harness, &attached))
        })
        .unwrap();
        let zip = Warning::NotRaw(ImageFormat::Zip);
        match (device.backing_inode, survived) {
            (1, None) => assert_eq!(found, [missing(8192, 4092), tail(4, 512)], "{step}"),
            (2, Some(())) => assert_eq!(found, [zip, tail(5, 512)], "{step}"),
            (2, None) => {
                replaced += 1;
                let known = [zip.clone(), tail(5, 512)];
                assert!(found == known || found == [zip], "{step}: {found:?}");
            }
            other => panic!("{step}: {other:?}"),
        }
        if survived.is_some() {
            break;
        }
    }
    assert!(replaced > 0, "the daemon never died after the replacement");
}
