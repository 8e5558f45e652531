//! Detaches the device that a command attached itself.

use loopd_dbus::DetachOptions;
use zbus::wire::OwnedObjectPath;

use crate::advice::Operation;
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_busy, is_gone};
use crate::device_node::loop_number;
use crate::image::busy_device;
use crate::message::message;
use crate::report::report;

/// Detaches the device and waits until it is free; lazily if it is in use. Errors are reported, but do
/// not fail the command.
pub async fn release(bus: &Bus, path: &OwnedObjectPath, device: &str) {
    if let Err(error) = try_release(bus, path, device).await
        && !is_gone(&error)
    {
        report(&error, Operation::Other);
    }
}

async fn try_release(bus: &Bus, path: &OwnedObjectPath, device: &str) -> anyhow::Result<()> {
    let attachment = bus.attachment(path).await?;
    match attachment.detach(DetachOptions::default()).await.map_err(explain) {
        Err(error) if is_busy(&error) => {
            let error = match loop_number(device) {
                Some(number) => busy_device::explained(bus, error, number).await,
                None => error,
            };
            report(&error, Operation::Other)
        }
        result => return result,
    };
    message(&format!("{device} will be detached when it is no longer in use"));
    attachment.detach(DetachOptions { lazy: true }).await.map_err(explain)
}
