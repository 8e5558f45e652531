//! losetup, over the bus: what util-linux's losetup takes, prints and returns.
//!
//! The reference is losetup from util-linux 2.42; `docs/man/loopctl-losetup.1` lists what is meant to
//! differ.

mod column;
mod device;
mod failure;
mod listing;
mod number;
mod options;
mod order;
mod release;
mod setup;
mod table;
pub mod usage;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;

use loopd_dbus::proxy::{Attachment, Interaction};

use self::device::Device;
use self::failure::{Failure, Reason};
use self::order::Order;
use crate::agent::{Interrupted, with_agent};
use crate::connection::{self, Bus, explain};
use crate::output::{self, Closed};

/// The name under which loopctl is losetup.
const NAME: &str = "losetup";

/// Whether the program was started under losetup's name.
#[must_use]
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()).is_some_and(|name| name == NAME)
}

/// Does what the words behind the program's name say; gives the exit status.
pub async fn run(words: &[OsString], interaction: Interaction) -> u8 {
    match obey(words, interaction).await {
        Ok(is_done) => u8::from(!is_done),
        Err(error) => report(&error),
    }
}

async fn obey(words: &[OsString], interaction: Interaction) -> anyhow::Result<bool> {
    let order = match Order::read(words)? {
        Order::Help => return output::print(&usage::help()).map(|()| true),
        Order::Version => return output::print(&usage::version()).map(|()| true),
        order => order,
    };
    let bus = connection::open(interaction).await?;
    with_agent(interaction, carry_out(&bus, &order)).await
}

/// Tells whether all of it was done; what was not is said by then.
async fn carry_out(bus: &Bus, order: &Order) -> anyhow::Result<bool> {
    match order {
        Order::Help | Order::Version => {}
        Order::Show(which, shape) => listing::show(bus, which, shape).await?,
        Order::Attach(attach) => setup::attach(bus, attach).await?,
        Order::FindFree => find_free(bus).await?,
        Order::Detach(devices) => return Ok(release::detach(bus, devices).await),
        Order::DetachAll => return release::detach_all(bus).await,
        Order::Remove(devices) => return Ok(release::remove(bus, devices).await),
        Order::SetCapacity(device) => {
            change(bus, device, "set capacity failed", async |attachment| attachment.set_capacity().await)
                .await?;
        }
        Order::SetDirectIo(device, direct_io) => {
            let set = async |attachment: &Attachment| attachment.set_direct_io(*direct_io).await;
            change(bus, device, "set direct io failed", set).await?;
        }
        Order::SetBlockSize(device, bytes) => {
            let failed = "set logical block size failed";
            let size = setup::block_size(*bytes);
            if let (Err(errno), Ok(_)) = (size, device.number()) {
                return Err(Failure::of(&device.path, failed, &errno.into()).into());
            }
            let set = async |attachment: &Attachment| attachment.set_block_size(size.unwrap_or(512)).await;
            change(bus, device, failed, set).await?;
        }
    }
    Ok(true)
}

async fn find_free(bus: &Bus) -> anyhow::Result<()> {
    let free = bus.manager.find_free().await;
    let device = free.map_err(|error| setup::no_free_device(&Reason::of(&explain(error))))?;
    output::print(&format!("{device}\n"))
}

/// Makes the change to the device's attachment.
async fn change(
    bus: &Bus,
    device: &Device,
    what: &str,
    change: impl AsyncFn(&Attachment) -> zbus::Result<()>,
) -> anyhow::Result<()> {
    let failed = |reason: &Reason| Failure::of(&device.path, what, reason);
    let number = device.number().map_err(|errno| failed(&errno.into()))?;
    let attached = listing::attached_to(bus, number).await?;
    let attached = attached.ok_or_else(|| failed(&nix::errno::Errno::ENXIO.into()))?;
    let changed = change(&bus.attachment(&attached.path).await?).await;
    changed.map_err(|error| failed(&Reason::of(&explain(error))).into())
}

/// Says it on standard error. That it cannot be said stops nobody.
fn say(failure: &Failure) {
    if failure.text.is_empty() {
        return;
    }
    let mut text = [NAME.as_bytes(), b": ", &failure.text, b"\n"].concat();
    if failure.is_usage {
        text.extend(format!("Try '{NAME} --help' for more information.\n").bytes());
    }
    let _ = std::io::stderr().write_all(&text);
}

fn report(error: &anyhow::Error) -> u8 {
    if error.is::<Closed>() {
        return 0;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        return 128 + signal;
    }
    match error.downcast_ref::<Failure>() {
        Some(failure) => say(failure),
        None => say(&Failure::new(output::escaped(format!("{error:#}").as_bytes()))),
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_knows_its_name() {
        for name in ["losetup", "/usr/local/libexec/loopctl/losetup", "./losetup"] {
            assert!(is_called(Some(OsStr::new(name))), "{name}");
        }
        for name in ["loopctl", "/usr/bin/loopctl", "mylosetup", "losetup/loopctl", ""] {
            assert!(!is_called(Some(OsStr::new(name))), "{name}");
        }
        assert!(!is_called(None));
    }
}
