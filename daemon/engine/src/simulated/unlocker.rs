//! Unlocking on a simulated machine: each step may fail.

use std::time::Duration;

use super::file::SimulatedFile;
use super::machine::Simulated;
use crate::error::Error;
use crate::future::BoxFuture;
use crate::unlocker::{Closing, UnlockCommand, Unlocked, Unlocker};

impl Unlocker<SimulatedFile> for Simulated {
    fn unlock(
        &self,
        command: UnlockCommand<SimulatedFile>,
    ) -> BoxFuture<'_, Result<Box<dyn Unlocked>, Error>> {
        let _ = command;
        todo!("simulated unlocker")
    }

    fn close(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        let _ = (name, timeout);
        todo!("simulated unlocker")
    }

    fn set_closing(
        &self,
        name: String,
        closing: Closing,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<(), Error>> {
        let _ = (name, closing, timeout);
        todo!("simulated unlocker")
    }
}
