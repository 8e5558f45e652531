//! What an answer promises, whatever else is under way.

use loopd_common::{Lifetime, Overlap, State};

use super::House;
use super::act::{ANOTHER, Act, Answer, Reply, Target};

/// Whether an act may end an attachment, or change what it ends with.
pub fn ends(act: Act) -> bool {
    use Act::*;
    matches!(act, Detach | DetachLazily | ForeignDetach | SetLifetime(_) | Attach(..))
}

/// Whether an act may unmount what is mounted.
pub fn unmounts(act: Act) -> bool {
    matches!(act, Act::Unmount | Act::UnmountLazily | Act::ForeignUnmount)
}

/// Checks at the moment of the answer what nothing else that happens may have broken.
pub fn check_answer(
    house: &House,
    act: Act,
    answer: &Answer,
    target: Target,
    others: &[Act],
) -> Result<(), String> {
    let Ok(reply) = answer else { return Ok(()) };
    let is_alone = |breaks: fn(Act) -> bool| !others.iter().any(|other| breaks(*other));
    match (act, reply) {
        (Act::Detach, _) => is_gone(house, target),
        (Act::Mount, Reply::Mounted(place)) if is_alone(unmounts) => is_mounted(house, target, place),
        (Act::SetLifetime(Lifetime::Persistent), _) if is_alone(ends) => stays(house, target),
        // What is given back to others stays as it is.
        (Act::Attach(Lifetime::Persistent, Overlap::Allow | Overlap::Refuse), Reply::Attached(attached))
            if is_alone(ends) =>
        {
            stays(house, *attached)
        }
        (Act::Replace, _) if is_alone(ends) => {
            let file = house.engine.find(target.id).map(|found| found.device.backing_inode);
            holds(file.is_none_or(|file| file == ANOTHER), || format!("replaced, and it shows {file:?}"))
        }
        _ => Ok(()),
    }
}

/// The device is free, and nobody lists it.
pub fn is_gone(house: &House, target: Target) -> Result<(), String> {
    let id = target.id;
    holds(!house.machine.has_attach(id), || format!("{id} is detached, and the kernel still has it"))?;
    holds(house.engine.find(id).is_none(), || format!("{id} is detached, and listed"))
}

/// It is mounted there, and listed so.
pub fn is_mounted(house: &House, target: Target, place: &std::path::Path) -> Result<(), String> {
    let is_there = house.machine.mount_table().has(place);
    holds(is_there, || format!("{} is mounted, and nothing is on {place:?}", target.id))?;
    // What loopd has not attached itself gets another object when the daemon starts anew.
    let listed: Vec<_> = house.engine.list().into_iter().flat_map(|found| found.mount_points).collect();
    holds(listed.iter().any(|listed| listed == place), || format!("{place:?} is not listed: {listed:?}"))
}

/// It is persistent, and nobody is taking it down.
pub fn stays(house: &House, target: Target) -> Result<(), String> {
    let id = target.id;
    let found = house.engine.find(id).ok_or_else(|| format!("{id} is to stay, and gone"))?;
    let lifetime = found.ownership.as_ref().map(|ownership| ownership.lifetime);
    let stands = (lifetime, found.state) == (Some(Lifetime::Persistent), State::Attached);
    holds(stands, || format!("{id} is to stay, and is {lifetime:?}, {:?}", found.state))?;
    let (number, sequence) = (found.device.number, found.device.disk_sequence);
    let is_replaced = house.engine.state().records.get(&id).is_some_and(|record| record.replacing);
    let is_there = house.machine.bound().iter().any(|bound| (bound.0, bound.1) == (number, sequence));
    let is_there = is_there || is_replaced;
    holds(is_there, || format!("{id} is listed, and the kernel has it no more"))
}

fn holds(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}
