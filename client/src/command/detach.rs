//! `loopctl detach`.

use std::ffi::OsStr;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{DetachOptions, Error, ErrorKind, ListOptions};
use zbus::wire::OwnedObjectPath;

use crate::agent::with_agent;
use crate::cli::Detach;
use crate::connection;
use crate::connection::{Bus, explain};
use crate::output::{message, report};
use crate::target::{Attached, Target, device_node, list};

/// Detaches each target; one that fails does not stop the others.
pub async fn run(args: &Detach, interaction: Interaction) -> anyhow::Result<u8> {
    let bus = connection::open(interaction).await?;
    let options = DetachOptions { lazy: args.lazy };
    with_agent(interaction, async {
        let results = if args.all {
            detach_all(&bus, options).await?
        } else {
            let mut results = Vec::new();
            for target in &args.targets {
                results.extend(detach_target(&bus, target, options).await);
            }
            results
        };
        Ok(status(&results))
    })
    .await
}

/// Says what went wrong; gives the exit status for all of them.
pub fn status(results: &[anyhow::Result<()>]) -> u8 {
    let failures: Vec<u8> = results.iter().filter_map(|result| result.as_ref().err()).map(report).collect();
    u8::from(!failures.is_empty())
}

async fn detach_all(bus: &Bus, options: DetachOptions) -> anyhow::Result<Vec<anyhow::Result<()>>> {
    let attached = list(&bus.manager, &ListOptions::default()).await?;
    Ok(detach_each(bus, &attached, options).await)
}

async fn detach_target(bus: &Bus, word: &OsStr, options: DetachOptions) -> Vec<anyhow::Result<()>> {
    let target = Target::resolve(word);
    if let Target::Device(number) = target {
        let result = bus.manager.detach(&device_node(number), options).await;
        return vec![result.map_err(explain)];
    }
    match target.find(&bus.manager).await {
        Ok(attached) => detach_each(bus, &attached, options).await,
        Err(error) => vec![Err(error)],
    }
}

async fn detach_each(bus: &Bus, attached: &[Attached], options: DetachOptions) -> Vec<anyhow::Result<()>> {
    let mut results = Vec::new();
    for one in attached {
        results.push(match detach(bus, one, options).await {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        });
    }
    results
}

/// By its object, which stands for this very attachment: the node may hold another file by now.
async fn detach(bus: &Bus, attached: &Attached, options: DetachOptions) -> anyhow::Result<()> {
    bus.attachment(&attached.path).await?.detach(options).await.map_err(explain)
}

/// Detaches, and is back when the device is free; lazily where something still uses it. Whatever
/// goes wrong is said; what the user called for does not fail by it.
pub async fn release(bus: &Bus, path: &OwnedObjectPath, device: &str) {
    if let Err(error) = try_release(bus, path, device).await
        && !is_gone(&error)
    {
        report(&error);
    }
}

async fn try_release(bus: &Bus, path: &OwnedObjectPath, device: &str) -> anyhow::Result<()> {
    let attachment = bus.attachment(path).await?;
    match attachment.detach(DetachOptions::default()).await.map_err(explain) {
        Err(error) if is_busy(&error) => report(&error),
        result => return result,
    };
    message(&format!("{device} is detached as soon as nothing uses it any more"));
    attachment.detach(DetachOptions { lazy: true }).await.map_err(explain)
}

/// Whether somebody uses it.
pub fn is_busy(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.kind == ErrorKind::Busy)
}

/// Whether what was to be detached was gone already.
pub fn is_gone(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<Error>().map(|error| error.kind);
    matches!(kind, Some(ErrorKind::UnknownObject | ErrorKind::NotFound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_needs_no_detaching() {
        assert!(is_gone(&Error::new(ErrorKind::UnknownObject, "").into()));
        assert!(!is_gone(&Error::new(ErrorKind::Busy, "").into()));
        assert!(!is_gone(&anyhow::anyhow!("other")));
    }

    #[test]
    fn one_failure_fails_the_command() {
        assert_eq!(status(&[Ok(()), Ok(())]), 0);
        assert_eq!(status(&[Ok(()), Err(anyhow::anyhow!("a test's failure"))]), 1);
    }
}
