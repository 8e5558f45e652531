//! Random clients make random calls on a slow machine whose events get lost.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{Lifetime, Overlap};

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use crate::simulated::Simulated;
use crate::{AttachRequest, VolumeId};

/// Random clients do random things on a slow machine whose events get lost. `LOOPD_RANDOM_RUNS` sets
/// how many runs there are; each names its seed if it fails.
#[tokio::test(start_paused = true)]
async fn random_calls_leave_engine_kernel_and_bus_in_agreement() {
    let runs = std::env::var("LOOPD_RANDOM_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 1..=runs {
        println!("run {seed}");
        run(seed).await;
    }
}

async fn run(seed: u64) {
    let harness = Arc::new(Harness::new(Simulated::random(seed)));
    harness.start_udev(seed);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut clients = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for step in 0..500 {
        if clients.len() < 6 {
            clients.push(Client::new(&format!(":1.{step}"), 1000 + random.u32(..3)));
        }
        let client = clients[random.usize(..clients.len())].clone();
        let number = random.u32(..8);
        let harness = Arc::clone(&harness);
        match random.u8(..21) {
            17..=18 => {
                tasks.spawn(async move {
                    if let Ok(attachment) = harness.engine.locate(number).await {
                        let partition = Some(step % 3).filter(|partition| *partition > 0);
                        let volume = VolumeId { partition, ..whole(&attachment) };
                        let _busy_or_gone = harness.engine.mount(volume, &wanted(), &client).await;
                    }
                });
            }
            19 => {
                let lazy = random.bool();
                tasks.spawn(async move {
                    if let Ok(attachment) = harness.engine.locate(number).await {
                        let _not_mounted =
                            harness.engine.unmount(whole(&attachment), lazy, client.uid, false).await;
                    }
                });
            }
            20 => {
                let request = AttachRequest { lifetime: Lifetime::Mount, ..AttachRequest::default() };
                tasks.spawn(async move { drop(harness.attach_with(&client, request).await) });
            }
            14 => {
                let lifetimes = [Lifetime::Client, Lifetime::Persistent, Lifetime::Mount];
                let lifetime = lifetimes[random.usize(..lifetimes.len())];
                tasks.spawn(async move {
                    if let Ok(attachment) = harness.engine.locate(number).await {
                        let _gone = harness.engine.set_lifetime(attachment.id, lifetime, &client).await;
                    }
                });
            }
            15 => {
                tasks.spawn(async move {
                    if let Ok(attachment) = harness.engine.locate(number).await {
                        let _gone = harness.engine.replace_backing_file(attachment.id, 2, 0).await;
                    }
                });
            }
            16 => {
                let overlap = if random.bool() { Overlap::Reuse } else { Overlap::Refuse };
                let offset = random.u64(..3) * 512;
                let request = AttachRequest { overlap, offset, size_limit: 512, ..AttachRequest::default() };
                tasks.spawn(async move { drop(harness.attach_with(&client, request).await) });
            }
            0..=4 => {
                let lifetime = if random.bool() { Lifetime::Client } else { Lifetime::Persistent };
                harness.machine.set_partitions(random.u32(..3));
                let request = AttachRequest { lifetime, wait: random.bool(), ..AttachRequest::default() };
                tasks.spawn(async move { drop(harness.attach_with(&client, request).await) });
            }
            5..=7 => {
                let lazy = random.u8(..4) == 0;
                tasks.spawn(async move {
                    if let Ok(attachment) = harness.engine.locate(number).await {
                        let _busy_or_gone = harness.engine.detach(attachment.id, lazy).await;
                    }
                });
            }
            8 => harness.machine.open_elsewhere(number),
            9 => harness.machine.close_elsewhere(number),
            10 => harness.machine.mount(number),
            11 => harness.machine.unmount(number),
            13 if random.bool() => harness.machine.drop_partitions(number),
            13 => harness.machine.reread_partitions(number),
            12 => {
                clients.retain(|other| other.id != client.id);
                client.vanish(&harness.engine);
            }
            _ if random.bool() => drop(harness.machine.attach_elsewhere(1)),
            _ => harness.machine.detach_elsewhere(number),
        }
        tokio::time::sleep(Duration::from_micros(random.u64(..4000))).await;
    }
    while tasks.join_next().await.is_some() {}
    end_everything(&harness, &clients).await;
}

/// Everyone goes, everything is closed: nothing may be left but what is persistent.
pub async fn end_everything(harness: &Harness, clients: &[Client]) {
    for client in clients {
        client.vanish(&harness.engine);
    }
    for (number, _, _) in harness.machine.bound() {
        for _ in 0..500 {
            harness.machine.close_elsewhere(number);
            harness.machine.unmount(number);
        }
    }
    harness.settle().await;
    harness.engine.resync().await;
    harness.agree_after_telling().await;
    for attachment in harness.engine.list() {
        let client = attachment.ownership.as_ref().and_then(|ownership| ownership.client.as_ref());
        assert_eq!(client, None, "the client of {} is gone", attachment.device.node());
        let detached = harness.engine.detach(attachment.id, false).await;
        // An attachment that was not mounted may have ended just now.
        let awaits_mount = attachment.ownership.is_some_and(|owner| owner.lifetime == Lifetime::Mount);
        assert!(detached.is_ok() || awaits_mount, "{detached:?}");
    }
    harness.assert_empty().await;
}
