//! What an answer promises, whatever else is under way.

use loopd_common::{Lifetime, Overlap, State};

use super::action::{ANOTHER, Action, Answer, Reply, Target};
use crate::tests::harness::Harness;

/// Whether an action may end an attachment, or change what it ends with.
pub fn ends(action: Action) -> bool {
    use Action::*;
    matches!(action, Detach | DetachLazily | ForeignDetach | SetLifetime(_) | Attach(..) | AttachPart(_))
}

/// Whether an action may unmount what is mounted.
pub fn unmounts(action: Action) -> bool {
    matches!(
        action,
        Action::Unmount | Action::UnmountLazily | Action::UnmountCleartext | Action::ForeignUnmount
    )
}

/// Whether an action may unlock what is locked.
pub fn unlocks(action: Action) -> bool {
    matches!(action, Action::Unlock | Action::UnlockPartition)
}

/// Checks at the moment of the answer what nothing else that happens may have broken.
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
        (Action::Lock, _) if is_alone(unlocks) => is_locked(harness, target),
        (Action::Mount | Action::MountCleartext, Reply::Mounted(directory)) if is_alone(unmounts) => {
            is_mounted(harness, target, directory)
        }
        (Action::SetLifetime(Lifetime::Persistent), _) if is_alone(ends) => stays(harness, target),
        // What is given back to others stays as it is.
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

/// The device is free, and not listed.
pub fn is_gone(harness: &Harness, target: Target) -> Result<(), String> {
    let id = target.id;
    holds(!harness.machine.has_attach(id), || format!("{id} is detached, and the kernel still has it"))?;
    holds(harness.engine.find(id).is_none(), || format!("{id} is detached, and listed"))
}

/// It has no mapping of loopd, and none is listed.
fn is_locked(harness: &Harness, target: Target) -> Result<(), String> {
    let mut mapped = harness.machine.mappings_on(target.number);
    mapped.retain(|(_, mapping)| mapping.name == format!("loopd-{}", target.id));
    holds(mapped.is_empty(), || format!("{} is locked, and the kernel has {mapped:?}", target.id))?;
    let listed = harness.engine.find(target.id).and_then(|found| found.cleartext);
    holds(listed.is_none(), || format!("{} is locked, and listed as {listed:?}", target.id))
}

/// It is mounted there, and listed so.
pub fn is_mounted(harness: &Harness, target: Target, directory: &std::path::Path) -> Result<(), String> {
    let is_there = harness.machine.mount_table().has(directory);
    holds(is_there, || format!("{} is mounted, and nothing is on {directory:?}", target.id))?;
    // A foreign device gets another object when the daemon starts again.
    let listed = harness.engine.list();
    let of_devices = listed.into_iter().flat_map(|found| found.mount_points);
    // Not as they are listed: while a backing file is replaced, no partition is.
    let state = harness.engine.state();
    let cleartexts = state.records.values().flat_map(|record| record.cleartexts.values());
    let of_cleartexts = cleartexts.flat_map(|cleartext| cleartext.show(&state.mounts).mount_points);
    let listed: Vec<_> = of_cleartexts.chain(of_devices).collect();
    holds(listed.iter().any(|listed| listed == directory), || {
        format!("{directory:?} is not listed: {listed:?}")
    })
}

/// It is persistent, and not being detached.
pub fn stays(harness: &Harness, target: Target) -> Result<(), String> {
    let id = target.id;
    let found = harness.engine.find(id).ok_or_else(|| format!("{id} is to stay, and gone"))?;
    let lifetime = found.ownership.as_ref().map(|ownership| ownership.lifetime);
    let stands = (lifetime, found.state) == (Some(Lifetime::Persistent), State::Attached);
    holds(stands, || format!("{id} is to stay, and is {lifetime:?}, {:?}", found.state))?;
    let (number, sequence) = (found.device.number, found.device.disk_sequence);
    let is_replaced =
        harness.engine.state().records.get(&id).is_some_and(|record| record.lifecycle.is_replacing());
    let is_there = harness.machine.bound().iter().any(|bound| (bound.0, bound.1) == (number, sequence));
    let is_there = is_there || is_replaced;
    holds(is_there, || format!("{id} is listed, and the kernel has it no more"))
}

fn holds(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}
