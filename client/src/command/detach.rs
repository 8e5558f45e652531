//! `loopctl detach`.

use std::ffi::OsStr;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{DetachOptions, ListOptions};

use super::change::report_all;
use crate::bus::agent::with_agent;
use crate::bus::attachment::{AttachmentInfo, add_partitions, list};
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_gone};
use crate::cli::Detach;
use crate::device_node::device_node;
use crate::image::busy_device;
use crate::image::target::Target;
use crate::image::volume;
use crate::in_use::InUse;

/// Detaches each target; a failure does not stop the others.
pub async fn run(args: &Detach, interaction: Interaction) -> anyhow::Result<u8> {
    let bus = Bus::open(interaction).await?;
    let options = DetachOptions { lazy: args.lazy };
    with_agent(interaction, async {
        let results = if args.all {
            let all = list(&bus.manager, &ListOptions::default()).await?;
            detach_each(&bus, &all, options).await
        } else {
            let mut results = Vec::new();
            for target in &args.targets {
                results.extend(detach_target(&bus, target, options).await);
            }
            results
        };
        Ok(report_all(&results))
    })
    .await
}

async fn detach_target(bus: &Bus, target: &OsStr, options: DetachOptions) -> Vec<anyhow::Result<()>> {
    let target = Target::resolve(target);
    if let Target::Device(number) = target {
        return vec![match bus.manager.detach(&device_node(number), options).await {
            Ok(()) => Ok(()),
            Err(error) => Err(explained(bus, explain(error), number).await),
        }];
    }
    match target.find(&bus.manager).await {
        Ok(found) => detach_each(bus, &found, options).await,
        Err(error) => vec![Err(error)],
    }
}

async fn detach_each(
    bus: &Bus,
    attachments: &[AttachmentInfo],
    options: DetachOptions,
) -> Vec<anyhow::Result<()>> {
    let mut results = Vec::new();
    for info in attachments {
        results.push(match detach(bus, info, options).await {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        });
    }
    results
}

/// Detaches by the object, which identifies the attachment: its node may have been reused since.
async fn detach(bus: &Bus, info: &AttachmentInfo, options: DetachOptions) -> anyhow::Result<()> {
    match bus.attachment(&info.path).await?.detach(options).await {
        Ok(()) => Ok(()),
        Err(error) => Err(explained(bus, explain(error), info.attachment.number).await),
    }
}

/// Adds to a `Busy` the users of the device, and how to lock its unlocked volumes.
async fn explained(bus: &Bus, error: anyhow::Error, number: u32) -> anyhow::Error {
    let error = busy_device::explained(bus, error, number).await;
    match error.downcast::<InUse>() {
        Ok(mut in_use) if is_unlocked(bus, number).await => {
            let device = device_node(number);
            in_use.holders.push(format!(
                "`loopctl unmount {device}` unmounts and locks what is unlocked; `loopctl lock {device}` only locks it"
            ));
            in_use.into()
        }
        Ok(in_use) => in_use.into(),
        Err(error) => error,
    }
}

async fn is_unlocked(bus: &Bus, number: u32) -> bool {
    let Ok(mut found) = Target::Device(number).find(&bus.manager).await else { return false };
    let is_known = add_partitions(&bus.connection, &mut found).await.is_ok();
    is_known && found.iter().flat_map(volume::of).any(|volume| volume.cleartext.is_some())
}

#[cfg(test)]
mod tests {
    use loopd_dbus::{Error, ErrorKind};

    use super::*;
    use crate::bus::example;
    use crate::bus::fake::FakeLoopd;
    use crate::in_use::explanation;

    #[test]
    fn a_busy_device_with_an_unlocked_volume_can_be_locked() {
        let mut info = example::attachment();
        for is_unlocked in [false, true] {
            info.cleartext = is_unlocked.then(|| example::cleartext(None));
            let loopd = FakeLoopd::new(info.clone());
            loopd.state().is_attached = true;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            assert_eq!(
                runtime.block_on(async { super::is_unlocked(&loopd.connect().await, 0).await }),
                is_unlocked
            );
            let busy = Error::new(ErrorKind::Busy, "it is busy");
            let error = runtime.block_on(async { explained(&loopd.connect().await, busy.into(), 0).await });
            let is_explained =
                explanation(&error).iter().any(|line| line.contains("`loopctl lock /dev/loop0`"));
            assert_eq!(is_explained, is_unlocked);
        }
    }
}
