//! `loopctl unlock`.

use loopd_dbus::proxy::Interaction;
use zbus::wire::OwnedObjectPath;

use crate::bus::agent::{interruptible, with_agent};
use crate::bus::attachment::{self, AttachmentInfo};
use crate::bus::connection::Bus;
use crate::cli::Unlock;
use crate::image::file_state::add_file_states;
use crate::image::target::Target;
use crate::image::unlock::{UnlockRequest, unlock};
use crate::image::volume::choose_encrypted;
use crate::show::json::Device;
use crate::show::stdout::{print, print_json};

/// Unlocks the volume and prints its cleartext.
pub async fn run(args: &Unlock, interaction: Interaction) -> anyhow::Result<u8> {
    // First: reading a FIFO may wait, and a signal then ends loopctl at once.
    let request = UnlockRequest::new(&args.encryption, args.kind, args.read_only, interaction)?;
    let bus = Bus::open(interaction).await?;
    let target = Target::resolve(&args.target);
    let (info, partition) = find(&bus, &target, args.partition).await?;
    let volume = choose_encrypted(&info, partition)?;
    let (_, device) = interruptible(with_agent(interaction, unlock(&bus, &info, &volume, &request))).await?;
    if args.json {
        print_device(&bus, &info.path).await?
    } else {
        print(&format!("{device}\n"))?
    }
    Ok(0)
}

/// The latest attachment of the target, with its partitions, and the number of the partition to use.
async fn find(
    bus: &Bus,
    target: &Target,
    partition: Option<u32>,
) -> anyhow::Result<(AttachmentInfo, Option<u32>)> {
    let mut found = target.device().find_to_mount(&bus.manager).await?;
    // As `loopctl mount`: the user has just attached it.
    found.sort_by_key(|info| info.attachment.disk_sequence);
    let latest = found.pop().ok_or_else(|| anyhow::anyhow!("nothing is attached"))?;
    let info = attachment::find(bus, &latest.path).await?;
    let info = info.ok_or_else(|| anyhow::anyhow!("it has been detached in the meantime"))?;
    Ok((info, partition.or(target.partition())))
}

async fn print_device(bus: &Bus, path: &OwnedObjectPath) -> anyhow::Result<()> {
    let info = attachment::find(bus, path).await?;
    let mut info = info.ok_or_else(|| anyhow::anyhow!("it was unlocked, but has been detached since"))?;
    add_file_states(std::slice::from_mut(&mut info)).await;
    print_json(&Device::from(&info))
}
