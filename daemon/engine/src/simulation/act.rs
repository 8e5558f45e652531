//! What may happen on a simulated machine: calls of clients, and what the rest of the machine does.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, Overlap};

use super::{Client, House};
use crate::kernel::{Change, DiskSequence};
use crate::mount_simulation::{wanted, whole};
use crate::simulated::Simulated;
use crate::{AttachRequest, Engine, Snapshot};

/// A file that is shown in the place of another.
pub const ANOTHER: u64 = 2;
/// How long calls that were given up have to undo what they did, as `main.rs` has it.
const UNDO: Duration = Duration::from_millis(500);

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// `SetupLoop` with the file that the target has.
    Attach(Lifetime, Overlap),
    /// `Detach`.
    Detach,
    /// `Detach` with `lazy`.
    DetachLazily,
    /// `SetLifetime`.
    SetLifetime(Lifetime),
    /// `Mount`.
    Mount,
    /// `Unmount`.
    Unmount,
    /// `Unmount` with `lazy`.
    UnmountLazily,
    /// `ReplaceBackingFile`.
    Replace,
    /// `SetCapacity`.
    SetCapacity,
    /// `SetDirectIo(true)`.
    DirectIo,
    /// `SetDirectIo(false)`.
    NoDirectIo,
    /// `SetBlockSize`.
    SetBlockSize,
    /// `RescanPartitions`.
    Rescan,
    /// The client's connection ends.
    Vanish,
    /// SIGTERM, and the time for calls under way is over.
    GiveUp,
    /// SIGKILL.
    Die,
    /// udev's events come late.
    DelayEvents,
    /// udev's events are lost.
    LoseEvents,
    /// Another program attaches the same file.
    ForeignAttach,
    /// Another program detaches the target.
    ForeignDetach,
    /// Another program mounts it.
    ForeignMount,
    /// Another program unmounts it.
    ForeignUnmount,
    /// Another program opens it.
    Open,
    /// Another program closes it.
    Close,
    /// Another program has the partition table read again.
    Reread,
}

/// Everything that may happen.
pub const ALL: [Act; 29] = [
    Act::Attach(Lifetime::Client, Overlap::Allow),
    Act::Attach(Lifetime::Mount, Overlap::Reuse),
    Act::Attach(Lifetime::Persistent, Overlap::Allow),
    Act::Attach(Lifetime::Persistent, Overlap::Reuse),
    Act::Attach(Lifetime::Client, Overlap::Refuse),
    Act::Detach,
    Act::DetachLazily,
    Act::SetLifetime(Lifetime::Client),
    Act::SetLifetime(Lifetime::Mount),
    Act::SetLifetime(Lifetime::Persistent),
    Act::Mount,
    Act::Unmount,
    Act::UnmountLazily,
    Act::Replace,
    Act::SetCapacity,
    Act::DirectIo,
    Act::SetBlockSize,
    Act::Rescan,
    Act::Vanish,
    Act::GiveUp,
    Act::Die,
    Act::DelayEvents,
    Act::LoseEvents,
    Act::ForeignAttach,
    Act::ForeignDetach,
    Act::ForeignMount,
    Act::ForeignUnmount,
    Act::Open,
    Act::Reread,
];

impl Act {
    /// Whether a client asks for it, and gets an answer.
    pub fn is_call(self) -> bool {
        use Act::*;
        matches!(
            self,
            Attach(..)
                | Detach
                | DetachLazily
                | SetLifetime(_)
                | Mount
                | Unmount
                | UnmountLazily
                | Replace
                | SetCapacity
                | DirectIo
                | NoDirectIo
                | SetBlockSize
                | Rescan
        )
    }

    /// Whether it ends the daemon.
    pub fn ends_daemon(self) -> bool {
        matches!(self, Self::GiveUp | Self::Die)
    }
}

/// What is acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The attachment.
    pub id: DiskSequence,
    /// Its device.
    pub number: u32,
}

impl Target {
    /// This attachment.
    pub fn of(attachment: &Snapshot) -> Self {
        Self { id: attachment.id, number: attachment.device.number }
    }
}

/// What a call was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// This is attached.
    Attached(Target),
    /// It is mounted there.
    Mounted(std::path::PathBuf),
}

/// The answer of a call, or the end of what happened.
pub type Answer = Result<Reply, ErrorKind>;

fn known(engine: &Engine<Simulated>, target: Target) -> Result<Snapshot, ErrorKind> {
    engine.find(target.id).ok_or(ErrorKind::UnknownObject)
}

/// Has this happen, as the bus and `main.rs` do it.
pub async fn perform(house: Arc<House>, act: Act, client: Client, target: Target) -> Answer {
    if act.is_call() && client.is_gone() {
        return Err(ErrorKind::AccessDenied);
    }
    let answer = match act.is_call() {
        true => call(&house, act, &client, target).await,
        false => happen(&house, act, &client, target).await,
    };
    if !act.ends_daemon() {
        house.engine.told().await;
    }
    answer
}

async fn call(house: &House, act: Act, client: &Client, target: Target) -> Answer {
    let engine = &house.engine;
    let done = match act {
        Act::Attach(lifetime, overlap) => {
            let request = AttachRequest { lifetime, overlap, ..AttachRequest::default() };
            let attached = house.attach_with(client, request).await.map_err(|error| error.kind)?;
            return Ok(Reply::Attached(Target::of(&attached)));
        }
        Act::Mount => {
            let volume = whole(&known(engine, target)?);
            let mounted = engine.mount(volume, &wanted(), client).await;
            return mounted.map(Reply::Mounted).map_err(|error| error.kind);
        }
        Act::Unmount | Act::UnmountLazily => {
            let volume = whole(&known(engine, target)?);
            let own_only = engine.is_mounted_for(volume, client.uid);
            engine.unmount(volume, act == Act::UnmountLazily, client.uid, own_only).await
        }
        Act::Detach | Act::DetachLazily => {
            engine.detach(known(engine, target)?.id, act == Act::DetachLazily).await
        }
        Act::SetLifetime(lifetime) => engine.set_lifetime(known(engine, target)?.id, lifetime, client).await,
        Act::Replace => engine.replace_backing_file(known(engine, target)?.id, ANOTHER, client.uid).await,
        Act::Rescan => engine.rescan(known(engine, target)?.id).await,
        Act::SetCapacity => engine.change(known(engine, target)?.id, Change::Capacity).await,
        Act::DirectIo => engine.change(known(engine, target)?.id, Change::DirectIo(true)).await,
        Act::NoDirectIo => engine.change(known(engine, target)?.id, Change::DirectIo(false)).await,
        Act::SetBlockSize => engine.change(known(engine, target)?.id, Change::BlockSize(4096)).await,
        _ => unreachable!("{act:?} is no call"),
    };
    done.map(|()| Reply::Done).map_err(|error| error.kind)
}

async fn happen(house: &House, act: Act, client: &Client, target: Target) -> Answer {
    let (machine, number) = (&house.machine, target.number);
    match act {
        Act::Vanish => client.vanish(&house.engine),
        Act::GiveUp => {
            house.engine.give_up();
            tokio::time::sleep(UNDO).await;
            machine.die();
        }
        Act::Die => machine.die(),
        Act::DelayEvents => house.delay_events(),
        Act::LoseEvents => {
            if machine.lose_uevents() {
                house.engine.resync().await;
            }
        }
        Act::ForeignAttach => drop(machine.attach_elsewhere(1)),
        Act::ForeignDetach => machine.detach_elsewhere(number),
        Act::ForeignMount => machine.mount(number),
        Act::ForeignUnmount => machine.unmount(number),
        Act::Open => machine.open_elsewhere(number),
        Act::Close => machine.close_elsewhere(number),
        Act::Reread => machine.reread_partitions(number),
        _ => unreachable!("{act:?} is a call"),
    }
    Ok(Reply::Done)
}
