//! `loopctl detach`.

use std::ffi::OsStr;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{DetachOptions, ListOptions};

use super::change::report_all;
use crate::bus::agent::with_agent;
use crate::bus::attachment::{AttachmentInfo, list};
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_gone};
use crate::cli::Detach;
use crate::device_node::device_node;
use crate::image::busy_device;
use crate::image::target::Target;

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
            Err(error) => Err(busy_device::explained(bus, explain(error), number).await),
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
        Err(error) => Err(busy_device::explained(bus, explain(error), info.attachment.number).await),
    }
}
