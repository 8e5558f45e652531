//! `loopctl rescan`.

use loopd_dbus::proxy::Interaction;

use super::change::change_each;
use crate::bus::error::explain;
use crate::cli::Rescan;

/// Re-reads the partition tables of the target's devices.
pub async fn run(args: &Rescan, interaction: Interaction) -> anyhow::Result<u8> {
    change_each(&args.target, interaction, async |attachment| {
        attachment.rescan_partitions().await.map_err(explain)
    })
    .await
}
