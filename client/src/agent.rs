//! The text polkit agent: asks for a password on the terminal where no graphical agent does.

use std::future::Future;
use std::io::{IsTerminal, stderr, stdin};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{self, Stdio};
use std::time::Duration;

use loopd_dbus::proxy::Interaction;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup, geteuid, getuid, pipe2};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// How long the agent may take to register on a machine that has much else to do; without it the call is
/// made all the same. One that cannot register ends at once.
const REGISTRATION: Duration = Duration::from_secs(30);
/// How long the agent may take to end after SIGTERM.
const END: Duration = Duration::from_secs(2);

/// A signal ended the work.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted by signal {0}")]
pub struct Interrupted(pub u8);

/// Does the work, and offers a prompt on the terminal meanwhile where one may be needed and can be
/// answered.
///
/// # Errors
/// Those of the work, or [`Interrupted`].
pub async fn with_agent<T>(
    interaction: Interaction,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    if !is_wanted(interaction) {
        return work.await;
    }
    // Handlers first: the agent must not stay behind and read the terminal when we are ended.
    let interrupted = interruption()?;
    let agent = Agent::start();
    let prompted = async {
        if let Some(agent) = &agent {
            agent.registered().await;
        }
        work.await
    };
    let result = tokio::select! {
        result = prompted => result,
        signal = interrupted => Err(Interrupted(signal).into()),
    };
    if let Some(agent) = agent {
        agent.stop().await;
    }
    result
}

/// Does the work until it is done or a signal comes, so that what it did can be undone.
///
/// # Errors
/// Those of the work, or [`Interrupted`].
pub async fn interruptible<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let interrupted = interruption()?;
    tokio::select! {
        result = work => result,
        signal = interrupted => Err(Interrupted(signal).into()),
    }
}

fn is_wanted(interaction: Interaction) -> bool {
    let can_be_answered = stdin().is_terminal() && stderr().is_terminal();
    interaction == Interaction::Allowed && !geteuid().is_root() && can_be_answered
}

/// Resolves with the number of the signal that would end a program at a terminal.
///
/// # Errors
/// The signals cannot be received.
pub fn interruption() -> std::io::Result<impl Future<Output = u8>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => 2,
            _ = terminate.recv() => 15,
            _ = hangup.recv() => 1,
        }
    })
}

/// Whether the user may have a login session, whose graphical agent then comes first. Outside of one
/// polkitd never asks an agent that is a fallback.
fn has_session() -> bool {
    Path::new("/run/systemd/users").join(getuid().to_string()).exists()
}

/// `pkttyagent`, while it runs.
struct Agent {
    child: Child,
    notify: OwnedFd,
}

impl Agent {
    /// `None` where it is not installed or cannot be started: then there is just no text prompt.
    fn start() -> Option<Self> {
        let (notify, write) = pipe2(OFlag::O_CLOEXEC).ok()?;
        // dup() leaves CLOEXEC off: the agent inherits this one descriptor.
        let inherited = dup(&write).ok()?;
        let child = Command::new("pkttyagent")
            .args(["--process", &process::id().to_string()])
            .args(["--notify-fd", &inherited.as_raw_fd().to_string()])
            .args(has_session().then_some("--fallback"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { child, notify })
    }

    /// Waits until the agent is registered, or has ended: it closes its descriptor then.
    async fn registered(&self) {
        let Ok(notify) = self.notify.try_clone() else { return };
        let closed = tokio::net::unix::pipe::Receiver::from_owned_fd(notify);
        let Ok(closed) = closed else { return };
        let _ = timeout(REGISTRATION, async {
            let mut byte = [0];
            while closed.readable().await.is_ok() {
                match closed.try_read(&mut byte) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    _ => break,
                }
            }
        })
        .await;
    }

    async fn stop(mut self) {
        self.terminate();
        if timeout(END, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// SIGTERM, so that it can give the terminal its echo back.
    fn terminate(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.terminate();
    }
}
