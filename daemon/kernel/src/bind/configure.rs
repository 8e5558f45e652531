//! `LOOP_CONFIGURE`.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use linux_raw_sys::loop_device::_bindgen_ty_1 as LoFlags;
use linux_raw_sys::loop_device::loop_info64;
use loopd_common::Lifetime;
use loopd_engine::AttachRequest;
use loopd_engine::kernel::{Device, node};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::wanted::Wanted;
use crate::hold::Hold;
use crate::node_watch::NodeWatch;
use crate::shared::Shared;
use crate::sysfs::loop_device;
use crate::{device, ioctl, udev, wait};

/// A device that was configured.
pub struct Configured<'a> {
    pub device: Device,
    pub hold: Option<Hold>,
    pub writer: Option<Writer<'a>>,
}

/// A writable descriptor of the disk, which `LOOP_CONFIGURE` needs for a writable device. It has to be closed
/// before the reply: it would block mount(2) on kernels without `CONFIG_BLK_DEV_WRITE_MOUNTED`.
pub struct Writer<'a> {
    descriptor: OwnedFd,
    watch: NodeWatch<'a>,
}

impl Writer<'_> {
    /// Closes the descriptor when udev does not watch the node.
    pub fn close(self) {
        self.watch.close_unnoticed(self.descriptor);
    }
}

/// Attaches the file, and holds the device unless it is persistent. After an error nothing is attached. The
/// writer is kept only if the request waits for udev.
pub fn configure<'a>(shared: &'a Shared, number: u32, wanted: Wanted<'_>) -> nix::Result<Configured<'a>> {
    let Wanted { file, examined, request, direct_io } = wanted;
    let is_writable = examined.facts.writable && !request.read_only;
    let device = device::open(number, OFlag::O_RDONLY)?;
    let writer = if is_writable { Some(device::open(number, OFlag::O_RDWR)?) } else { None };
    let is_watched = is_writable && request.wait && udev::runs();
    let watch = if is_watched { shared.node_watches.of(&device) } else { None };
    let configured = writer.as_ref().unwrap_or(&device);
    ioctl::configure(configured, file.as_fd(), request.block_size, info(request, direct_io))?;
    let writer = writer.zip(watch).map(|(descriptor, watch)| Writer { descriptor, watch });
    match finish(number, &device, request, is_writable) {
        Ok((state, hold)) => Ok(Configured { device: state, hold, writer }),
        Err(errno) => {
            undo(number, device, writer);
            Err(errno)
        }
    }
}

/// Detaches a device that cannot be used. Waits until its number is free: udev may have it open for a moment.
fn undo(number: u32, device: OwnedFd, writer: Option<Writer<'_>>) {
    let _ends_at_close = ioctl::clear(&device);
    drop((device, writer));
    let is_free = || if loop_device::is_bound(number) { Err(Errno::EBUSY) } else { Ok(()) };
    let _stays_until_closed = wait::while_busy(Path::new(&node(number)), is_free, || true);
}

/// Checks and holds a device that was configured. `EOPNOTSUPP` if the request needs direct I/O and the
/// device has none, `EROFS` if it cannot be written to and has to be.
fn finish(
    number: u32,
    device: &OwnedFd,
    request: &AttachRequest,
    is_writable: bool,
) -> nix::Result<(Device, Option<Hold>)> {
    if is_writable && ioctl::read_only(device)? {
        return Err(Errno::EROFS);
    }
    let state = device::read_state(number, device)?;
    if request.direct_io == Some(true) && !state.direct_io {
        return Err(Errno::EOPNOTSUPP);
    }
    let hold = match request.lifetime {
        Lifetime::Persistent => None,
        _ => Some(device.try_clone().map_err(|_| Errno::EMFILE)?),
    };
    let hold = hold.map(|descriptor| Hold::new(descriptor, state.disk_sequence));
    Ok((state, hold))
}

fn info(request: &AttachRequest, direct_io: bool) -> loop_info64 {
    let mut info = ioctl::empty_info();
    info.lo_offset = request.offset;
    info.lo_sizelimit = request.size_limit;
    info.lo_file_name = device::encode_file_name(&request.reference, request.mark);
    let mut set = |wanted: bool, flag: LoFlags| {
        if wanted {
            info.lo_flags |= flag as u32;
        }
    };
    set(request.read_only, LoFlags::LO_FLAGS_READ_ONLY);
    set(request.partition_scan, LoFlags::LO_FLAGS_PARTSCAN);
    set(direct_io, LoFlags::LO_FLAGS_DIRECT_IO);
    set(request.lifetime != Lifetime::Persistent, LoFlags::LO_FLAGS_AUTOCLEAR);
    info
}
