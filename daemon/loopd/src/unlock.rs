//! Unlocks volumes for the engine: a transient unit of the service manager runs the program `loopd-unlock`.

use std::time::Duration;

use loopd_common::CallerFile;
use loopd_engine::{BoxFuture, Closing, Error, UnlockCommand, Unlocked, Unlocker};
use zbus::Connection;

use crate::systemd::Units;

/// Unlocks volumes in units of the service manager.
pub struct UnlockUnits {
    units: Units,
}

impl UnlockUnits {
    /// Uses the service manager on this bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        Ok(Self { units: Units::new(connection).await? })
    }
}

impl Unlocker<CallerFile> for UnlockUnits {
    fn unlock(&self, command: UnlockCommand<CallerFile>) -> BoxFuture<'_, Result<Box<dyn Unlocked>, Error>> {
        let _ = (command, &self.units);
        todo!("unlock")
    }

    fn close(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        let _ = (name, timeout);
        todo!("close")
    }

    fn set_closing(
        &self,
        name: String,
        closing: Closing,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<(), Error>> {
        let _ = (name, closing, timeout);
        todo!("set_closing")
    }
}
