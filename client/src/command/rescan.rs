//! `loopctl rescan`.

use loopd_dbus::proxy::Interaction;

use super::change_each;
use crate::cli::Rescan;
use crate::connection::explain;

/// Has the partition tables of the target's devices read again.
pub async fn run(args: &Rescan, interaction: Interaction) -> anyhow::Result<u8> {
    change_each(&args.target, interaction, async |attachment| {
        attachment.rescan_partitions().await.map_err(explain)
    })
    .await
}
