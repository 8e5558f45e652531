//! Attaches files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use loopd_common::limits::{REFERENCE_LENGTH, is_block_size};
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime, ListOptions, Overlap};
use nix::errno::Errno;
use zbus::wire::OwnedObjectPath;

use super::device::{Device, Node};
use super::failure::{Failure, Reason};
use super::listing;
use super::request::AttachRequest;
use crate::bus::connection::Bus;
use crate::bus::error;
use crate::image::backing_file::{is_write_protected, open};
use crate::message::{escaped, shown};
use crate::show::stdout::print_bytes;

const FAILED: &str = "failed to set up loop device";
/// The unit of the size of a loop device, in bytes.
const SECTOR: u64 = 512;
/// loopd's code for the end of the file.
const UNREACHABLE_TAIL: &str = "unreachable-tail";

/// Attaches the file.
///
/// # Errors
/// The error of losetup.
pub async fn attach(bus: &Bus, request: &AttachRequest) -> anyhow::Result<()> {
    let file = open_file(request)?;
    let number = request.device.as_ref().map(|device| device_for(device, &request.file)).transpose()?;
    let options = options(request, &file, number)?;
    let (path, device) = match bus.attach(&file, &options).await {
        Ok(attached) => attached,
        Err(error) => return Err(failure(bus, request, file, &error).await?.into()),
    };
    if request.show {
        let name = request.device.as_ref().map_or(device.as_bytes(), |device| device.path.as_bytes());
        print_bytes(&[name, b"\n"].concat())?;
    }
    for warning in warning(request).into_iter().chain(warnings_of_loopd(bus, &path).await) {
        Failure::new([request.file.as_bytes(), b": Warning: ", warning.as_bytes()].concat()).print();
    }
    Ok(())
}

/// The warnings of loopd, without the one about the end of the file, for which losetup has its own text. A failed call
/// does not fail the attach.
async fn warnings_of_loopd(bus: &Bus, path: &OwnedObjectPath) -> Vec<String> {
    let Ok(attachment) = bus.attachment(path).await else { return Vec::new() };
    let Ok(properties) = attachment.properties().await else { return Vec::new() };
    let others = shown(&properties.warnings).filter(|warning| warning.code != UNREACHABLE_TAIL);
    others.map(|warning| escaped(warning.message.as_bytes())).collect()
}

/// Opens the file with the user's rights; read-only if it is write-protected.
fn open_file(request: &AttachRequest) -> Result<File, Failure> {
    if request.file.is_empty() {
        let reason = Reason::from(Errno::EINVAL);
        return Err(Failure::of(&request.file, "failed to use backing file", &reason));
    }
    let path = Path::new(&request.file);
    let opened = match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(io::Error::from(Errno::EISDIR)),
        _ => match open(path, !request.read_only) {
            Err(error) if is_write_protected(&error) => open(path, false),
            result => result,
        },
    };
    let name = request.device.as_ref().map_or(&request.file, |device| &device.path);
    opened.map_err(|error| Failure::of(name, FAILED, &Reason::from(&error)))
}

/// The number of the device. loopd creates a device that does not exist.
fn device_for(device: &Device, file: &OsStr) -> Result<u32, Failure> {
    if device.is_directory() {
        return Err(Failure::of(&device.path, FAILED, &Errno::EISDIR.into()));
    }
    match (device.node(), device.number_to_create()) {
        (Node::Loop(number), _) | (Node::Closed(Errno::ENOENT), Some(number)) => Ok(number),
        (Node::Closed(errno), _) => Err(Failure::of(&device.path, FAILED, &errno.into())),
        (Node::Other(errno), _) => Err(Failure::of(file, FAILED, &errno.into())),
    }
}

/// The options for loopd. Values that the kernel rejects are rejected here, with its errno.
fn options(request: &AttachRequest, file: &File, number: Option<u32>) -> Result<AttachOptions, Failure> {
    let failed = |errno: Errno| Failure::of(&request.file, FAILED, &errno.into());
    let kind = file.metadata().map_err(|error| Failure::of(&request.file, FAILED, &Reason::from(&error)))?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        return Err(failed(Errno::EINVAL));
    }
    if [request.offset, request.size_limit].iter().any(|bytes| i64::try_from(*bytes).is_err()) {
        return Err(failed(Errno::EOVERFLOW));
    }
    Ok(AttachOptions {
        offset: request.offset,
        size_limit: request.size_limit,
        read_only: request.read_only,
        partition_scan: request.partition_scan,
        direct_io: Some(request.direct_io),
        block_size: block_size(request.block_size).map_err(failed)?,
        lifetime: Lifetime::Persistent,
        reference: reference(request),
        number,
        overlap: match (request.no_overlap, number) {
            (false, _) => Overlap::Allow,
            (true, Some(_)) => Overlap::Refuse,
            (true, None) => Overlap::Reuse,
        },
        wait: true,
    })
}

/// The block size to request; losetup treats 0 as 512.
///
/// # Errors
/// It is not a block size.
pub fn block_size(bytes: u64) -> Result<u32, Errno> {
    match u32::try_from(bytes) {
        Ok(0) => Ok(512),
        Ok(size) if is_block_size(size) => Ok(size),
        _ => Err(Errno::EINVAL),
    }
}

/// The reference, by default the file's path, cut to what the kernel keeps and to valid UTF-8.
fn reference(request: &AttachRequest) -> String {
    let path = fs::canonicalize(&request.file).unwrap_or_default();
    let bytes = match request.reference.as_bytes() {
        [] => path.as_os_str().as_bytes(),
        given => given,
    };
    let kept = &bytes[..bytes.len().min(REFERENCE_LENGTH)];
    kept.utf8_chunks().next().map(|chunk| chunk.valid().to_owned()).unwrap_or_default()
}

/// The error of losetup for an error of loopd.
async fn failure(
    bus: &Bus,
    request: &AttachRequest,
    file: File,
    error: &anyhow::Error,
) -> anyhow::Result<Failure> {
    let reason = Reason::of(error);
    Ok(match (error::kind(error), &request.device) {
        (Some(ErrorKind::Overlap), device) => {
            let read_only = device.is_none() && is_attached_read_only(bus, request, file).await?;
            let what = if read_only { "overlapping read-only" } else { "overlapping" };
            Failure::new(
                [request.file.as_bytes(), format!(": {what} loop device exists").as_bytes()].concat(),
            )
        }
        (Some(ErrorKind::NoFreeDevice), None) => no_free_device(&reason),
        // losetup fails to open the device.
        (_, None) if reason == Reason::Errno(Errno::EACCES) => no_free_device(&reason),
        (_, Some(device)) if reason == Reason::Errno(Errno::EACCES) => {
            Failure::of(&device.path, FAILED, &reason)
        }
        _ => Failure::of(&request.file, FAILED, &reason),
    })
}

/// Whether the same part of the file is attached read-only.
async fn is_attached_read_only(bus: &Bus, request: &AttachRequest, file: File) -> anyhow::Result<bool> {
    let same_file = ListOptions { file: Some(file.into()), ..ListOptions::default() };
    let found = listing::all(bus, same_file).await?;
    Ok(found.iter().map(|one| &one.attachment).any(|attachment| {
        attachment.read_only
            && !request.read_only
            && (attachment.offset, attachment.size_limit) == (request.offset, request.size_limit)
    }))
}

/// The error if there is no free device.
pub fn no_free_device(reason: &Reason) -> Failure {
    Failure::new(format!("cannot find an unused loop device: {}", reason.text()))
}

/// The warning about the part of the file that is not on the device.
fn warning(request: &AttachRequest) -> Option<String> {
    let metadata =
        fs::metadata(&request.file).ok().filter(|metadata| !metadata.file_type().is_block_device());
    let rest = metadata.map(|metadata| metadata.size().checked_sub(request.offset));
    match (request.size_limit, rest) {
        (0, None) => None,
        (0, Some(None)) => Some(format!(
            "the offset {} is past the end of the file; nothing of the file is on the device, whose size is 0.",
            request.offset
        )),
        (0, Some(Some(size))) => partial_sector("file", size),
        (limit, _) => partial_sector("size limit", limit),
    }
}

/// The warning about a size that is not a multiple of the sector size.
fn partial_sector(what: &str, size: u64) -> Option<String> {
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
    fn warnings_name_the_lost_bytes() {
        assert_eq!(partial_sector("file", 1024), None);
        let odd = partial_sector("file", 1000).unwrap();
        assert!(odd.starts_with("file does not end on a 512-byte sector boundary;"), "{odd}");
        assert!(odd.ends_with(": the last 488 bytes cannot be reached."), "{odd}");
        assert!(partial_sector("file", 513).unwrap().ends_with("the last 1 byte cannot be reached."));
        let tiny = partial_sector("size limit", 100).unwrap();
        assert!(tiny.starts_with("size limit is smaller than 512 bytes;") && tiny.contains("100 bytes"));
    }

    #[test]
    fn offsets_past_the_end_are_reported() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1024).unwrap();
        let request = |offset| AttachRequest { file: file.path().into(), offset, ..AttachRequest::default() };
        assert_eq!(warning(&request(512)), None);
        assert!(warning(&request(1024)).unwrap().contains("0 bytes cannot"));
        assert!(warning(&request(2048)).unwrap().contains("2048 is past the end"));
    }

    #[test]
    fn references_are_cut_to_what_the_kernel_keeps() {
        let given = |text: &str| AttachRequest { reference: text.into(), ..AttachRequest::default() };
        assert_eq!(reference(&given("mine")), "mine");
        assert_eq!(reference(&given(&"ü".repeat(40))), "ü".repeat(31));
        let file = AttachRequest { file: "/dev/../dev/null".into(), ..AttachRequest::default() };
        assert_eq!(reference(&file), "/dev/null");
    }

    #[test]
    fn invalid_block_sizes_are_rejected() {
        assert_eq!((block_size(0), block_size(65536)), (Ok(512), Ok(65536)));
        for bytes in [256, 1000, 131_072, 1 << 32] {
            assert_eq!(block_size(bytes), Err(Errno::EINVAL));
        }
    }
}
