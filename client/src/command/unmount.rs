//! `loopctl unmount`.

use std::os::unix::ffi::OsStrExt;

use loopd_dbus::UnmountOptions;
use loopd_dbus::proxy::Interaction;

use crate::advice::Operation;
use crate::bus::agent::{Interrupted, with_agent};
use crate::bus::connection::Bus;
use crate::cli::Unmount;
use crate::desktop;
use crate::image::unmount::{find, unmount};
use crate::in_use::explanation;
use crate::message::printable;
use crate::report::report;

/// Unmounts the target.
pub async fn run(args: &Unmount, interaction: Interaction) -> anyhow::Result<u8> {
    let results = unmount_target(args, interaction).await.unwrap_or_else(|error| vec![Err(error)]);
    let mut status = 0;
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        status = status.max(report(error, Operation::Other));
        if args.notify && !error.is::<Interrupted>() {
            let name = printable(args.target.as_bytes());
            desktop::notify(&format!("{name} is not unmounted"), &explanation(error).join("\n")).await;
        }
    }
    Ok(status)
}

/// Unmounts each attachment of the target; a failure does not stop the others.
async fn unmount_target(args: &Unmount, interaction: Interaction) -> anyhow::Result<Vec<anyhow::Result<()>>> {
    let bus = Bus::open(interaction).await?;
    let requests = find(&bus, &args.target).await?;
    let options = UnmountOptions { lazy: args.lazy };
    with_agent(interaction, async {
        let mut results = Vec::new();
        for request in &requests {
            results.push(unmount(&bus, request, options).await);
        }
        Ok(results)
    })
    .await
}
