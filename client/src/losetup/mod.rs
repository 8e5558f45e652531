//! losetup over D-Bus: accepts the arguments of util-linux's losetup, and prints the same output.
//!
//! The reference is util-linux 2.42; `docs/man/loopctl-losetup.1` lists the intended differences.

mod attach;
mod column;
mod detach;
mod device;
mod failure;
mod listing;
mod options;
mod request;
mod size;
mod table;
pub mod usage;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use loopd_dbus::proxy::{Attachment, Interaction};

use self::device::Device;
use self::failure::{Failure, NAME, Reason};
use self::request::Request;
use crate::bus::agent::{Interrupted, with_agent};
use crate::bus::connection::Bus;
use crate::bus::error::explain;
use crate::message::escaped;
use crate::show::stdout::{Closed, print};

/// Whether the program was started under losetup's name.
#[must_use]
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()).is_some_and(|name| name == NAME)
}

/// Runs with the arguments after the program's name; returns the exit status.
pub async fn run(arguments: &[OsString], interaction: Interaction) -> u8 {
    match try_run(arguments, interaction).await {
        Ok(is_done) => u8::from(!is_done),
        Err(error) => report(&error),
    }
}

async fn try_run(arguments: &[OsString], interaction: Interaction) -> anyhow::Result<bool> {
    let request = match Request::parse(arguments)? {
        Request::Help => return print(&usage::help()).map(|()| true),
        Request::Version => return print(&usage::version()).map(|()| true),
        request => request,
    };
    let bus = Bus::open(interaction).await?;
    with_agent(interaction, execute(&bus, &request)).await
}

/// Returns whether everything succeeded; the failures have been printed.
async fn execute(bus: &Bus, request: &Request) -> anyhow::Result<bool> {
    match request {
        Request::Help | Request::Version => {}
        Request::List(selection, output) => listing::show(bus, selection, output).await?,
        Request::Attach(request) => attach::attach(bus, request).await?,
        Request::FindFree => find_free(bus).await?,
        Request::Detach(devices) => return Ok(detach::detach(bus, devices).await),
        Request::DetachAll => return detach::detach_all(bus).await,
        Request::Remove(devices) => return Ok(detach::remove(bus, devices).await),
        Request::SetCapacity(device) => {
            change(bus, device, "set capacity failed", async |attachment| attachment.set_capacity().await)
                .await?;
        }
        Request::SetDirectIo(device, direct_io) => {
            let set = async |attachment: &Attachment| attachment.set_direct_io(*direct_io).await;
            change(bus, device, "set direct io failed", set).await?;
        }
        Request::SetBlockSize(device, bytes) => {
            let failed = "set logical block size failed";
            let size = attach::block_size(*bytes);
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
    let device = free.map_err(|error| attach::no_free_device(&Reason::of(&explain(error))))?;
    print(&format!("{device}\n"))
}

/// Applies the change to the attachment of the device.
async fn change(
    bus: &Bus,
    device: &Device,
    what: &str,
    change: impl AsyncFn(&Attachment) -> zbus::Result<()>,
) -> anyhow::Result<()> {
    let failed = |reason: &Reason| Failure::of(&device.path, what, reason);
    let number = device.number().map_err(|errno| failed(&errno.into()))?;
    let info = listing::attachment_of(bus, number).await?;
    let info = info.ok_or_else(|| failed(&nix::errno::Errno::ENXIO.into()))?;
    let changed = change(&bus.attachment(&info.path).await?).await;
    changed.map_err(|error| failed(&Reason::of(&explain(error))).into())
}

fn report(error: &anyhow::Error) -> u8 {
    if error.is::<Closed>() {
        return 0;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        return 128 + signal;
    }
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.print(),
        None => Failure::new(escaped(format!("{error:#}").as_bytes())).print(),
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_recognized_by_its_name() {
        for name in ["losetup", "/usr/local/libexec/loopctl/losetup", "./losetup"] {
            assert!(is_called(Some(OsStr::new(name))), "{name}");
        }
        for name in ["loopctl", "/usr/bin/loopctl", "mylosetup", "losetup/loopctl", ""] {
            assert!(!is_called(Some(OsStr::new(name))), "{name}");
        }
        assert!(!is_called(None));
    }
}
