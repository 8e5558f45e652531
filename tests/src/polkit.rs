//! polkit: the real one, or a stand-in with a configured answer.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use serde::Serialize;
use tokio::sync::Notify;
use zbus::{Connection, OwnedVariant, Type};

use crate::bus::{Bus, repository};
use crate::process::{Process, eventually, tied};
use crate::{GAMES, WWW_DATA, skip};

const NAME: &str = "org.freedesktop.PolicyKit1";
const ACTIONS: &str = "/usr/share/polkit-1/actions";
const RULES: &str = "/etc/polkit-1/rules.d";

/// The kind of polkit that a test uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// No polkit.
    None,
    /// polkitd with the shipped actions, and a rule that allows `games` and denies `www-data`.
    Real,
    /// A stand-in with this answer.
    StandIn(Answer),
}

/// The polkit of a test.
#[derive(Debug)]
pub enum Polkit {
    /// None.
    None,
    /// polkitd.
    Real(Process),
    /// The stand-in.
    StandIn(StandIn),
}

impl Polkit {
    /// Starts it on the bus.
    ///
    /// # Errors
    /// It does not start; or polkitd is not installed, and the test is skipped.
    pub async fn start(setup: Setup, bus: &Bus, directory: &Path) -> Result<Self> {
        Ok(match setup {
            Setup::None => Self::None,
            Setup::Real => Self::Real(start_polkitd(bus, directory).await?),
            Setup::StandIn(answer) => Self::StandIn(StandIn::start(bus, answer).await?),
        })
    }
}

async fn start_polkitd(bus: &Bus, directory: &Path) -> Result<Process> {
    let programs = ["/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd"];
    let Some(program) = programs.into_iter().find(|path| Path::new(path).exists()) else {
        return skip("polkitd is not installed");
    };
    // Only polkitd sees these two directories, in its own mount namespace.
    let actions = directory.join("actions");
    let rules = directory.join("rules.d");
    std::fs::create_dir(&actions)?;
    std::fs::create_dir(&rules)?;
    for entry in std::fs::read_dir(ACTIONS).into_iter().flatten() {
        let entry = entry?;
        std::fs::copy(entry.path(), actions.join(entry.file_name()))?;
    }
    std::fs::copy(repository().join("polkit/org.loopd1.policy"), actions.join("org.loopd1.policy"))?;
    std::fs::write(
        rules.join("10-loopd-tests.rules"),
        format!(
            "polkit.addRule(function(action, subject) {{\n\
             if (action.id.indexOf('org.loopd1.') != 0) return;\n\
             if (subject.user == '{}') return polkit.Result.YES;\n\
             if (subject.user == '{}') return polkit.Result.NO;\n\
             }});\n",
            GAMES.name, WWW_DATA.name
        ),
    )?;
    let mut command = tied("unshare");
    command
        .args(["--mount", "--propagation", "private", "--", "sh", "-ec"])
        .arg(format!("mount --bind \"$1\" {ACTIONS}; mount --bind \"$2\" {RULES}; exec \"$3\" --no-debug"))
        .arg("sh")
        .args([&actions, &rules])
        .arg(program)
        .env("DBUS_SYSTEM_BUS_ADDRESS", bus.address())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(directory.join("polkitd.log"))?);
    let mut process = Process::spawn("polkitd", &mut command)?;
    let connection = bus.connect().await?;
    let names = zbus::fdo::DBusProxy::new(&connection).await?;
    eventually("polkitd is on the bus", async || {
        if let Some(status) = process.exited()? {
            let log = std::fs::read_to_string(directory.join("polkitd.log")).unwrap_or_default();
            anyhow::bail!("polkitd ended: {status}\n{log}");
        }
        Ok(names.name_has_owner(NAME.try_into()?).await?)
    })
    .await?;
    Ok(process)
}

/// An answer of the stand-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Allows.
    Yes,
    /// Denies.
    No,
    /// A challenge; allows if the caller permits a prompt.
    Prompt,
    /// A challenge; if the caller permits a prompt, the user dismisses it.
    Dismissed,
    /// A challenge; if the caller permits a prompt, it stays open until the check is cancelled.
    OpenPrompt,
    /// No answer until the check is cancelled.
    Never,
}

/// An authorization check that the stand-in received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The action.
    pub action: String,
    /// The details.
    pub details: HashMap<String, String>,
    /// Whether a prompt was allowed.
    pub interactive: bool,
    /// The cancellation id.
    pub cancellation_id: String,
    /// The subject's kind.
    pub subject_kind: String,
    /// The subject's bus name; empty for other kinds.
    pub subject_name: String,
}

#[derive(Debug)]
struct State {
    answer: Answer,
    checks: Vec<Check>,
    cancelled: Vec<String>,
}

/// A stand-in for polkit in this process.
#[derive(Debug)]
pub struct StandIn {
    state: Arc<Mutex<State>>,
    _connection: Connection,
}

impl StandIn {
    async fn start(bus: &Bus, answer: Answer) -> Result<Self> {
        let state = Arc::new(Mutex::new(State { answer, checks: Vec::new(), cancelled: Vec::new() }));
        let authority = Authority { state: Arc::clone(&state), cancelled: Notify::new() };
        let connection = zbus::connection::Builder::address(bus.address())
            .serve_at("/org/freedesktop/PolicyKit1/Authority", authority)
            .name(NAME)
            .build()
            .await
            .context("cannot stand in for polkit")?;
        Ok(Self { state, _connection: connection })
    }

    /// Sets the answer to further checks.
    pub fn answer(&self, answer: Answer) {
        lock(&self.state).answer = answer;
    }

    /// The checks so far.
    #[must_use]
    pub fn checks(&self) -> Vec<Check> {
        lock(&self.state).checks.clone()
    }

    /// The cancellations so far.
    #[must_use]
    pub fn cancelled(&self) -> Vec<String> {
        lock(&self.state).cancelled.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Serialize, Type)]
struct AuthorizationResult {
    is_authorized: bool,
    is_challenge: bool,
    details: HashMap<String, String>,
}

impl AuthorizationResult {
    fn new(is_authorized: bool, is_challenge: bool) -> Self {
        Self { is_authorized, is_challenge, details: HashMap::new() }
    }
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.PolicyKit1.Error")]
enum PolkitError {
    #[zbus(error)]
    ZBus(zbus::Error),
    Cancelled(String),
    Failed(String),
}

struct Authority {
    state: Arc<Mutex<State>>,
    cancelled: Notify,
}

#[zbus::interface(name = "org.freedesktop.PolicyKit1.Authority")]
impl Authority {
    async fn check_authorization(
        &self,
        subject: (String, HashMap<String, OwnedVariant>),
        action: String,
        details: HashMap<String, String>,
        flags: u32,
        cancellation_id: String,
    ) -> Result<(AuthorizationResult,), PolkitError> {
        let name = subject.1.get("name").and_then(|name| <&str>::try_from(name).ok());
        let subject_name = name.unwrap_or_default().to_owned();
        let interactive = flags & 1 != 0;
        let check = Check {
            action,
            details,
            interactive,
            cancellation_id: cancellation_id.clone(),
            subject_kind: subject.0,
            subject_name,
        };
        let answer = {
            let mut state = lock(&self.state);
            state.checks.push(check);
            state.answer
        };
        let result = match answer {
            Answer::Yes => AuthorizationResult::new(true, false),
            Answer::No => AuthorizationResult::new(false, false),
            Answer::Prompt => AuthorizationResult::new(interactive, !interactive),
            Answer::Dismissed => {
                let mut result = AuthorizationResult::new(false, !interactive);
                if interactive {
                    result.details.insert("polkit.dismissed".to_owned(), "true".to_owned());
                }
                result
            }
            Answer::OpenPrompt if !interactive => AuthorizationResult::new(false, true),
            Answer::OpenPrompt | Answer::Never => {
                self.until_cancelled(&cancellation_id).await;
                return Err(PolkitError::Cancelled("cancelled".to_owned()));
            }
        };
        Ok((result,))
    }

    async fn cancel_check_authorization(&self, cancellation_id: String) -> Result<(), PolkitError> {
        let known = {
            let mut state = lock(&self.state);
            let known = state.checks.iter().any(|check| check.cancellation_id == cancellation_id);
            state.cancelled.push(cancellation_id);
            known
        };
        self.cancelled.notify_waiters();
        if known { Ok(()) } else { Err(PolkitError::Failed("no such check".to_owned())) }
    }
}

impl Authority {
    async fn until_cancelled(&self, id: &str) {
        loop {
            let notified = self.cancelled.notified();
            if !id.is_empty() && lock(&self.state).cancelled.iter().any(|cancelled| cancelled == id) {
                return;
            }
            notified.await;
        }
    }
}
