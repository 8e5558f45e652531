//! `loopctl set`.

use loopd_dbus::proxy::{Attachment, Interaction};

use super::change::change_each;
use crate::bus::error::explain;
use crate::cli::{Set, Switch};

/// Changes the settings of the target's devices.
pub async fn run(args: &Set, interaction: Interaction) -> anyhow::Result<u8> {
    change_each(&args.target, interaction, async |attachment| change(attachment, args).await.map_err(explain))
        .await
}

/// The block size comes first: direct I/O may need a larger one.
async fn change(attachment: &Attachment, args: &Set) -> zbus::Result<()> {
    if let Some(block_size) = args.block_size {
        attachment.set_block_size(block_size).await?;
    }
    if let Some(switch) = args.direct_io {
        attachment.set_direct_io(switch == Switch::On).await?;
    }
    if let Some(lifetime) = args.lifetime {
        attachment.set_lifetime(lifetime).await?;
    }
    Ok(())
}
