//! Unlocking on a simulated machine: each step may fail.

use std::time::Duration;

use super::file::SimulatedFile;
use super::machine::{Mapped, Simulated};
use super::mappings::{NewMapping, parse_loop};
use crate::error::Error;
use crate::future::BoxFuture;
use crate::kernel::DiskSequence;
use crate::unlocker::{Closing, Prepared, UnlockCommand, Unlocked, Unlocker};

/// How long a secret may take, and how often it is looked for.
const SECRET_TIMEOUT: Duration = Duration::from_secs(30);
const SECRET_POLL: Duration = Duration::from_millis(10);

/// The program that has read its secret.
struct PreparedProgram {
    machine: Simulated,
    command: UnlockCommand<SimulatedFile>,
}

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

    /// Whether secrets do not end from now on.
    pub fn set_secret_withheld(&self, is_withheld: bool) {
        self.lock().secret_withheld = is_withheld;
    }

    /// From now on programs that unlock die with the daemon, and leave what they have unlocked.
    pub fn let_programs_die(&self) {
        self.lock().programs_die = true;
    }
}

impl Prepared for PreparedProgram {
    fn open(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn Unlocked>, Error>> {
        let Self { machine: simulated, command } = *self;
        Box::pin(async move {
            simulated.step().await?;
            if simulated.lock().wrong_secret {
                return Err(Error::WrongSecret { volume: command.shown });
            }
            let busy =
                |reason: String| Error::Busy { operation: format!("unlock {}", command.shown), reason };
            let (loop_number, partition) =
                parse_loop(&command.device).ok_or_else(|| busy("there is no such device".to_owned()))?;
            let (name, kind, read_only) = (command.name.clone(), command.kind, command.request.read_only);
            let made = {
                let mut machine = simulated.lock();
                let made = machine.map(NewMapping { loop_number, partition, name, kind, read_only });
                made.map(|number| (number, machine.mapped[&number].mapping.disk_sequence))
            };
            let (number, disk_sequence) = made.map_err(busy)?;
            simulated.news.notify_one();
            let machine = simulated.clone();
            let program = UnlockProgram { machine, number, disk_sequence, has_ended: false };
            // It is unlocked, and the daemon does not know yet.
            simulated.step().await?;
            Ok(Box::new(program) as Box<dyn Unlocked>)
        })
    }
}

impl Unlocker<SimulatedFile> for Simulated {
    fn prepare(
        &self,
        command: UnlockCommand<SimulatedFile>,
    ) -> BoxFuture<'_, Result<Box<dyn Prepared>, Error>> {
        Box::pin(async move {
            self.step().await?;
            let end = tokio::time::Instant::now() + SECRET_TIMEOUT;
            while self.lock().secret_withheld {
                if tokio::time::Instant::now() >= end {
                    let operation = format!("unlock {}", command.shown);
                    let reason = "the secret did not end in time".to_owned();
                    return Err(Error::Timeout { operation, reason });
                }
                tokio::time::sleep(SECRET_POLL).await;
            }
            Ok(Box::new(PreparedProgram { machine: self.clone(), command }) as Box<dyn Prepared>)
        })
    }

    fn end(&self, _: String, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.step())
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
