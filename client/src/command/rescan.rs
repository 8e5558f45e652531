//! `loopctl rescan`.

use loopd_dbus::proxy::{Attachment, Interaction};

use super::detach::status;
use crate::agent::with_agent;
use crate::cli::Rescan;
use crate::connection::{self, Bus, explain};
use crate::target::{Attached, Target};

/// Has the partition tables of the target's devices read again; one that fails does not stop the
/// others.
pub async fn run(args: &Rescan, interaction: Interaction) -> anyhow::Result<u8> {
    let bus = connection::open(interaction).await?;
    let found = Target::resolve(&args.target).find(&bus.manager).await?;
    with_agent(interaction, async {
        if let [one] = found.as_slice() {
            return rescan(&bus, one).await.map(|()| 0);
        }
        let mut results = Vec::new();
        for one in &found {
            results.push(rescan(&bus, one).await);
        }
        Ok(status(&results))
    })
    .await
}

async fn rescan(bus: &Bus, attached: &Attached) -> anyhow::Result<()> {
    let path = attached.path.clone().into_inner();
    let attachment = Attachment::new(&bus.connection, path, bus.interaction).await.map_err(explain)?;
    attachment.rescan_partitions().await.map_err(explain)
}
