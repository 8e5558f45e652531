//! The guarantees of a reply, whatever other actions are in progress.

use loopd_common::{Lifetime, Overlap, State};

use super::action::{ANOTHER, Action, Answer, Reply, Target};
use crate::tests::harness::Harness;

/// Whether an action may end an attachment, or change its lifetime.
pub fn ends(action: Action) -> bool {
    use Action::*;
    matches!(action, Detach | DetachLazily | ForeignDetach | SetLifetime(_) | Attach(..) | AttachPart(_))
}

/// Whether an action may unmount a volume.
pub fn unmounts(action: Action) -> bool {
    matches!(action, Action::Unmount | Action::UnmountLazily | Action::ForeignUnmount)
}

/// Checks the guarantees of a reply at the moment of the reply, except those that another action may have ended.
pub fn check_answer(
    harness: &Harness,
    action: Action,
    answer: &Answer,
    target: Target,
    others: &[Action],
) -> Result<(), String> {
    let Ok(reply) = answer else { return Ok(()) };
    let is_alone = |breaks: fn(Action) -> bool| !others.iter().any(|other| breaks(*other));
    match (action, reply) {
        (Action::Detach, _) => is_gone(harness, target),
        (Action::Mount, Reply::Mounted(directory)) if is_alone(unmounts) => {
            is_mounted(harness, target, directory)
        }
        (Action::SetLifetime(Lifetime::Persistent), _) if is_alone(ends) => stays(harness, target),
        // A reused attachment keeps its lifetime.
        (
            Action::Attach(Lifetime::Persistent, Overlap::Allow | Overlap::Refuse),
            Reply::Attached(attached),
        ) if is_alone(ends) => stays(harness, *attached),
        (Action::Replace, _) if is_alone(ends) => {
            let file = harness.engine.find(target.id).map(|found| found.device.backing_inode);
            holds(file.is_none_or(|file| file == ANOTHER), || format!("replaced, and it shows {file:?}"))
        }
        _ => Ok(()),
    }
}

/// Checks that the device is free, and not listed.
pub fn is_gone(harness: &Harness, target: Target) -> Result<(), String> {
    let id = target.id;
    holds(!harness.machine.has_attach(id), || format!("{id} is detached, and the kernel still has it"))?;
    holds(harness.engine.find(id).is_none(), || format!("{id} is detached, and listed"))
}

/// Checks that it is mounted there, and listed as mounted.
pub fn is_mounted(harness: &Harness, target: Target, directory: &std::path::Path) -> Result<(), String> {
    let is_there = harness.machine.mount_table().has(directory);
    holds(is_there, || format!("{} is mounted, and nothing is on {directory:?}", target.id))?;
    // A foreign device gets another object when the daemon starts again.
    let listed: Vec<_> = harness.engine.list().into_iter().flat_map(|found| found.mount_points).collect();
    holds(listed.iter().any(|listed| listed == directory), || {
        format!("{directory:?} is not listed: {listed:?}")
    })
}

/// Checks that it is persistent, and not being detached.
pub fn stays(harness: &Harness, target: Target) -> Result<(), String> {
    let id = target.id;
    let found = harness.engine.find(id).ok_or_else(|| format!("{id} must stay, and is gone"))?;
    let lifetime = found.ownership.as_ref().map(|ownership| ownership.lifetime);
    let stands = (lifetime, found.state) == (Some(Lifetime::Persistent), State::Attached);
    holds(stands, || format!("{id} must stay, and is {lifetime:?}, {:?}", found.state))?;
    let (number, sequence) = (found.device.number, found.device.disk_sequence);
    let is_replaced =
        harness.engine.state().records.get(&id).is_some_and(|record| record.lifecycle.is_replacing());
    let is_there = harness.machine.bound().iter().any(|bound| (bound.0, bound.1) == (number, sequence));
    let is_there = is_there || is_replaced;
    holds(is_there, || format!("{id} is listed, and the kernel no longer has it"))
}

fn holds(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}
