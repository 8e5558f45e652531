//! Who uses a device, for the error about it.

use std::sync::Arc;

use loopd_common::text::printable;

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Claim, Kernel, Mapping, Users};
use crate::snapshot::Snapshot;

/// `ID_FS_TYPE` of a swap area.
const SWAP: &str = "swap";

/// How many users of a cleartext a text names.
const MOST_OF_CLEARTEXT: usize = 4;

impl<K: Kernel> Engine<K> {
    /// The users of a device that is in use: those that the kernel lists, other loop devices, and a claim that none of
    /// these explains.
    pub(super) async fn users_of(self: &Arc<Self>, attachment: &Snapshot) -> Users {
        let number = attachment.device.number;
        let mut users = self.known_users(attachment).await.unwrap_or_default();
        users.holders.extend(self.stacked_on(attachment).await);
        if users.is_empty() && self.kernel.is_claimed(number).await {
            users.claim = Some(Claim { swap_areas: swap_areas(attachment) });
        }
        users
    }

    /// The users of a device that the kernel lists. A cleartext is named with its own users.
    ///
    /// # Errors
    /// `Kernel` if they cannot be determined.
    pub(super) async fn known_users(&self, attachment: &Snapshot) -> Result<Users, Error> {
        let mut users = self.kernel.users(attachment.device.number).await?;
        for (partition, cleartext) in attachment.cleartexts() {
            let mapping = &cleartext.mapping;
            let is_it = |holder: &String| {
                *holder == mapping.node() || holder.starts_with(&format!("{} ", mapping.node()))
            };
            let is_listed = users.holders.iter().any(is_it);
            users.holders.retain(|holder| !is_it(holder));
            if is_listed {
                let above = self.kernel.mapping_users(mapping).await?;
                let partition = partition.map(|number| attachment.device.partition_node(number));
                users.cleartexts.push(in_words(mapping, partition, &above));
            }
        }
        Ok(users)
    }

    /// Loop devices whose backing file is the node of this device or of a partition of it, under any name.
    async fn stacked_on(self: &Arc<Self>, attachment: &Snapshot) -> Vec<String> {
        let number = attachment.device.number;
        let partitions = self.kernel.partition_nodes(number).into_iter().map(|node| node.device_number);
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

/// A cleartext with its users, for a message.
fn in_words(mapping: &Mapping, partition: Option<String>, users: &Users) -> String {
    let on = partition.map(|node| format!("{node} is ")).unwrap_or_default();
    let mounted = users
        .mount_points
        .iter()
        .map(|path| format!("mounted on {}", printable(path.as_os_str().as_encoded_bytes())));
    let held = users.holders.iter().map(|holder| format!("held by {holder}"));
    let above: Vec<String> = mounted.chain(held).take(MOST_OF_CLEARTEXT).collect();
    let above = if above.is_empty() { String::new() } else { format!(", which is {}", above.join(", ")) };
    format!("{on}unlocked as {}{above}", mapping.node())
}

/// The nodes of the attachment with a swap area, used or not.
fn swap_areas(attachment: &Snapshot) -> Vec<String> {
    let device = &attachment.device;
    let disk = (attachment.file_system.kind == SWAP).then(|| device.node());
    let partitions = attachment.partitions.iter().filter(|shown| shown.file_system.kind == SWAP);
    let nodes = partitions.map(|shown| device.partition_node(shown.partition.node.number));
    disk.into_iter().chain(nodes).collect()
}
