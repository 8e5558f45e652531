//! `loopctl lock`.

use loopd_dbus::proxy::Interaction;

use super::change::report_all;
use crate::bus::agent::with_agent;
use crate::bus::attachment::{AttachmentInfo, add_partitions};
use crate::bus::connection::Bus;
use crate::cli::Lock;
use crate::image::target::Target;
use crate::image::unlock::lock;
use crate::image::volume::{self, Volume};

/// Locks the unlocked volumes of the target; a failure does not stop the others.
pub async fn run(args: &Lock, interaction: Interaction) -> anyhow::Result<u8> {
    let bus = Bus::open(interaction).await?;
    let target = Target::resolve(&args.target);
    let mut found = target.device().find(&bus.manager).await?;
    add_partitions(&bus.connection, &mut found).await?;
    let partition = args.partition.or(target.partition());
    // A file may be attached more than once.
    let (unlocked, locked): (Vec<_>, Vec<_>) =
        found.iter().map(|info| unlocked(info, partition)).partition(Result::is_ok);
    if let (true, Some(error)) = (unlocked.is_empty(), locked.into_iter().find_map(Result::err)) {
        return Err(error);
    }
    with_agent(interaction, async {
        let mut results = Vec::new();
        for volume in unlocked.into_iter().flatten().flatten() {
            results.push(lock(&bus, volume.path, args.lazy).await);
        }
        Ok(report_all(&results))
    })
    .await
}

/// The unlocked volumes, or the requested partition.
fn unlocked(info: &AttachmentInfo, partition: Option<u32>) -> anyhow::Result<Vec<Volume<'_>>> {
    let mut volumes = match partition {
        Some(number) => vec![volume::choose(info, Some(number))?],
        None => volume::of(info),
    };
    volumes.retain(|volume| volume.cleartext.is_some());
    let device = &info.attachment.device;
    match partition {
        _ if !volumes.is_empty() => Ok(volumes),
        Some(number) => anyhow::bail!("partition {number} of {device} is not unlocked"),
        None => anyhow::bail!("no volume of {device} is unlocked; `loopctl list` shows unlocked volumes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example::{attachment, cleartext, partition};

    #[test]
    fn only_unlocked_volumes_are_locked() {
        let mut info = attachment();
        info.partitions.push(partition(12, 2));
        let text = |info: &AttachmentInfo, partition| unlocked(info, partition).unwrap_err().to_string();
        assert!(text(&info, None).starts_with("no volume of /dev/loop0 is unlocked"));
        info.partitions[1].cleartext = Some(cleartext(Some(2)));
        let numbers: Vec<_> = unlocked(&info, None).unwrap().iter().map(|volume| volume.partition).collect();
        assert_eq!(numbers, [Some(2)]);
        assert_eq!(unlocked(&info, Some(2)).unwrap().len(), 1);
        assert_eq!(text(&info, Some(1)), "partition 1 of /dev/loop0 is not unlocked");
        assert!(text(&info, Some(3)).contains("has no partition 3"));
    }
}
