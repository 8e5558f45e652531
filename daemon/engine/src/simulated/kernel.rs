//! The kernel on a simulated machine.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use loopd_common::Lifetime;

use super::file::SimulatedFile;
use super::machine::{Bound, Claim, Claims, Happened, Hold, Simulated, nodes, partition_node};
use super::mappings::Mapped;
use crate::error::Error;
use crate::future::BoxFuture;
use crate::kernel::{
    Attached, Binding, Change, Device, Difference, DiskSequence, FileFacts, FileSystem, Kernel, Mapping,
    PartitionNode, Partitioning, ProbeResult, Replaced, ScanReason, StoredHolds, Udev, Users, node,
};
use crate::mount_table::MountTable;
use crate::request::AttachRequest;

impl Udev for Simulated {
    fn stored_mapping(&self, number: u32) -> Option<FileSystem> {
        let machine = self.lock();
        // cryptsetup waits for udev before it ends.
        let mapped = machine.mapped.get(&number).filter(|_| machine.udev_runs)?;
        Some(machine.found_on_mapping(mapped.mapping.disk_sequence))
    }

    fn udev_runs(&self) -> bool {
        self.lock().udev_runs
    }

    fn udev_is_idle(&self) -> bool {
        self.lock().are_events_told()
    }

    fn stored(&self, number: u32, partition: Option<u32>) -> Option<ProbeResult> {
        let machine = self.lock();
        let bound = machine.bound.get(&number)?;
        partition.is_none_or(|partition| partition <= bound.partitions).then(|| machine.found(bound.sequence))
    }

    fn stored_of(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>> {
        Box::pin(async move {
            // Reading the database cannot fail, but the daemon may die.
            let _interfered = self.step().await;
            let stored = |partition| Some((partition, self.stored(number, partition)?));
            partitions.into_iter().filter_map(stored).collect()
        })
    }

    fn stored_since(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
        _since: u64,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>> {
        Box::pin(async move {
            let _interfered = self.step().await;
            let is_untold = |partition: &Option<u32>| {
                let machine = self.lock();
                machine
                    .uevents
                    .untold
                    .iter()
                    .any(|happened| (happened.number, happened.partition) == (number, *partition))
            };
            let partitions = partitions.into_iter().filter(|partition| !is_untold(partition));
            let stored = |partition| Some((partition, self.stored(number, partition)?));
            partitions.filter_map(stored).collect()
        })
    }

    fn udev_answers(&self) -> bool {
        !self.lock().udev_is_gone
    }

    fn mark_untrusted(&self, sequence: DiskSequence) -> Result<(), Error> {
        self.lock().untrusted.insert(sequence);
        Ok(())
    }
}

impl StoredHolds for Simulated {
    fn has_stored_hold(&self, disk_sequence: DiskSequence) -> bool {
        let machine = self.lock();
        let mut mapped = machine.mapped.values();
        machine.bound.values().any(|bound| bound.sequence == disk_sequence && bound.stored_copies > 0)
            || mapped.any(|mapped| mapped.mapping.disk_sequence == disk_sequence && mapped.stored_copies > 0)
    }

    fn release_unadopted<'a>(&'a self, except: &'a HashSet<DiskSequence>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let _interfered = self.step().await;
            let mapped: Vec<u32> = self.lock().mapped.keys().copied().collect();
            for number in mapped {
                let is_unclaimed =
                    |mapped: &Mapped| mapped.holds == 0 && !except.contains(&mapped.mapping.disk_sequence);
                self.alter_mapping(number, is_unclaimed, |mapped| mapped.stored_copies = 0);
            }
            let numbers: Vec<u32> = self.lock().bound.keys().copied().collect();
            for number in numbers {
                let is_unclaimed = |bound: &Bound| bound.holds == 0 && !except.contains(&bound.sequence);
                self.alter(number, is_unclaimed, |bound| bound.stored_copies = 0);
            }
        })
    }
}

impl Kernel for Simulated {
    type File = SimulatedFile;
    type Hold = Hold;
    type Claim = Claim;
    type Claims = Claims;

    fn examine<'a>(&'a self, file: &'a SimulatedFile) -> BoxFuture<'a, Result<FileFacts, Error>> {
        Box::pin(async move {
            self.step().await?;
            let only_root_writes = !self.lock().users_write;
            Ok(FileFacts { only_root_writes, ..file.facts.clone() })
        })
    }

    fn attach<'a>(
        &'a self,
        file: SimulatedFile,
        request: &'a AttachRequest,
    ) -> BoxFuture<'a, Result<Attached<Self>, Error>> {
        Box::pin(async move {
            let number = {
                let mut machine = self.lock();
                let number = request.number.unwrap_or_else(|| machine.free_number());
                machine.claimed.push(number);
                number
            };
            let claim = Claim { machine: self.clone(), number };
            self.step().await?;
            let held = request.lifetime != Lifetime::Persistent;
            let file_end = file.end(request.offset, request.size_limit);
            let findings = file.findings.clone();
            let (device, sequence) = {
                self.news.notify_one();
                let mut machine = self.lock();
                if machine.bound.contains_key(&number) {
                    return Err(Error::Busy { operation: "attach".to_owned(), reason: "taken".to_owned() });
                }
                let read_only = request.read_only || !file.facts.writable;
                let sequence = machine.bind(number, file, held);
                machine.attached_here.insert(sequence);
                if request.untrusted {
                    machine.untrusted.insert(sequence);
                }
                let stores_holds = machine.stores_holds;
                if let Some(bound) = machine.bound.get_mut(&number) {
                    bound.holds = usize::from(held);
                    bound.stored_copies = usize::from(held && stores_holds);
                    bound.partition_scan = request.partition_scan;
                    bound.offset = request.offset;
                    bound.size_limit = request.size_limit;
                    bound.read_only = read_only;
                    bound.mark = request.mark;
                }
                (machine.device(number).expect("it was just attached"), sequence)
            };
            let hold = held.then(|| Hold { machine: self.clone(), number, sequence, is_of_mapping: false });
            self.answer().await;
            let missing = request.partition_scan && self.lock().partitions > 0;
            let partitioning = Partitioning { missing, findings, ..Partitioning::default() };
            Ok(Attached { device, hold, partitioning, file_end, claim, node_made: request.number.is_some() })
        })
    }

    fn release(&self, hold: Hold) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // A close cannot fail, but the daemon may die.
            let _interfered = self.step().await;
            hold.drop_copy();
            drop(hold);
            self.answer().await;
        })
    }

    fn hold(&self, number: u32, sequence: DiskSequence) -> BoxFuture<'_, Result<Option<Hold>, Error>> {
        Box::pin(async move {
            self.step().await?;
            let hold = {
                let mut machine = self.lock();
                let stores_holds = machine.stores_holds;
                let bound = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence);
                bound.map(|bound| {
                    bound.holds += 1;
                    bound.stored_copies = usize::from(stores_holds);
                    Hold { machine: self.clone(), number, sequence: bound.attach, is_of_mapping: false }
                })
            };
            self.answer().await;
            Ok(hold)
        })
    }

    fn clear(&self, number: u32, sequence: DiskSequence) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.step().await?;
            let clear = |bound: &mut Bound| (bound.autoclear, bound.stored_copies) = (true, 0);
            self.alter(number, |bound| bound.sequence == sequence, clear);
            self.answer().await;
            Ok(())
        })
    }

    fn change(
        &self,
        number: u32,
        sequence: DiskSequence,
        change: Change,
    ) -> BoxFuture<'_, Result<Option<Device>, Error>> {
        Box::pin(async move {
            self.step().await?;
            self.alter(
                number,
                |bound| bound.sequence == sequence,
                |bound| match change {
                    Change::Autoclear(autoclear) => bound.autoclear = autoclear,
                    Change::DirectIo(on) => bound.direct_io = on,
                    Change::BlockSize(bytes) => bound.block_size = bytes,
                    Change::Capacity => {}
                },
            );
            let device = self.lock().device(number).filter(|device| device.disk_sequence == sequence);
            self.answer().await;
            Ok(device)
        })
    }

    fn replace(
        &self,
        number: u32,
        sequence: DiskSequence,
        file: SimulatedFile,
        untrusted: bool,
    ) -> BoxFuture<'_, Result<Option<Replaced>, Error>> {
        Box::pin(async move {
            self.step().await?;
            self.news.notify_one();
            let file_end = |bound: &Bound| bound.file.end(bound.offset, bound.size_limit);
            let replaced = {
                let mut guard = self.lock();
                let machine = &mut *guard;
                let next = DiskSequence(machine.last_sequence + 1);
                let bound = machine.bound.get_mut(&number).filter(|bound| bound.sequence == sequence);
                bound.map(|bound| {
                    (bound.sequence, bound.file) = (next, file);
                    machine.last_sequence += 1;
                    if untrusted {
                        machine.untrusted.insert(next);
                    }
                    machine.uevents.push(Happened { number, sequence: next, ..Happened::default() });
                    (next, file_end(bound))
                })
            };
            // Other programs may see the new disk sequence before the engine does.
            self.step().await.ok();
            // The descriptor is open, so that this is the same attach.
            let device = self.lock().device(number);
            let of_now = |device: &Device| replaced.filter(|(next, _)| *next == device.disk_sequence);
            Ok(device.and_then(|device| of_now(&device).map(|(_, file_end)| Replaced { device, file_end })))
        })
    }

    fn free_number(&self) -> BoxFuture<'_, Result<u32, Error>> {
        Box::pin(async move {
            self.step().await?;
            Ok(self.lock().free_number())
        })
    }

    fn remove_device(&self, number: u32) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.step().await?;
            let mut machine = self.lock();
            if machine.bound.contains_key(&number) {
                return Err(Error::Busy { operation: "remove".to_owned(), reason: "attached".to_owned() });
            }
            machine.removed_nodes.push(number);
            Ok(())
        })
    }

    fn status(&self, number: u32) -> BoxFuture<'_, Result<Option<Device>, Error>> {
        Box::pin(async move {
            self.step().await?;
            if self.lock().hung.contains(&number) {
                std::future::pending::<()>().await;
            }
            self.lock().status_reads += 1;
            let device = self.lock().device(number);
            self.answer().await;
            Ok(device)
        })
    }

    fn partition(
        &self,
        number: u32,
        sequence: DiskSequence,
        reason: ScanReason,
    ) -> BoxFuture<'_, Result<Partitioning, Error>> {
        Box::pin(async move {
            self.step().await?;
            let seen = self.make_partitions(number, sequence, reason);
            self.answer().await;
            Ok(seen)
        })
    }

    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode> {
        let mut machine = self.lock();
        let nodes = machine.bound.get(&number).map(nodes).unwrap_or_default();
        machine.partitions_read += nodes.len();
        nodes
    }

    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode> {
        let mut machine = self.lock();
        machine.partitions_read += 1;
        let bound = machine.bound.get(&number).filter(|bound| (1..=bound.partitions).contains(&partition))?;
        Some(partition_node(bound, partition))
    }

    fn scans_itself(&self) -> bool {
        self.lock().scans_itself
    }

    fn users(&self, number: u32) -> BoxFuture<'_, Result<Users, Error>> {
        Box::pin(async move {
            self.step().await?;
            let machine = self.lock();
            let mounts = machine.bound.get(&number).map(|bound| &bound.mounts[..]).unwrap_or_default();
            let mount_points = mounts.iter().map(|(_, path)| path.clone()).collect();
            let mapped = machine.mapped.values().filter(|mapped| mapped.loop_number == number);
            let holders = mapped.map(|mapped| mapped.mapping.shown()).collect();
            Ok(Users { mount_points, holders, ..Users::default() })
        })
    }

    fn is_claimed(&self, number: u32) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            let _done = self.step().await;
            let machine = self.lock();
            machine.bound.get(&number).is_some_and(|bound| {
                bound.claimed || !bound.mounts.is_empty() || machine.is_mapped(number, None)
            })
        })
    }

    fn read(
        &self,
        _: u32,
        _: DiskSequence,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        Box::pin(async move {
            self.step().await?;
            let machine = self.lock();
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let stored = machine.contents.iter().skip(start).copied();
            Ok(stored.chain(std::iter::repeat(0)).take(length).collect())
        })
    }

    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error> {
        Ok(self.lock().set_up_for.get(&number).copied())
    }

    fn btrfs<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<crate::kernel::BtrfsDevices, Error>> {
        Box::pin(async move { Ok(crate::kernel::BtrfsDevices::default()) })
    }

    fn claim_overlapping<'a>(
        &'a self,
        device: &'a Device,
        _: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        operation: String,
    ) -> BoxFuture<'a, Result<Claims, Error>> {
        Box::pin(async move {
            self.step().await?;
            let mut machine = self.lock();
            let mut numbers = Vec::new();
            for (number, known) in others {
                let Some(bound) = machine.bound.get(&number) else { continue };
                let may_be_the_same =
                    known.is_none() || bound.file.facts.identity.inode == device.backing_inode;
                if !may_be_the_same || (device.read_only && bound.read_only) {
                    continue;
                }
                if let Some((_, path)) = bound.mounts.first() {
                    let reason = format!("/dev/loop{number} is mounted on {}", path.display());
                    return Err(match known {
                        Some(_) => Error::Busy { operation, reason },
                        None => Error::Timeout { operation, reason },
                    });
                }
                if machine.is_mapped(number, None) {
                    let reason = format!("/dev/loop{number} is held by a mapping");
                    return Err(Error::Busy { operation, reason });
                }
                numbers.push(number);
            }
            machine.exclusive.extend(&numbers);
            Ok(Claims { machine: self.clone(), numbers })
        })
    }

    fn mounts(&self) -> Option<MountTable> {
        let table = self.mount_table();
        let watcher = self.lock().table_watcher.clone();
        if let Some(watcher) = watcher {
            watcher();
        }
        Some(table)
    }

    fn await_rundown(&self, _: u32) -> BoxFuture<'_, ()> {
        Box::pin(async move {})
    }

    fn remove(&self, number: u32) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let mut machine = self.lock();
            if !machine.bound.contains_key(&number) {
                machine.removed_nodes.push(number);
            }
        })
    }

    fn bound_numbers(&self) -> Result<Vec<u32>, Error> {
        Ok(self.lock().bound.keys().copied().collect())
    }

    fn differences(&self, known: Vec<Device>) -> BoxFuture<'_, Vec<(u32, Difference)>> {
        Box::pin(async move {
            let found = {
                let mut machine = self.lock();
                machine.full_looks += 1;
                let known: BTreeMap<u32, Device> =
                    known.into_iter().map(|device| (device.number, device)).collect();
                let numbers: BTreeSet<u32> = machine.bound.keys().chain(known.keys()).copied().collect();
                let differs = |number: &u32| machine.device(*number).as_ref() != known.get(number);
                numbers.into_iter().filter(differs).map(|number| (number, Difference::Other)).collect()
            };
            self.answer().await;
            found
        })
    }

    fn mappings(&self, number: u32) -> Result<Vec<(Option<u32>, Mapping)>, Error> {
        if self.lock().is_unreadable {
            let source = std::io::Error::other("too many open files");
            return Err(Error::Io { operation: format!("read the mappings of {}", node(number)), source });
        }
        Ok(self.mappings_on(number))
    }

    fn hold_mapping<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Option<Hold>, Error>> {
        Box::pin(async move {
            self.step().await?;
            let stored_copies = usize::from(self.lock().stores_holds);
            let mut hold = None;
            self.alter_mapping(
                mapping.number,
                |mapped| mapped.mapping.is(mapping),
                |mapped| {
                    (mapped.holds, mapped.stored_copies) = (mapped.holds + 1, stored_copies);
                    hold = Some(Hold {
                        machine: self.clone(),
                        number: mapping.number,
                        sequence: mapping.disk_sequence,
                        is_of_mapping: true,
                    });
                },
            );
            self.answer().await;
            Ok(hold)
        })
    }

    fn mapping_users<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Users, Error>> {
        Box::pin(async move {
            self.step().await?;
            Ok(self.users_of_mapping(mapping))
        })
    }

    fn read_mapping<'a>(
        &'a self,
        _: &'a Mapping,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'a, Result<Vec<u8>, Error>> {
        Box::pin(async move {
            self.step().await?;
            let machine = self.lock();
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let stored = machine.cleartext_contents.iter().skip(start).copied();
            Ok(stored.chain(std::iter::repeat(0)).take(length).collect())
        })
    }

    fn peek(&self, number: u32) -> Result<Binding, Error> {
        let mut machine = self.lock();
        machine.looks += 1;
        if machine.is_unreadable {
            let source = std::io::Error::other("too many open files");
            return Err(Error::Io { operation: format!("read the state of {}", node(number)), source });
        }
        let bound = machine.bound.get(&number).map(|bound| bound.sequence);
        Ok(Binding { bound, claimed: machine.claimed.contains(&number) })
    }
}
