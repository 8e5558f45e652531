//! `loopctl resize`.

use loopd_dbus::proxy::Interaction;

use super::change::change_each;
use crate::bus::error::explain;
use crate::cli::Resize;

/// Sets the size of the target's devices to the current size of their files.
pub async fn run(args: &Resize, interaction: Interaction) -> anyhow::Result<u8> {
    change_each(&args.target, interaction, async |attachment| {
        attachment.set_capacity().await.map_err(explain)
    })
    .await
}
