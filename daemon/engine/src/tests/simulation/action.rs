//! What may happen on a simulated machine: calls of clients, and what the rest of the machine does.

use std::sync::Arc;
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, Overlap};

use crate::kernel::{Change, DiskSequence};
use crate::simulated::Simulated;
use crate::tests::harness::{Client, Harness};
use crate::tests::mount::{wanted, whole};
use crate::tests::unlock::secret;
use crate::{AttachRequest, Engine, Snapshot, VolumeId};

/// A file that is shown in the place of another.
pub const ANOTHER: u64 = 2;
/// How long calls that were given up have to undo what they did, as `shutdown.rs` of the daemon has it.
const UNDO: Duration = Duration::from_millis(500);

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// `SetupLoop` with the file that the target has.
    Attach(Lifetime, Overlap),
    /// The same without waiting for udev.
    AttachAtOnce(Lifetime),
    /// The same with one of three parts of the file.
    AttachPart(Overlap),
    /// `Detach`.
    Detach,
    /// `Detach` with `lazy`.
    DetachLazily,
    /// `SetLifetime`.
    SetLifetime(Lifetime),
    /// `Mount`.
    Mount,
    /// `Mount` of the first partition.
    MountPartition,
    /// `Unmount`.
    Unmount,
    /// `Unmount` with `lazy`.
    UnmountLazily,
    /// `Unlock`.
    Unlock,
    /// `Unlock` of the first partition.
    UnlockPartition,
    /// `Lock`.
    Lock,
    /// `Lock` with `lazy`.
    LockLazily,
    /// `Mount` of the cleartext.
    MountCleartext,
    /// `Unmount` of the cleartext.
    UnmountCleartext,
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
    /// `List` of all devices.
    ListAll,
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
    /// Another program makes a mapping on it.
    ForeignMap,
    /// Another program removes the mappings on it that are not in use.
    ForeignUnmap,
    /// Another program opens its mappings.
    OpenCleartext,
    /// Another program closes its mappings.
    CloseCleartext,
    /// Another program opens it.
    Open,
    /// Another program closes it.
    Close,
    /// Another program has the partition table read again.
    Reread,
    /// Another program removes the partitions.
    DropPartitions,
    /// Files that are attached from now on have so many partitions.
    Partition(u32),
}

/// What every pair is made of.
pub const ALL: [Action; 36] = [
    Action::Attach(Lifetime::Client, Overlap::Allow),
    Action::Attach(Lifetime::Mount, Overlap::Reuse),
    Action::Attach(Lifetime::Persistent, Overlap::Allow),
    Action::Attach(Lifetime::Persistent, Overlap::Reuse),
    Action::Attach(Lifetime::Client, Overlap::Refuse),
    Action::Detach,
    Action::DetachLazily,
    Action::SetLifetime(Lifetime::Client),
    Action::SetLifetime(Lifetime::Mount),
    Action::SetLifetime(Lifetime::Persistent),
    Action::Mount,
    Action::Unmount,
    Action::UnmountLazily,
    Action::Unlock,
    Action::Lock,
    Action::LockLazily,
    Action::MountCleartext,
    Action::UnmountCleartext,
    Action::Replace,
    Action::SetCapacity,
    Action::DirectIo,
    Action::SetBlockSize,
    Action::Rescan,
    Action::ListAll,
    Action::Vanish,
    Action::GiveUp,
    Action::Die,
    Action::DelayEvents,
    Action::LoseEvents,
    Action::ForeignAttach,
    Action::ForeignDetach,
    Action::ForeignMount,
    Action::ForeignUnmount,
    Action::ForeignUnmap,
    Action::Open,
    Action::Reread,
];

impl Action {
    /// Whether a client asks for it, and gets an answer.
    pub fn is_call(self) -> bool {
        use Action::*;
        matches!(
            self,
            Attach(..)
                | AttachAtOnce(_)
                | AttachPart(_)
                | Detach
                | DetachLazily
                | SetLifetime(_)
                | Mount
                | MountPartition
                | Unmount
                | UnmountLazily
                | Unlock
                | UnlockPartition
                | Lock
                | LockLazily
                | MountCleartext
                | UnmountCleartext
                | Replace
                | SetCapacity
                | DirectIo
                | NoDirectIo
                | SetBlockSize
                | Rescan
                | ListAll
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
pub async fn perform(harness: Arc<Harness>, action: Action, client: Client, target: Target) -> Answer {
    if action.is_call() && client.is_gone() {
        return Err(ErrorKind::AccessDenied);
    }
    let answer = match action.is_call() {
        true => call(&harness, action, &client, target).await,
        false => happen(&harness, action, &client, target).await,
    };
    if !action.ends_daemon() {
        harness.engine.flush_events().await;
    }
    answer
}

async fn call(harness: &Harness, action: Action, client: &Client, target: Target) -> Answer {
    let engine = &harness.engine;
    let done = match action {
        Action::Attach(..) | Action::AttachAtOnce(_) | Action::AttachPart(_) => {
            let attached = harness.attach_with(client, request(action, target)).await;
            return attached
                .map(|attached| Reply::Attached(Target::of(&attached)))
                .map_err(|error| error.kind());
        }
        Action::Mount | Action::MountPartition | Action::MountCleartext => {
            let attachment = known(engine, target)?;
            let volume = match action {
                Action::MountPartition => VolumeId { partition: Some(1), ..whole(&attachment) },
                Action::MountCleartext => VolumeId { is_cleartext: true, ..unlocked(&attachment) },
                _ => whole(&attachment),
            };
            let mounted = engine.mount(volume, &wanted(), client).await;
            return mounted.map(Reply::Mounted).map_err(|error| error.kind());
        }
        Action::Unlock | Action::UnlockPartition => {
            let partition = (action == Action::UnlockPartition).then_some(1);
            let volume = VolumeId { partition, ..whole(&known(engine, target)?) };
            engine.unlock(volume, secret(), client).await.map(drop)
        }
        Action::Lock | Action::LockLazily => {
            let volume = unlocked(&known(engine, target)?);
            engine.lock(volume, action == Action::LockLazily).await
        }
        Action::Unmount | Action::UnmountLazily | Action::UnmountCleartext => {
            let attachment = known(engine, target)?;
            let volume = match action {
                Action::UnmountCleartext => VolumeId { is_cleartext: true, ..unlocked(&attachment) },
                _ => whole(&attachment),
            };
            let own_only = engine.is_mounted_for(volume, client.uid);
            engine.unmount(volume, action == Action::UnmountLazily, client.uid, own_only).await
        }
        Action::Detach | Action::DetachLazily => {
            engine.detach(known(engine, target)?.id, action == Action::DetachLazily).await
        }
        Action::SetLifetime(lifetime) => {
            engine.set_lifetime(known(engine, target)?.id, lifetime, client).await
        }
        Action::Replace => {
            engine.replace_backing_file(known(engine, target)?.id, ANOTHER.into(), client.uid).await
        }
        Action::ListAll => {
            engine.catch_up().await;
            Ok(())
        }
        Action::Rescan => engine.rescan(known(engine, target)?.id).await,
        Action::SetCapacity => engine.change(known(engine, target)?.id, Change::Capacity).await,
        Action::DirectIo => engine.change(known(engine, target)?.id, Change::DirectIo(true)).await,
        Action::NoDirectIo => engine.change(known(engine, target)?.id, Change::DirectIo(false)).await,
        Action::SetBlockSize => engine.change(known(engine, target)?.id, Change::BlockSize(4096)).await,
        _ => unreachable!("{action:?} is no call"),
    };
    done.map(|()| Reply::Done).map_err(|error| error.kind())
}

/// The first volume that is unlocked, or the whole device.
fn unlocked(attachment: &Snapshot) -> VolumeId {
    let partition = attachment.saved_cleartexts.first().and_then(|cleartext| cleartext.partition);
    VolumeId { partition, ..whole(attachment) }
}

fn request(action: Action, target: Target) -> AttachRequest {
    let default = AttachRequest::default();
    match action {
        Action::Attach(lifetime, overlap) => AttachRequest { lifetime, overlap, ..default },
        Action::AttachAtOnce(lifetime) => AttachRequest { lifetime, wait: false, ..default },
        Action::AttachPart(overlap) => {
            let offset = u64::from(target.number % 3) * 512;
            AttachRequest { overlap, offset, size_limit: 512, ..default }
        }
        _ => unreachable!("{action:?} is no attach"),
    }
}

async fn happen(harness: &Harness, action: Action, client: &Client, target: Target) -> Answer {
    let (machine, number) = (&harness.machine, target.number);
    match action {
        Action::Vanish => client.vanish(&harness.engine),
        Action::GiveUp => {
            harness.engine.abort_calls();
            tokio::time::sleep(UNDO).await;
            machine.die();
        }
        Action::Die => machine.die(),
        Action::DelayEvents => harness.delay_events(),
        Action::LoseEvents => {
            if machine.lose_uevents() {
                harness.engine.resync().await;
            }
        }
        Action::ForeignAttach => drop(machine.attach_elsewhere(1)),
        Action::ForeignDetach => machine.detach_elsewhere(number),
        Action::ForeignMount => machine.mount(number),
        Action::ForeignUnmount => machine.unmount(number),
        Action::ForeignMap => drop(machine.map_elsewhere(number, None, &format!("other{number}"))),
        Action::ForeignUnmap => {
            for (_, mapping) in machine.mappings_on(number) {
                machine.unmap_elsewhere(mapping.number);
            }
        }
        Action::OpenCleartext => {
            machine.mappings_on(number).iter().for_each(|(_, mapping)| {
                machine.open_mapping_elsewhere(mapping.number);
            });
        }
        Action::CloseCleartext => {
            machine.mappings_on(number).iter().for_each(|(_, mapping)| {
                machine.close_mapping_elsewhere(mapping.number);
            });
        }
        Action::Open => machine.open_elsewhere(number),
        Action::Close => machine.close_elsewhere(number),
        Action::Reread => machine.reread_partitions(number),
        Action::DropPartitions => machine.drop_partitions(number),
        Action::Partition(count) => machine.set_partitions(count),
        _ => unreachable!("{action:?} is a call"),
    }
    Ok(Reply::Done)
}
