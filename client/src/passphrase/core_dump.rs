//! No core file, and no tracing by other processes, while a secret is in memory.

use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The process's settings, while at least one [`NoCoreDumps`] exists.
static STATE: Mutex<State> =
    Mutex::new(State { users: 0, before: Settings { soft_limit: None, is_dumpable: false } });

struct State {
    users: usize,
    /// What the last user restores.
    before: Settings,
}

/// RLIMIT_CORE and the attribute of prctl(2), which also forbids ptrace and reads of `/proc/PID/mem`.
#[derive(Clone, Copy)]
struct Settings {
    soft_limit: Option<rlim_t>,
    is_dumpable: bool,
}

/// While one exists, the process writes no core file.
pub struct NoCoreDumps(());

impl NoCoreDumps {
    /// Switches core files off.
    #[must_use]
    pub fn new() -> Self {
        let mut state = state();
        if state.users == 0 {
            let limit = getrlimit(Resource::RLIMIT_CORE).ok();
            state.before = Settings {
                soft_limit: limit.map(|(soft, _)| soft),
                is_dumpable: prctl::get_dumpable().unwrap_or_default(),
            };
            set_soft_limit(0);
            let _ = prctl::set_dumpable(false);
        }
        state.users += 1;
        Self(())
    }
}

impl Drop for NoCoreDumps {
    fn drop(&mut self) {
        let mut state = state();
        state.users -= 1;
        if state.users == 0 {
            // A command of `loopctl run` inherits the limit.
            state.before.soft_limit.into_iter().for_each(set_soft_limit);
            let _ = prctl::set_dumpable(state.before.is_dumpable);
        }
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Both calls fail only for a limit above the hard one.
fn set_soft_limit(soft: rlim_t) {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_CORE) {
        let _ = setrlimit(Resource::RLIMIT_CORE, soft.min(hard), hard);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passphrase::asking::is_child;

    #[test]
    fn core_files_are_off_while_a_secret_exists() {
        let one = NoCoreDumps::new();
        let other = NoCoreDumps::new();
        drop(one);
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap().0, 0);
        assert!(!prctl::get_dumpable().unwrap());
        drop(other);
    }

    #[test]
    fn settings_are_restored() {
        // Other tests of this process change them, too.
        if !is_child() {
            let test = "passphrase::core_dump::tests::settings_are_restored";
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            let status = command.args(["--exact", test]).env("LOOPCTL_TEST_CHILD", "1").status().unwrap();
            return assert!(status.success());
        }
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
        setrlimit(Resource::RLIMIT_CORE, hard.min(4096), hard).unwrap();
        drop(NoCoreDumps::new());
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (hard.min(4096), hard));
        assert!(prctl::get_dumpable().unwrap());
    }
}
