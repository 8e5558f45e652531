//! Runs `loopd-probe`: a client of any user, which can be killed at any moment.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use loopd_dbus::{Error, ErrorKind};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::fixture::Attached;
use crate::process::{PATIENCE, pid};
use crate::sysfs::LoopDevice;

/// The daemon's reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The method's result.
    Ok(Value),
    /// The error's name and message.
    Error(String, String),
}

impl Reply {
    fn read(line: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Ok(match value.get("ok") {
            Some(result) => Self::Ok(result.clone()),
            None => Self::Error(text("error"), text("message")),
        })
    }

    /// The result of `SetupLoop`.
    ///
    /// # Errors
    /// It failed.
    pub fn attached(&self) -> Result<Attached> {
        let Self::Ok(result) = self else { bail!("not attached: {self:?}") };
        let text = |key: &str| result[key].as_str().unwrap_or_default();
        let device = LoopDevice::from_node(text("device"))?;
        Ok(Attached { path: text("attachment").try_into()?, device })
    }

    /// The result.
    ///
    /// # Errors
    /// It failed.
    pub fn ok(&self) -> Result<&Value> {
        match self {
            Self::Ok(result) => Ok(result),
            Self::Error(name, message) => bail!("{name}: {message}"),
        }
    }

    /// The contract's error of this kind, with a message.
    ///
    /// # Errors
    /// It succeeded, or failed with another error.
    pub fn refused(&self, kind: ErrorKind) -> Result<Error> {
        match self {
            Self::Error(name, message) if name == kind.name() && !message.is_empty() => {
                Ok(Error::new(kind, message.clone()))
            }
            _ => bail!("expected {kind:?}, got {self:?}"),
        }
    }
}

/// A running probe; killed when dropped.
#[derive(Debug)]
pub struct Probe {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Probe {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped());
        Self::spawn_with_input(command)
    }

    /// Starts it with the standard input of the command.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_with_input(command: Command) -> Result<Self> {
        let mut command = tokio::process::Command::from(command);
        command.arg("--json").stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("cannot start loopd-probe")?;
        let output = child.stdout.take().context("no pipe")?;
        Ok(Self { child, lines: BufReader::new(output).lines() })
    }

    /// The next printed line: the reply.
    ///
    /// # Errors
    /// It ends without one, or takes too long.
    pub async fn reply(&mut self) -> Result<Reply> {
        Reply::read(&self.line().await?)
    }

    /// Waits until it is connected: `--prompted` is among its arguments.
    ///
    /// # Errors
    /// It ends before.
    pub async fn ready(&mut self) -> Result<()> {
        let line = self.line().await?;
        if line != "ready" { bail!("the probe printed {line:?}") } else { Ok(()) }
    }

    /// Lets a probe with `--prompted` make its call.
    ///
    /// # Errors
    /// It has ended.
    pub async fn go(&mut self) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no pipe")?;
        Ok(input.write_all(b"\n").await?)
    }

    async fn line(&mut self) -> Result<String> {
        let line = tokio::time::timeout(3 * PATIENCE, self.lines.next_line()).await;
        line.context("the probe printed nothing")??.context("the probe ended without an answer")
    }

    /// Its process id.
    ///
    /// # Errors
    /// It has ended.
    pub fn pid(&self) -> Result<nix::unistd::Pid> {
        self.child.id().map(pid).context("the probe has ended")
    }

    /// Kills it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Closes its standard input, and waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub async fn close(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        tokio::time::timeout(PATIENCE, self.child.wait()).await.context("the probe does not end")??;
        Ok(())
    }
}
