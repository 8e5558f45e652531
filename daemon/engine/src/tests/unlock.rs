//! Unlocking and locking on a simulated machine: every step fails, callers disconnect and the daemon stops at every
//! moment, other programs map, unmap and mount.

use loopd_common::{EncryptionType, Lifetime};

use super::harness::{Client, Harness};
use super::mount::{wanted, whole};
use crate::simulated::SimulatedFile;
use crate::{CleartextSnapshot, Error, Snapshot, UnlockRequest, VolumeId};

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

async fn unlock(
    harness: &Harness,
    attachment: &Snapshot,
    client: &Client,
) -> Result<CleartextSnapshot, Error> {
    harness.engine.unlock(whole(attachment), secret(), client).await
}

#[tokio::test(start_paused = true)]
async fn a_volume_is_unlocked_mounted_unmounted_and_locked() {
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let harness = Harness::with_udev();
        let client = Client::new(":1.1", 7);
        let attachment = harness.attach(&client, lifetime).await.unwrap();
        let unlocked = unlock(&harness, &attachment, &client).await.unwrap();
        assert_eq!(unlocked.mapping.name, format!("loopd-{}", attachment.id));
        assert_eq!(unlocked.file_system.kind, format!("fs{}", unlocked.mapping.disk_sequence));
        assert_eq!(harness.engine.find(attachment.id).unwrap().cleartext, Some(unlocked.clone()));
        let held = usize::from(lifetime != Lifetime::Persistent);
        assert_eq!(harness.machine.mapping_holds(unlocked.mapping.number), Some((held, 0, held == 1)));
        harness.agree_after_telling().await;
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
            harness.engine.detach(attachment.id, false).await.unwrap();
        }
        harness.assert_empty().await;
    }
}
