//! Copies of the descriptors that keep autoclear devices attached, in the service manager's file
//! descriptor store: with them the devices survive this daemon until the next one adopts them.

use std::collections::HashSet;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use super::notify;
use loopd_engine::kernel::DiskSequence;
use loopd_kernel::DescriptorStore;

/// The service manager's file descriptor store.
#[derive(Default)]
pub struct FdStore {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    stored: HashSet<DiskSequence>,
    /// Names of descriptors that the previous daemon stored and that no attachment has claimed yet.
    unclaimed: HashSet<String>,
    /// The descriptors received at the start. An adopted device is opened again, so these are only
    /// closed.
    received: Vec<RawFd>,
}

/// The name of a device's descriptor in the store.
fn name(device: DiskSequence) -> String {
    format!("disk-sequence-{device}")
}

impl FdStore {
    /// The store with the descriptors that the previous daemon left in it.
    #[must_use]
    pub fn open() -> Self {
        let (received, unclaimed) = match sd_notify::listen_fds_with_names() {
            Ok(received) => received.unzip(),
            Err(error) => {
                warn!("cannot read the descriptors from the service manager: {error}");
                (Vec::new(), HashSet::new())
            }
        };
        Self { contents: Mutex::new(Contents { stored: HashSet::new(), unclaimed, received }) }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    /// Removes the device; returns its name if it has a copy.
    fn take(&mut self, device: DiskSequence) -> Option<String> {
        let name = name(device);
        let was_unclaimed = self.unclaimed.remove(&name);
        (self.stored.remove(&device) || was_unclaimed).then_some(name)
    }

    /// Removes and returns the unclaimed names that belong to no device of `except`, and the received
    /// descriptors.
    fn take_unclaimed(&mut self, except: &HashSet<DiskSequence>) -> (HashSet<String>, Vec<RawFd>) {
        let claimed: HashSet<String> = except.iter().map(|device| name(*device)).collect();
        let (kept, removed) =
            std::mem::take(&mut self.unclaimed).into_iter().partition(|name| claimed.contains(name));
        self.unclaimed = kept;
        (removed, std::mem::take(&mut self.received))
    }
}

impl DescriptorStore for FdStore {
    fn has_stored_hold(&self, device: DiskSequence) -> bool {
        self.contents().unclaimed.contains(&name(device))
    }

    fn deposit(&self, device: DiskSequence, descriptor: BorrowedFd<'_>) {
        let name = name(device);
        let mut contents = self.contents();
        let is_stored = contents.unclaimed.remove(&name);
        if is_stored || (notify::is_available() && notify::store_fd(&name, descriptor)) {
            contents.stored.insert(device);
        }
    }

    fn withdraw(&self, devices: &[DiskSequence]) {
        let stored: Vec<String> = {
            let mut contents = self.contents();
            devices.iter().filter_map(|device| contents.take(*device)).collect()
        };
        stored.iter().for_each(|name| notify::remove_fd(name));
        if !stored.is_empty() {
            notify::barrier();
        }
    }

    fn clear_out(&self, except: &HashSet<DiskSequence>) {
        let (unclaimed, received) = self.contents().take_unclaimed(except);
        for name in unclaimed {
            info!("closing {name} in the descriptor store: no attachment uses it");
            notify::remove_fd(&name);
        }
        for descriptor in received {
            let _was_open = nix::unistd::close(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(unclaimed: &[u64]) -> FdStore {
        let unclaimed = unclaimed.iter().map(|id| name(DiskSequence(*id))).collect();
        FdStore { contents: Mutex::new(Contents { unclaimed, ..Contents::default() }) }
    }

    #[test]
    fn descriptors_of_the_previous_daemon_are_unclaimed_until_deposited() {
        let store = store(&[7, 8]);
        let stdin = std::io::stdin();
        assert!(store.has_stored_hold(DiskSequence(7)) && !store.has_stored_hold(DiskSequence(9)));
        store.deposit(DiskSequence(7), std::os::fd::AsFd::as_fd(&stdin));
        assert!(!store.has_stored_hold(DiskSequence(7)) && store.has_stored_hold(DiskSequence(8)));
        assert!(store.contents().stored.contains(&DiskSequence(7)));
    }

    #[test]
    fn a_copy_is_withdrawn_once() {
        let store = store(&[7]);
        store.contents().stored.insert(DiskSequence(8));
        let take = |id| store.contents().take(DiskSequence(id));
        assert_eq!(
            (take(7), take(8), take(9)),
            (Some(name(DiskSequence(7))), Some(name(DiskSequence(8))), None)
        );
        assert_eq!((take(7), take(8)), (None, None));
    }

    #[test]
    fn only_unclaimed_descriptors_of_other_devices_are_removed() {
        let store = store(&[7, 8]);
        store.contents().received = vec![-1];
        let (removed, received) = store.contents().take_unclaimed(&HashSet::from([DiskSequence(7)]));
        assert_eq!(removed, HashSet::from([name(DiskSequence(8))]));
        assert_eq!(received, [-1]);
        assert!(store.has_stored_hold(DiskSequence(7)) && !store.has_stored_hold(DiskSequence(8)));
    }
}
