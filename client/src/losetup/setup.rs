//! Attaches files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use loopd_dbus::{AttachOptions, Error, ErrorKind, Lifetime, ListOptions, Overlap};
use nix::errno::Errno;

use super::device::{Device, Node};
use super::failure::{Failure, Reason};
use super::order::Attach;
use super::{listing, say};
use crate::command::attach::{is_write_protected, open, setup};
use crate::connection::Bus;
use crate::output;

const FAILED: &str = "failed to set up loop device";
const SECTOR: u64 = 512;
/// What the kernel keeps of a reference, in bytes.
const LONGEST_REFERENCE: usize = 63;

/// Attaches the file.
///
/// # Errors
/// What losetup would say.
pub async fn attach(bus: &Bus, order: &Attach) -> anyhow::Result<()> {
    let file = open_file(order)?;
    let number = order.device.as_ref().map(|device| device_for(device, &order.file)).transpose()?;
    let options = options(order, &file, number)?;
    let device = match setup(&bus.manager, &file, &options).await {
        Ok((_, device)) => device,
        Err(error) => return Err(refusal(bus, order, file, &error).await?.into()),
    };
    if order.show {
        let name = order.device.as_ref().map_or(device.as_bytes(), |device| device.path.as_bytes());
        output::print_bytes(&[name, b"\n"].concat())?;
    }
    if let Some(warning) = warning(order) {
        say(&Failure::new([order.file.as_bytes(), b": Warning: ", warning.as_bytes()].concat()));
    }
    Ok(())
}

/// Opens the file with the user's rights; without the right to write, for reading.
fn open_file(order: &Attach) -> Result<File, Failure> {
    if order.file.is_empty() {
        let reason = Reason::from(Errno::EINVAL);
        return Err(Failure::of(&order.file, "failed to use backing file", &reason));
    }
    let path = Path::new(&order.file);
    let opened = match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(io::Error::from(Errno::EISDIR)),
        _ => match open(path, !order.read_only) {
            Err(error) if is_write_protected(&error) => open(path, false),
            result => result,
        },
    };
    let name = order.device.as_ref().map_or(&order.file, |device| &device.path);
    opened.map_err(|error| Failure::of(name, FAILED, &Reason::from(&error)))
}

/// The number to ask for. A device that is not there yet is made.
fn device_for(device: &Device, file: &OsStr) -> Result<u32, Failure> {
    if device.is_folder() {
        return Err(Failure::of(&device.path, FAILED, &Errno::EISDIR.into()));
    }
    match (device.node(), device.wanted()) {
        (Node::Loop(number), _) | (Node::Closed(Errno::ENOENT), Some(number)) => Ok(number),
        (Node::Closed(errno), _) => Err(Failure::of(&device.path, FAILED, &errno.into())),
        (Node::Other(errno), _) => Err(Failure::of(file, FAILED, &errno.into())),
    }
}

/// What is sent to loopd; what the kernel would refuse is refused here in its words.
fn options(order: &Attach, file: &File, number: Option<u32>) -> Result<AttachOptions, Failure> {
    let failed = |errno: Errno| Failure::of(&order.file, FAILED, &errno.into());
    let kind = file.metadata().map_err(|error| Failure::of(&order.file, FAILED, &Reason::from(&error)))?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        return Err(failed(Errno::EINVAL));
    }
    if [order.offset, order.size_limit].iter().any(|bytes| i64::try_from(*bytes).is_err()) {
        return Err(failed(Errno::EOVERFLOW));
    }
    Ok(AttachOptions {
        offset: order.offset,
        size_limit: order.size_limit,
        read_only: order.read_only,
        partition_scan: order.partition_scan,
        direct_io: order.direct_io,
        block_size: block_size(order.block_size).map_err(failed)?,
        lifetime: Lifetime::Persistent,
        reference: reference(order),
        number,
        overlap: match (order.no_overlap, number) {
            (false, _) => Overlap::Allow,
            (true, Some(_)) => Overlap::Refuse,
            (true, None) => Overlap::Reuse,
        },
        wait: true,
    })
}

/// The block size to ask for: 0 is 512 for losetup.
///
/// # Errors
/// No device has such blocks.
pub fn block_size(bytes: u64) -> Result<u32, Errno> {
    match u32::try_from(bytes) {
        Ok(0) => Ok(512),
        Ok(size) if size.is_power_of_two() && (512..=65536).contains(&size) => Ok(size),
        _ => Err(Errno::EINVAL),
    }
}

/// The reference, or the file's path: as much of it as the kernel keeps and the bus can carry.
fn reference(order: &Attach) -> String {
    let path = fs::canonicalize(&order.file).unwrap_or_default();
    let bytes = match order.reference.as_bytes() {
        [] => path.as_os_str().as_bytes(),
        given => given,
    };
    let kept = &bytes[..bytes.len().min(LONGEST_REFERENCE)];
    kept.utf8_chunks().next().map(|chunk| chunk.valid().to_owned()).unwrap_or_default()
}

/// losetup's words for why loopd did not attach it.
async fn refusal(bus: &Bus, order: &Attach, file: File, error: &anyhow::Error) -> anyhow::Result<Failure> {
    let reason = Reason::of(error);
    let kind = error.downcast_ref::<Error>().map(|error| error.kind);
    Ok(match (kind, &order.device) {
        (Some(ErrorKind::Overlap), device) => {
            let read_only = device.is_none() && is_attached_read_only(bus, order, file).await?;
            let what = if read_only { "overlapping read-only" } else { "overlapping" };
            Failure::new([order.file.as_bytes(), format!(": {what} loop device exists").as_bytes()].concat())
        }
        (Some(ErrorKind::NoFreeDevice), None) => no_free_device(&reason),
        // losetup would have failed to open the device.
        (_, None) if reason == Reason::Errno(Errno::EACCES) => no_free_device(&reason),
        (_, Some(device)) if reason == Reason::Errno(Errno::EACCES) => {
            Failure::of(&device.path, FAILED, &reason)
        }
        _ => Failure::of(&order.file, FAILED, &reason),
    })
}

/// Whether the same part of the file is attached, and only for reading.
async fn is_attached_read_only(bus: &Bus, order: &Attach, file: File) -> anyhow::Result<bool> {
    let same_file = ListOptions { file: Some(file.into()), ..ListOptions::default() };
    let found = listing::all(bus, same_file).await?;
    Ok(found.iter().map(|one| &one.attachment).any(|attachment| {
        attachment.read_only
            && !order.read_only
            && (attachment.offset, attachment.size_limit) == (order.offset, order.size_limit)
    }))
}

/// That no free device can be had.
pub fn no_free_device(reason: &Reason) -> Failure {
    Failure::new(format!("cannot find an unused loop device: {}", reason.text()))
}

/// What of the file the device does not show.
fn warning(order: &Attach) -> Option<String> {
    let metadata = fs::metadata(&order.file).ok().filter(|metadata| !metadata.file_type().is_block_device());
    let rest = metadata.map(|metadata| metadata.size().checked_sub(order.offset));
    match (order.size_limit, rest) {
        (0, None) => None,
        (0, Some(None)) => Some(format!(
            "the offset {} is past the end of the file; nothing of the file is on the device, whose size is 0.",
            order.offset
        )),
        (0, Some(Some(size))) => lost("file", size),
        (limit, _) => lost("size limit", limit),
    }
}

/// What sectors of 512 bytes cut off.
fn lost(what: &str, size: u64) -> Option<String> {
    let bytes = |count: u64| if count == 1 { "1 byte".to_owned() } else { format!("{count} bytes") };
    let rest = size % SECTOR;
    if size < SECTOR {
        return Some(format!(
            "{what} is smaller than 512 bytes; the loop device may be useless or invisible for system tools: \
             its size is 0, and {} cannot be reached.",
            bytes(size)
        ));
    }
    (rest > 0).then(|| {
        format!(
            "{what} does not end on a 512-byte sector boundary; the remaining end of the file will be \
             ignored: the last {} cannot be reached.",
            bytes(rest)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_say_what_is_lost() {
        assert_eq!(lost("file", 1024), None);
        let odd = lost("file", 1000).unwrap();
        assert!(odd.starts_with("file does not end on a 512-byte sector boundary;"), "{odd}");
        assert!(odd.ends_with(": the last 488 bytes cannot be reached."), "{odd}");
        assert!(lost("file", 513).unwrap().ends_with("the last 1 byte cannot be reached."));
        let tiny = lost("size limit", 100).unwrap();
        assert!(tiny.starts_with("size limit is smaller than 512 bytes;") && tiny.contains("100 bytes"));
    }

    #[test]
    fn offsets_past_the_end_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1024).unwrap();
        let order = |offset| Attach { file: file.path().into(), offset, ..Attach::default() };
        assert_eq!(warning(&order(512)), None);
        assert!(warning(&order(1024)).unwrap().contains("0 bytes cannot"));
        assert!(warning(&order(2048)).unwrap().contains("2048 is past the end"));
    }

    #[test]
    fn references_are_cut_to_what_the_kernel_keeps() {
        let given = |text: &str| Attach { reference: text.into(), ..Attach::default() };
        assert_eq!(reference(&given("mine")), "mine");
        assert_eq!(reference(&given(&"ü".repeat(40))), "ü".repeat(31));
        let file = Attach { file: "/dev/../dev/null".into(), ..Attach::default() };
        assert_eq!(reference(&file), "/dev/null");
    }

    #[test]
    fn block_sizes_are_the_kernels() {
        assert_eq!((block_size(0), block_size(65536)), (Ok(512), Ok(65536)));
        for bytes in [256, 1000, 131_072, 1 << 32] {
            assert_eq!(block_size(bytes), Err(Errno::EINVAL));
        }
    }
}
