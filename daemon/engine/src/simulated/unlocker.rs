//! Unlocking on a simulated machine: each step may fail.

use std::time::Duration;

use super::file::SimulatedFile;
use super::machine::Simulated;
use super::mappings::{Mapped, NewMapping, parse_loop};
use crate::error::Error;
use crate::future::BoxFuture;
use crate::kernel::DiskSequence;
use crate::unlocker::{Closing, UnlockCommand, Unlocked, Unlocker};

/// The program that has unlocked a volume, and waits for the daemon.
struct UnlockProgram {
    machine: Simulated,
    number: u32,
    disk_sequence: DiskSequence,
    /// Whether it has ended.
    has_ended: bool,
}

impl UnlockProgram {
    fn is_it(&self) -> impl Fn(&Mapped) -> bool {
        let disk_sequence = self.disk_sequence;
        move |mapped| mapped.mapping.disk_sequence == disk_sequence
    }
}

impl Drop for UnlockProgram {
    /// It closes what it has unlocked, unless it died with the daemon.
    fn drop(&mut self) {
        let died = self.machine.is_dead() && self.machine.lock().programs_die;
        if !self.has_ended && !died {
            self.machine.alter_mapping(self.number, self.is_it(), |mapped| mapped.deferred = true);
        }
    }
}

impl Unlocked for UnlockProgram {
    fn keep(mut self: Box<Self>, closing: Closing) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(async move {
            self.machine.step().await?;
            let deferred = closing == Closing::AtLastClose;
            self.machine.alter_mapping(self.number, self.is_it(), |mapped| mapped.deferred = deferred);
            self.has_ended = true;
            // It has done so, and the daemon does not know yet.
            self.machine.step().await
        })
    }
}

impl Simulated {
    /// Whether secrets are wrong from now on.
    pub fn set_wrong_secret(&self, is_wrong: bool) {
        self.lock().wrong_secret = is_wrong;
    }

    /// From now on programs that unlock die with the daemon, and leave what they have unlocked.
    pub fn let_programs_die(&self) {
        self.lock().programs_die = true;
    }
}

impl Unlocker<SimulatedFile> for Simulated {
    fn unlock(
        &self,
        command: UnlockCommand<SimulatedFile>,
    ) -> BoxFuture<'_, Result<Box<dyn Unlocked>, Error>> {
        Box::pin(async move {
            self.step().await?;
            if self.lock().wrong_secret {
                return Err(Error::WrongSecret { volume: command.shown });
            }
            let busy =
                |reason: String| Error::Busy { operation: format!("unlock {}", command.shown), reason };
            let (loop_number, partition) =
                parse_loop(&command.device).ok_or_else(|| busy("there is no such device".to_owned()))?;
            let (name, kind, read_only) = (command.name.clone(), command.kind, command.request.read_only);
            let made = {
                let mut machine = self.lock();
                let made = machine.map(NewMapping { loop_number, partition, name, kind, read_only });
                made.map(|number| (number, machine.mapped[&number].mapping.disk_sequence))
            };
            let (number, disk_sequence) = made.map_err(busy)?;
            self.news.notify_one();
            let machine = self.clone();
            let program = UnlockProgram { machine, number, disk_sequence, has_ended: false };
            // It is unlocked, and the daemon does not know yet.
            self.step().await?;
            Ok(Box::new(program) as Box<dyn Unlocked>)
        })
    }

    fn close(&self, name: String, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.step().await?;
            let number = self.number_of_mapping(&name);
            let is_used = number.and_then(|number| self.lock().mapped.get(&number).map(Mapped::is_used));
            if is_used == Some(true) {
                return Err(Error::Busy { operation: format!("close {name}"), reason: "in use".to_owned() });
            }
            self.alter_named(&name, |mapped| mapped.deferred = true);
            self.answer().await;
            Ok(())
        })
    }

    fn set_closing(&self, name: String, closing: Closing, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.step().await?;
            self.alter_named(&name, |mapped| mapped.deferred = closing == Closing::AtLastClose);
            self.answer().await;
            Ok(())
        })
    }
}
