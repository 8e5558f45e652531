//! The text polkit agent: asks for a password on the terminal if there is no graphical agent.

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

/// How long to wait for the agent to register on a loaded machine; after that the call is made without
/// it. An agent that cannot register exits immediately.
const REGISTRATION: Duration = Duration::from_secs(30);
/// How long to wait for the agent to exit after SIGTERM.
const EXIT: Duration = Duration::from_secs(2);

/// A signal interrupted the operation.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted by signal {0}")]
pub struct Interrupted(pub u8);

/// Runs the operation with an agent on the terminal, if a prompt may be needed and can be answered.
///
/// # Errors
/// Those of the operation, or [`Interrupted`].
pub async fn with_agent<T>(
    interaction: Interaction,
    operation: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    if !is_wanted(interaction) {
        return operation.await;
    }
    // Handlers first: the agent must not be left reading the terminal if a signal ends loopctl.
    let interrupted = interruption()?;
    let agent = Agent::start();
    let prompted = async {
        if let Some(agent) = &agent {
            agent.registered().await;
        }
        operation.await
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

/// Runs the operation until it completes or a signal arrives, so that the caller can undo it.
///
/// # Errors
/// Those of the operation, or [`Interrupted`].
pub async fn interruptible<T>(operation: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let interrupted = interruption()?;
    tokio::select! {
        result = operation => result,
        signal = interrupted => Err(Interrupted(signal).into()),
    }
}

fn is_wanted(interaction: Interaction) -> bool {
    let can_be_answered = stdin().is_terminal() && stderr().is_terminal();
    interaction == Interaction::Allowed && !geteuid().is_root() && can_be_answered
}

/// Returns the number of the signal, once SIGINT, SIGTERM or SIGHUP arrives.
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

/// Whether the user may have a login session, whose graphical agent then takes precedence. Outside of
/// one polkitd never uses an agent registered as a fallback.
fn has_session() -> bool {
    Path::new("/run/systemd/users").join(getuid().to_string()).exists()
}

/// A running `pkttyagent`.
struct Agent {
    child: Child,
    notify: OwnedFd,
}

impl Agent {
    /// `None` if it is not installed or cannot be started; there is no text prompt then.
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

    /// Waits until the agent has registered or exited: it closes its descriptor in both cases.
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
        if timeout(EXIT, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// SIGTERM, so that it can restore the terminal's echo.
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
