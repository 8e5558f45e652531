//! Claims of numbers within this process, so that no two operations work on the same number.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use loopd_engine::Error;
use loopd_engine::kernel::node;
use nix::errno::Errno;

use super::control::Control;
use crate::error::failed;
use crate::sysfs::loop_device;

/// The error for a number that cannot be used for a file with this name.
pub fn taken(number: u32, name: &str) -> Error {
    Error::Busy {
        operation: format!("attach {name} to {}", node(number)),
        reason: "that device is taken; choose another number, or leave it out".to_owned(),
    }
}

fn not_removed(number: u32, errno: Errno) -> Error {
    match errno {
        Errno::ENODEV => Error::NoDevice { number },
        Errno::EBUSY if loop_device::is_bound(number) => {
            in_use(number, "a file is attached to it; detach it first")
        }
        Errno::EBUSY => in_use(number, "a process has it open"),
        errno => failed(format!("remove {}", node(number)), "LOOP_CTL_REMOVE", errno),
    }
}

fn being_attached(number: u32) -> Error {
    in_use(number, "another operation is in progress on it")
}

fn in_use(number: u32, reason: &str) -> Error {
    Error::Busy { operation: format!("remove {}", node(number)), reason: reason.to_owned() }
}

/// An operation on a number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Attach,
    Remove,
}

/// The numbers of loop devices.
pub struct Numbers {
    control: Control,
    /// The numbers with an operation of this process in progress. Locked only to choose a number, never while
    /// the kernel accesses a file: that may hang, and must not block other operations.
    operations: Mutex<HashMap<u32, Operation>>,
    /// Notified when a removal has ended.
    removed: Condvar,
}

/// A number that no other operation of this process uses.
pub struct Claim {
    numbers: Arc<Numbers>,
    number: u32,
    node_made: bool,
    /// Whether the kernel made the device for this claim of any number.
    added: bool,
}

impl Numbers {
    /// No number is claimed yet.
    pub fn new(control: Control) -> Self {
        Self { control, operations: Mutex::default(), removed: Condvar::new() }
    }

    /// Claims the wanted number, or chooses one, for a file with this name.
    pub fn claim(self: &Arc<Self>, wanted: Option<u32>, name: &str) -> Result<Claim, Error> {
        let action = format!("attach {name}");
        let mut operations = self.operations();
        while wanted.is_some_and(|number| operations.get(&number) == Some(&Operation::Remove)) {
            operations = self.removed.wait(operations).unwrap_or_else(PoisonError::into_inner);
        }
        let (number, node_made, added) = match wanted {
            Some(number) if operations.contains_key(&number) || loop_device::is_bound(number) => {
                return Err(taken(number, name));
            }
            Some(number) => (number, self.control.ensure_exists(number, &action)?, false),
            None => {
                let (number, added) = self.choose(&operations, &action)?;
                (number, false, added)
            }
        };
        operations.insert(number, Operation::Attach);
        drop(operations);
        Ok(Claim { numbers: Arc::clone(self), number, node_made, added })
    }

    /// A free number, which is not claimed.
    pub fn free_number(&self) -> Result<u32, Error> {
        self.choose(&self.operations(), "find a free loop device").map(|(number, _added)| number)
    }

    /// The kernel's choice, or the next number after it that is free and has no operation in progress; and whether
    /// its device was added.
    fn choose(&self, operations: &HashMap<u32, Operation>, action: &str) -> Result<(u32, bool), Error> {
        let first = self.control.free_number(action)?;
        let is_free = |number: &u32| !operations.contains_key(number) && !loop_device::is_bound(*number);
        let number = (first..).find(is_free).unwrap_or(first);
        Ok((number, self.control.ensure_exists(number, action)?))
    }

    /// Whether an operation of this process is in progress on the number.
    pub fn is_claimed(&self, number: u32) -> bool {
        self.operations().contains_key(&number)
    }

    /// Removes a device.
    pub fn remove(&self, number: u32) -> Result<(), Error> {
        let removed = self.remove_if_unclaimed(number).ok_or_else(|| being_attached(number))?;
        removed.map_err(|errno| not_removed(number, errno))
    }

    /// Removes a device unless it is in use.
    pub fn remove_if_unused(&self, number: u32) {
        let _in_use = self.remove_if_unclaimed(number);
    }

    /// `None` if the number is claimed.
    fn remove_if_unclaimed(&self, number: u32) -> Option<nix::Result<()>> {
        match self.operations().entry(number) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(entry) => drop(entry.insert(Operation::Remove)),
        }
        let removed = self.control.remove(number);
        self.operations().remove(&number);
        self.removed.notify_all();
        Some(removed)
    }

    fn operations(&self) -> MutexGuard<'_, HashMap<u32, Operation>> {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// The number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether the device was added for this claim.
    pub fn node_made(&self) -> bool {
        self.node_made
    }

    /// Ends the claim after an error, and removes the device if it was added for this claim.
    pub fn give_up(self) {
        let (numbers, number, made) = (Arc::clone(&self.numbers), self.number, self.node_made || self.added);
        drop(self);
        if made {
            numbers.remove_if_unused(number);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.numbers.operations().remove(&self.number);
    }
}
