//! `loopctl resize`.

use loopd_dbus::proxy::Interaction;

use super::change_each;
use crate::cli::Resize;
use crate::connection::explain;

/// Gives the target's devices the size that their files have now.
pub async fn run(args: &Resize, interaction: Interaction) -> anyhow::Result<u8> {
    change_each(&args.target, interaction, async |attachment| {
        attachment.set_capacity().await.map_err(explain)
    })
    .await
}
