//! Copies of the descriptors that keep autoclear devices alive, in the service manager's store: with
//! them the devices outlive the daemon until the next one takes them up.

use std::collections::HashSet;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use loopd_engine::BoxFuture;
use loopd_engine::kernel::DiskSequence;
use loopd_kernel::DescriptorStore;

use crate::service_manager;

/// What the service manager has of us.
#[derive(Default)]
pub struct Vault {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    kept: HashSet<DiskSequence>,
    /// Names of what the last daemon left, and nobody has taken up yet.
    unclaimed: HashSet<String>,
    /// The descriptors that were passed. Whoever takes something up opens the device anew, so that
    /// these are only closed.
    passed: Vec<RawFd>,
}

fn name(device: DiskSequence) -> String {
    format!("disk-sequence-{device}")
}

impl Vault {
    /// With what the last daemon left.
    #[must_use]
    pub fn open() -> Self {
        let (passed, unclaimed) = match sd_notify::listen_fds_with_names() {
            Ok(passed) => passed.unzip(),
            Err(error) => {
                warn!("what the service manager has kept is not understood: {error}");
                (Vec::new(), HashSet::new())
            }
        };
        Self { contents: Mutex::new(Contents { kept: HashSet::new(), unclaimed, passed }) }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DescriptorStore for Vault {
    fn has_stored_hold(&self, device: DiskSequence) -> bool {
        self.contents().unclaimed.contains(&name(device))
    }

    fn deposit(&self, device: DiskSequence, descriptor: BorrowedFd<'_>) {
        let name = name(device);
        let mut contents = self.contents();
        let is_there = contents.unclaimed.remove(&name);
        if is_there || (service_manager::is_there() && service_manager::keep(&name, descriptor)) {
            contents.kept.insert(device);
        }
    }

    fn withdraw(&self, device: DiskSequence) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let name = name(device);
            let is_kept = {
                let mut contents = self.contents();
                let was_left = contents.unclaimed.remove(&name);
                contents.kept.remove(&device) || was_left
            };
            if is_kept {
                service_manager::abort_calls(&name);
                service_manager::caught_up().await;
            }
        })
    }

    fn clear_out(&self, except: &HashSet<DiskSequence>) {
        let except: HashSet<String> = except.iter().map(|device| name(*device)).collect();
        let (unclaimed, passed) = {
            let mut contents = self.contents();
            let (left, unclaimed) =
                std::mem::take(&mut contents.unclaimed).into_iter().partition(|name| except.contains(name));
            contents.unclaimed = left;
            let unclaimed: HashSet<String> = unclaimed;
            (unclaimed, std::mem::take(&mut contents.passed))
        };
        for name in unclaimed {
            info!("{name} was kept and belongs to no attachment: closed");
            service_manager::abort_calls(&name);
        }
        for descriptor in passed {
            let _was_open = nix::unistd::close(descriptor);
        }
    }
}
