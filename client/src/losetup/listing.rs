//! Lists loop devices.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use loopd_dbus::ListOptions;
use loopd_dbus::properties::{from_bus_path, to_bus_path};
use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use super::column::Column;
use super::device::{Device, Node, device_number};
use super::failure::{Failure, Reason};
use super::request::{Output, Selection};
use super::table::{Row, draw};
use crate::bus::attachment::{AttachmentInfo, list};
use crate::bus::connection::Bus;
use crate::image::backing_file::{is_same_file, open_to_identify};
use crate::show::stdout::print_bytes;
use crate::sysfs::{self, attribute};

/// A device to list.
struct Entry {
    /// The name to print.
    name: Vec<u8>,
    number: Option<u32>,
    /// `None` if no file is attached.
    info: Option<AttachmentInfo>,
}

/// Lists the devices.
///
/// # Errors
/// A device on the command line is not in use, or the call failed.
pub async fn show(bus: &Bus, selection: &Selection, output: &Output) -> anyhow::Result<()> {
    let entries = match selection {
        Selection::All => in_use(bus, None).await?,
        Selection::File(file, offset) => attachments_from(bus, file, *offset).await?,
        Selection::Device(device) => vec![entry_of(bus, device).await?],
    };
    let text = match output {
        Output::Table(columns, format) => {
            let is_aligned = !format.raw && !format.json;
            let rows: Vec<Row> = entries.iter().map(|entry| row(entry, columns, is_aligned)).collect();
            draw(columns, &rows, *format, is_utf8())
        }
        Output::Lines => entries.iter().map(line).collect::<Result<Vec<_>, _>>()?.concat(),
    };
    print_bytes(&text)
}

/// All attachments, including those of other programs, in the order of sysfs, as losetup lists them.
pub async fn all(bus: &Bus, options: ListOptions) -> anyhow::Result<Vec<AttachmentInfo>> {
    let mut attachments = list(&bus.manager, &ListOptions { all: true, ..options }).await?;
    attachments.iter_mut().for_each(refresh);
    let order: Vec<_> = fs::read_dir("/sys/block").into_iter().flatten().flatten().collect();
    attachments.sort_by_cached_key(|info| {
        let name = format!("loop{}", info.attachment.number);
        order.iter().position(|entry| entry.file_name() == name.as_str()).unwrap_or(usize::MAX)
    });
    Ok(attachments)
}

/// Updates from sysfs what changes without an event: the file may have been deleted, and another process
/// may have requested a detach.
fn refresh(info: &mut AttachmentInfo) {
    let AttachmentInfo { attachment, .. } = info;
    if let Some(path) = sysfs::backing_file(attachment.number) {
        attachment.backing_file = to_bus_path(&path);
    }
    if let Some(autoclear) = attribute(attachment.number, "loop/autoclear") {
        attachment.autoclear = autoclear != "0";
    }
}

/// The attachment of the device.
///
/// # Errors
/// The call failed.
pub async fn attachment_of(bus: &Bus, number: u32) -> anyhow::Result<Option<AttachmentInfo>> {
    let all = all(bus, ListOptions::default()).await?;
    Ok(all.into_iter().find(|info| info.attachment.number == number))
}

async fn in_use(bus: &Bus, file: Option<File>) -> anyhow::Result<Vec<Entry>> {
    let options = ListOptions { file: file.map(Into::into), ..ListOptions::default() };
    Ok(all(bus, options).await?.into_iter().map(Entry::from).collect())
}

/// Compares device and inode, or the path for a file that does not exist.
async fn attachments_from(bus: &Bus, file: &OsStr, offset: Option<u64>) -> anyhow::Result<Vec<Entry>> {
    let path = Path::new(file);
    let metadata = fs::metadata(path);
    let opened = metadata.as_ref().ok().and_then(|metadata| open_to_identify(path, metadata).ok());
    let is_identified = opened.is_some();
    let mut entries = in_use(bus, opened).await?;
    entries.retain(|entry| {
        let Some(info) = &entry.info else { return false };
        let is_file = match &metadata {
            _ if is_identified => true,
            Ok(metadata) => is_same_file(&info.attachment, metadata),
            Err(_) => from_bus_path(&info.attachment.backing_file) == file.as_bytes(),
        };
        is_file && offset.is_none_or(|offset| offset == info.attachment.offset)
    });
    Ok(entries)
}

async fn entry_of(bus: &Bus, device: &Device) -> anyhow::Result<Entry> {
    let number = match device.node() {
        Node::Loop(number) => Some(number),
        Node::Closed(_) | Node::Other(_) => None,
    };
    let info = match number {
        Some(number) => attachment_of(bus, number).await?,
        None => None,
    };
    Ok(Entry { name: device.path.as_bytes().to_vec(), number, info })
}

impl From<AttachmentInfo> for Entry {
    fn from(info: AttachmentInfo) -> Self {
        let mut name = info.attachment.device.clone();
        if !Path::new(&name).exists() {
            name.push_str(" (lost)");
        }
        Self { name: name.into_bytes(), number: Some(info.attachment.number), info: Some(info) }
    }
}

/// `/dev/loop0: [65024]:131 (/x.img), offset 512, sizelimit 1024`
fn line(entry: &Entry) -> Result<Vec<u8>, Failure> {
    let Some(info) = &entry.info else {
        let reason = Reason::from(Errno::ENOENT).text();
        return Err(Failure::new([&entry.name, b": ".as_slice(), reason.as_bytes()].concat()));
    };
    let attachment = &info.attachment;
    let identity = format!(": [{:04}]:{} (", attachment.backing_device, attachment.backing_inode);
    let mut end = ")".to_owned();
    for (what, bytes) in [("offset", attachment.offset), ("sizelimit", attachment.size_limit)] {
        if bytes > 0 {
            end.push_str(&format!(", {what} {bytes}"));
        }
    }
    end.push('\n');
    let file = from_bus_path(&attachment.backing_file);
    Ok([entry.name.as_slice(), identity.as_bytes(), file, end.as_bytes()].concat())
}

fn row(entry: &Entry, columns: &[Column], is_aligned: bool) -> Row {
    let value = |column: &Column| {
        let value = value(entry, *column)?;
        let is_pair = matches!(column, Column::MajMin | Column::BackMajMin);
        Some(if is_pair && !is_aligned { value.trim_ascii().to_vec() } else { value })
    };
    columns.iter().map(value).collect()
}

fn value(entry: &Entry, column: Column) -> Option<Vec<u8>> {
    match column {
        Column::Name => Some(entry.name.clone()),
        Column::BackFile => {
            let attachment = &entry.info.as_ref()?.attachment;
            Some(from_bus_path(&attachment.backing_file).to_vec())
        }
        Column::MajMin | Column::Maj | Column::Min => {
            let (major, minor) = device_number(entry.number?)?;
            Some(numbers(column, major, minor).into_bytes())
        }
        _ => match &entry.info {
            Some(info) => attachment_value(info, column),
            None => unattached_value(entry.number, column),
        }
        .map(String::into_bytes),
    }
}

fn attachment_value(info: &AttachmentInfo, column: Column) -> Option<String> {
    let attachment = &info.attachment;
    let flag = |value: bool| u8::from(value).to_string();
    let device = (major(attachment.backing_device), minor(attachment.backing_device));
    Some(match column {
        Column::Autoclear => flag(attachment.autoclear),
        Column::PartScan => flag(attachment.partition_scan),
        Column::Ro => flag(attachment.read_only),
        Column::Dio => flag(attachment.direct_io),
        Column::BackIno => attachment.backing_inode.to_string(),
        Column::Offset => attachment.offset.to_string(),
        Column::SizeLimit => attachment.size_limit.to_string(),
        Column::LogSec => attachment.block_size.to_string(),
        Column::Ref => attachment.reference.clone(),
        Column::BackMajMin => format!("{:8}:{:<3}", device.0, device.1),
        Column::BackMaj => device.0.to_string(),
        Column::BackMin => device.1.to_string(),
        Column::Name | Column::BackFile | Column::MajMin | Column::Maj | Column::Min => return None,
    })
}

/// The value for a device without a file, or for a file that is not a loop device.
fn unattached_value(number: Option<u32>, column: Column) -> Option<String> {
    match column {
        Column::Autoclear | Column::Dio => Some("0".to_owned()),
        Column::Ro => Some(number.and_then(|number| attribute(number, "ro")).unwrap_or("0".to_owned())),
        // losetup prints 1, independent of sysfs.
        Column::PartScan => Some("1".to_owned()),
        Column::LogSec => attribute(number?, "queue/logical_block_size"),
        _ => None,
    }
}

fn numbers(column: Column, major: u32, minor: u32) -> String {
    match column {
        Column::Maj => major.to_string(),
        Column::Min => minor.to_string(),
        _ => format!("{major:3}:{minor:<3}"),
    }
}

/// Whether the user's locale is UTF-8.
fn is_utf8() -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(std::env::var_os);
    let name = locale.into_iter().find(|value| !value.is_empty()).unwrap_or_default();
    let name = name.to_string_lossy().to_ascii_lowercase();
    name.contains("utf-8") || name.contains("utf8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example;

    fn entry() -> Entry {
        let mut info = example::attachment();
        info.attachment.backing_device = nix::sys::stat::makedev(254, 0);
        info.attachment.backing_inode = 131;
        Entry { name: b"/dev/loop0".to_vec(), number: None, info: Some(info) }
    }

    fn text(entry: &Entry) -> String {
        String::from_utf8(line(entry).unwrap()).unwrap()
    }

    #[test]
    fn lines_have_the_format_of_losetup() {
        let mut entry = entry();
        assert_eq!(text(&entry), "/dev/loop0: [65024]:131 (/home/a/x.img)\n");
        let attachment = &mut entry.info.as_mut().unwrap().attachment;
        (attachment.offset, attachment.size_limit, attachment.backing_device) = (512, 1024, 45);
        assert_eq!(text(&entry), "/dev/loop0: [0045]:131 (/home/a/x.img), offset 512, sizelimit 1024\n");
        entry.info = None;
        assert_eq!(line(&entry).unwrap_err().to_string(), "/dev/loop0: No such file or directory");
    }

    #[test]
    fn device_numbers_are_aligned_at_the_colon() {
        let value = value(&entry(), Column::BackMajMin).unwrap();
        assert_eq!(value, b"     254:0  ");
        let row = row(&entry(), &[Column::BackMajMin], false);
        assert_eq!(row, [Some(b"254:0".to_vec())]);
        assert_eq!(numbers(Column::MajMin, 7, 20), "  7:20 ");
    }

    #[test]
    fn unattached_devices_have_few_values() {
        let none = Entry { name: b"/dev/x".to_vec(), number: None, info: None };
        let columns =
            [Column::Offset, Column::Ro, Column::PartScan, Column::Ref, Column::Min, Column::LogSec];
        let expected = [None, Some(b"0".to_vec()), Some(b"1".to_vec()), None, None, None];
        assert_eq!(row(&none, &columns, true), expected);
    }
}
