//! Who uses a device, for the error about it.

use std::sync::Arc;

use loopd_common::text::printable;

use crate::engine::Engine;
use crate::kernel::{Claim, Kernel, Users};
use crate::snapshot::Snapshot;

/// `ID_FS_TYPE` of a swap area.
const SWAP: &str = "swap";

impl<K: Kernel> Engine<K> {
    /// The users of a device that is in use: those that the kernel lists, other loop devices, and a claim that none of
    /// these explains.
    pub(super) async fn users_of(self: &Arc<Self>, attachment: &Snapshot) -> Users {
        let number = attachment.device.number;
        let mut users = self.kernel.users(number).await.unwrap_or_default();
        users.holders.extend(self.stacked_on(attachment).await);
        if users.is_empty() && self.kernel.is_claimed(number).await {
            users.claim = Some(Claim { swap_areas: swap_areas(attachment) });
        }
        users
    }

    /// Loop devices whose backing file is the node of this device or of a partition of it, under any name.
    async fn stacked_on(self: &Arc<Self>, attachment: &Snapshot) -> Vec<String> {
        let number = attachment.device.number;
        let nodes = self.kernel.partition_nodes(number).unwrap_or_default();
        let partitions = nodes.into_iter().map(|node| node.device_number);
        let below: Vec<(u32, u32)> = partitions.chain([attachment.device.device_number]).collect();
        let others = self.other_devices(number).await.unwrap_or_default();
        let mut stacked: Vec<_> = others
            .into_iter()
            .filter_map(|(_, other)| other)
            .filter(|other| other.backing_block_device.is_some_and(|file| below.contains(&file)))
            .collect();
        stacked.sort_unstable_by_key(|device| device.number);
        stacked
            .iter()
            .map(|device| format!("{}, whose file is {}", device.node(), printable(&device.backing_file)))
            .collect()
    }
}

/// The nodes of the attachment with a swap area, used or not.
fn swap_areas(attachment: &Snapshot) -> Vec<String> {
    let device = &attachment.device;
    let disk = (attachment.file_system.kind == SWAP).then(|| device.node());
    let partitions = attachment.partitions.iter().filter(|shown| shown.file_system.kind == SWAP);
    let nodes = partitions.map(|shown| device.partition_node(shown.partition.node.number));
    disk.into_iter().chain(nodes).collect()
}
