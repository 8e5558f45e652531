//! The kernel interface of the engine on Linux. Every call that may access a backing file, or wait for a lock
//! of the loop driver, runs on a thread of the blocking pool.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use loopd_common::CallerFile;
use loopd_engine::kernel::{
    Attached, Binding, BtrfsDevices, Change, Device, Difference, DiskSequence, FileFacts, FileSystem, Kernel,
    Mapping, PartitionNode, Partitioning, ProbeResult, Replaced, ScanReason, StoredHolds, Udev, Users, node,
};
use loopd_engine::mount_table::MountTable;
use loopd_engine::{AttachRequest, BoxFuture, Error};
use nix::fcntl::OFlag;

use crate::descriptor_store::DescriptorStore;
use crate::hold::Hold;
use crate::numbers::{Claim, Control, Numbers};
use crate::shared::Shared;
use crate::sysfs::{self, Block, loop_device};
use crate::untrusted::{Untrusted, unmarked};
use crate::{
    attach, backing_file, change, detach, device, difference, mounts, overlapping, partitions, release,
    replace, udev, udisks, users,
};

/// The loop driver.
pub struct Linux {
    shared: Arc<Shared>,
}

impl Linux {
    /// Opens `/dev/loop-control`.
    ///
    /// # Errors
    /// `NotSupported` if the kernel has no loop driver, or is older than 5.15.
    pub fn open(fd_store: Box<dyn DescriptorStore>, untrusted: Untrusted) -> Result<Self, Error> {
        release::check()?;
        let numbers = Numbers::new(Control::open()?);
        Ok(Self { shared: Arc::new(Shared::new(numbers, fd_store, untrusted)) })
    }

    /// Runs work on a thread of the blocking pool.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, Error>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            tokio::task::spawn_blocking(move || work(&shared)).await.unwrap_or(Err(Error::Panicked))
        })
    }

    /// The same for work that cannot fail.
    fn blocking_always(&self, work: impl FnOnce(&Shared) + Send + 'static) -> BoxFuture<'_, ()> {
        let done = self.blocking(move |shared| {
            work(shared);
            Ok(())
        });
        Box::pin(async move {
            let _panicked = done.await;
        })
    }
}

impl Udev for Linux {
    fn stored_mapping(&self, number: u32) -> Option<FileSystem> {
        udev::stored_mapping(number)
    }

    fn udev_runs(&self) -> bool {
        udev::runs()
    }

    fn udev_is_idle(&self) -> bool {
        udev::is_idle()
    }

    fn stored(&self, number: u32, partition: Option<u32>) -> Option<ProbeResult> {
        udev::stored(number, partition)
    }

    fn stored_of(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>> {
        let stored = move |partition| Some((partition, udev::stored(number, partition)?));
        let all = self.blocking(move |_| Ok(partitions.into_iter().filter_map(stored).collect()));
        Box::pin(async move { all.await.unwrap_or_default() })
    }

    fn stored_since(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
        since: u64,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>> {
        let stored = move |partition| Some((partition, udev::stored_since(number, partition, since)?));
        let all = self.blocking(move |_| Ok(partitions.into_iter().filter_map(stored).collect()));
        Box::pin(async move { all.await.unwrap_or_default() })
    }

    fn udev_answers(&self) -> bool {
        udev::answers()
    }

    fn mark_untrusted(&self, disk_sequence: DiskSequence) -> Result<(), Error> {
        self.shared.untrusted.mark(disk_sequence).map_err(unmarked)
    }
}

impl StoredHolds for Linux {
    fn has_stored_hold(&self, disk_sequence: DiskSequence) -> bool {
        self.shared.fd_store.has_stored_hold(disk_sequence)
    }

    fn release_unadopted<'a>(&'a self, except: &'a HashSet<DiskSequence>) -> BoxFuture<'a, ()> {
        let except = except.clone();
        self.blocking_always(move |shared| shared.fd_store.clear_out(&except))
    }
}

impl Kernel for Linux {
    type File = CallerFile;
    type Hold = Hold;
    type Claim = Claim;
    type Claims = overlapping::Claims;

    fn examine<'a>(&'a self, file: &'a CallerFile) -> BoxFuture<'a, Result<FileFacts, Error>> {
        let file = file.clone();
        self.blocking(move |_| Ok(backing_file::examine(file)?.facts))
    }

    fn attach<'a>(
        &'a self,
        file: CallerFile,
        request: &'a AttachRequest,
    ) -> BoxFuture<'a, Result<Attached<Self>, Error>> {
        let request = request.clone();
        self.blocking(move |shared| attach::attach(shared, &file, &request))
    }

    fn release(&self, hold: Hold) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // First, so that the service manager does not make the last close.
            self.shared.fd_store.withdraw(hold.disk_sequence()).await;
            // The last close detaches the device, which writes to the backing file.
            self.blocking_always(move |_| drop(hold)).await;
        })
    }

    fn hold(&self, number: u32, disk_sequence: DiskSequence) -> BoxFuture<'_, Result<Option<Hold>, Error>> {
        self.blocking(move |shared| {
            let hold = Hold::open(number, disk_sequence)?;
            hold.iter().for_each(|hold| hold.store(&*shared.fd_store));
            Ok(hold)
        })
    }

    fn clear(&self, number: u32, disk_sequence: DiskSequence) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            // A copy that an earlier daemon has left would keep the device attached.
            self.shared.fd_store.withdraw(disk_sequence).await;
            self.blocking(move |_| detach::clear(number, disk_sequence)).await
        })
    }

    fn await_rundown(&self, number: u32) -> BoxFuture<'_, ()> {
        self.blocking_always(move |_| drop(device::open(number, OFlag::O_RDONLY)))
    }

    fn change(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        wanted: Change,
    ) -> BoxFuture<'_, Result<Option<Device>, Error>> {
        self.blocking(move |_| change::apply(number, disk_sequence, wanted))
    }

    fn replace(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        file: CallerFile,
        untrusted: bool,
    ) -> BoxFuture<'_, Result<Option<Replaced>, Error>> {
        self.blocking(move |shared| replace::replace(shared, number, disk_sequence, &file, untrusted))
    }

    fn free_number(&self) -> BoxFuture<'_, Result<u32, Error>> {
        self.blocking(|shared| shared.numbers.free_number())
    }

    fn remove_device(&self, number: u32) -> BoxFuture<'_, Result<(), Error>> {
        self.blocking(move |shared| shared.numbers.remove(number))
    }

    fn status(&self, number: u32) -> BoxFuture<'_, Result<Option<Device>, Error>> {
        self.blocking(move |_| device::status(number))
    }

    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error> {
        udisks::set_up_for(number)
    }

    fn users(&self, number: u32) -> BoxFuture<'_, Result<Users, Error>> {
        self.blocking(move |_| users::of_loop(number))
    }

    fn is_claimed(&self, number: u32) -> BoxFuture<'_, bool> {
        let claimed = self.blocking(move |_| Ok(users::is_claimed(number)));
        Box::pin(async move { claimed.await.unwrap_or(false) })
    }

    fn read(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        self.blocking(move |_| device::read_bytes(number, disk_sequence, offset, length))
    }

    fn btrfs<'a>(&'a self, uuid: &'a str) -> BoxFuture<'a, Result<BtrfsDevices, Error>> {
        let uuid = uuid.to_owned();
        self.blocking(move |_| {
            Ok(BtrfsDevices { mounted: sysfs::mounted_btrfs(&uuid), present: udev::with_uuid(&uuid)? })
        })
    }

    fn claim_overlapping<'a>(
        &'a self,
        device: &'a Device,
        bytes: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        operation: String,
    ) -> BoxFuture<'a, Result<overlapping::Claims, Error>> {
        let device = device.clone();
        self.blocking(move |_| overlapping::claim(&device, &bytes, &others, &operation))
    }

    fn mounts(&self) -> Option<MountTable> {
        mounts::read().ok()
    }

    fn remove(&self, number: u32) -> BoxFuture<'_, ()> {
        self.blocking_always(move |shared| shared.numbers.remove_if_unused(number))
    }

    fn partition(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        reason: ScanReason,
    ) -> BoxFuture<'_, Result<Partitioning, Error>> {
        self.blocking(move |shared| partitions::settle(shared, number, disk_sequence, reason))
    }

    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode> {
        loop_device::partitions(number)
    }

    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode> {
        loop_device::partition(number, partition)
    }

    fn scans_itself(&self) -> bool {
        partitions::kernel_is_known_to_scan(&self.shared)
    }

    fn bound_numbers(&self) -> Result<Vec<u32>, Error> {
        loop_device::bound_numbers()
            .map_err(|source| Error::Io { operation: "list the loop devices".to_owned(), source })
    }

    fn differences(&self, known: Vec<Device>) -> BoxFuture<'_, Vec<(u32, Difference)>> {
        let found = self.blocking(move |_| Ok(difference::differences(&known)));
        Box::pin(async move { found.await.unwrap_or_default() })
    }

    fn mappings(&self, number: u32) -> Result<Vec<(Option<u32>, Mapping)>, Error> {
        let found = sysfs::cleartexts(&Block::of_loop(number));
        found.map_err(|source| Error::Io {
            operation: format!("determine the cleartexts of {}", node(number)),
            source,
        })
    }

    fn hold_mapping<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Option<Hold>, Error>> {
        let mapping = mapping.clone();
        self.blocking(move |shared| {
            let hold = Hold::open_mapping(&mapping)?;
            hold.iter().for_each(|hold| hold.store(&*shared.fd_store));
            Ok(hold)
        })
    }

    fn mapping_users<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Users, Error>> {
        let mapping = mapping.clone();
        self.blocking(move |_| users::of_mapping(&mapping))
    }

    fn read_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'a, Result<Vec<u8>, Error>> {
        let mapping = mapping.clone();
        self.blocking(move |_| device::read_mapping(&mapping, offset, length))
    }

    fn peek(&self, number: u32) -> Result<Binding, Error> {
        let claimed = self.shared.numbers.is_claimed(number);
        let bound = loop_device::bound(number).map_err(|source| Error::Io {
            operation: format!("read the state of {}", node(number)),
            source,
        })?;
        Ok(Binding { bound, claimed })
    }
}
