//! Shows loop devices.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use loopd_dbus::ListOptions;
use loopd_dbus::properties::{from_bus_path, to_bus_path};
use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use super::column::Column;
use super::device::{Device, Node, attribute, device_number};
use super::failure::{Failure, Reason};
use super::order::{Shape, Which};
use super::table::{Row, draw};
use crate::connection::Bus;
use crate::output;
use crate::target::{Attached, is_same_file, list, open_to_identify};

/// A device to be shown.
struct Shown {
    /// As it was named.
    name: Vec<u8>,
    number: Option<u32>,
    /// Nothing where no file is attached.
    attached: Option<Attached>,
}

/// Shows the devices.
///
/// # Errors
/// A device that was named is not in use, or loopd could not be asked.
pub async fn show(bus: &Bus, which: &Which, shape: &Shape) -> anyhow::Result<()> {
    let shown = match which {
        Which::All => in_use(bus, None).await?,
        Which::Of(file, offset) => attached_from(bus, file, *offset).await?,
        Which::One(device) => vec![one(bus, device).await?],
    };
    let text = match shape {
        Shape::Table(columns, format) => {
            let is_aligned = !format.raw && !format.json;
            let rows: Vec<Row> = shown.iter().map(|device| row(device, columns, is_aligned)).collect();
            draw(columns, &rows, *format, is_utf8())
        }
        Shape::Lines => shown.iter().map(line).collect::<Result<Vec<_>, _>>()?.concat(),
    };
    output::print_bytes(&text)
}

/// The attachments, also those that loopd did not make, in the order of sysfs, as losetup has them.
pub async fn all(bus: &Bus, options: ListOptions) -> anyhow::Result<Vec<Attached>> {
    let mut attached = list(&bus.manager, &ListOptions { all: true, ..options }).await?;
    attached.iter_mut().for_each(refresh);
    let order: Vec<_> = fs::read_dir("/sys/block").into_iter().flatten().flatten().collect();
    attached.sort_by_cached_key(|one| {
        let name = format!("loop{}", one.attachment.number);
        order.iter().position(|entry| entry.file_name() == name.as_str()).unwrap_or(usize::MAX)
    });
    Ok(attached)
}

/// What the kernel tells nobody of when it changes, as sysfs has it now: the file may have been
/// removed, and somebody else may have asked for a detach.
fn refresh(attached: &mut Attached) {
    let Attached { attachment, .. } = attached;
    if let Ok(mut path) = fs::read(format!("/sys/block/loop{}/loop/backing_file", attachment.number)) {
        path.pop_if(|byte| *byte == b'\n');
        attachment.backing_file = to_bus_path(&path);
    }
    if let Some(autoclear) = attribute(attachment.number, "loop/autoclear") {
        attachment.autoclear = autoclear != "0";
    }
}

/// The device's attachment.
///
/// # Errors
/// loopd could not be asked.
pub async fn attached_to(bus: &Bus, number: u32) -> anyhow::Result<Option<Attached>> {
    let all = all(bus, ListOptions::default()).await?;
    Ok(all.into_iter().find(|one| one.attachment.number == number))
}

async fn in_use(bus: &Bus, file: Option<File>) -> anyhow::Result<Vec<Shown>> {
    let options = ListOptions { file: file.map(Into::into), ..ListOptions::default() };
    Ok(all(bus, options).await?.into_iter().map(Shown::from).collect())
}

/// By device and inode; a file that is not there any more by its name.
async fn attached_from(bus: &Bus, file: &OsStr, offset: Option<u64>) -> anyhow::Result<Vec<Shown>> {
    let path = Path::new(file);
    let metadata = fs::metadata(path);
    let opened = metadata.as_ref().ok().and_then(|metadata| open_to_identify(path, metadata).ok());
    let is_identified = opened.is_some();
    let mut shown = in_use(bus, opened).await?;
    shown.retain(|one| {
        let Some(attached) = &one.attached else { return false };
        let is_file = match &metadata {
            _ if is_identified => true,
            Ok(metadata) => is_same_file(&attached.attachment, metadata),
            Err(_) => from_bus_path(&attached.attachment.backing_file) == file.as_bytes(),
        };
        is_file && offset.is_none_or(|offset| offset == attached.attachment.offset)
    });
    Ok(shown)
}

async fn one(bus: &Bus, device: &Device) -> anyhow::Result<Shown> {
    let number = match device.node() {
        Node::Loop(number) => Some(number),
        Node::Closed(_) | Node::Other(_) => None,
    };
    let attached = match number {
        Some(number) => attached_to(bus, number).await?,
        None => None,
    };
    Ok(Shown { name: device.path.as_bytes().to_vec(), number, attached })
}

impl From<Attached> for Shown {
    fn from(attached: Attached) -> Self {
        let mut name = attached.attachment.device.clone();
        if !Path::new(&name).exists() {
            name.push_str(" (lost)");
        }
        Self { name: name.into_bytes(), number: Some(attached.attachment.number), attached: Some(attached) }
    }
}

/// `/dev/loop0: [65024]:131 (/x.img), offset 512, sizelimit 1024`
fn line(shown: &Shown) -> Result<Vec<u8>, Failure> {
    let Some(attached) = &shown.attached else {
        let reason = Reason::from(Errno::ENOENT).text();
        return Err(Failure::new([&shown.name, b": ".as_slice(), reason.as_bytes()].concat()));
    };
    let attachment = &attached.attachment;
    let identity = format!(": [{:04}]:{} (", attachment.backing_device, attachment.backing_inode);
    let mut end = ")".to_owned();
    for (what, bytes) in [("offset", attachment.offset), ("sizelimit", attachment.size_limit)] {
        if bytes > 0 {
            end.push_str(&format!(", {what} {bytes}"));
        }
    }
    end.push('\n');
    let file = from_bus_path(&attachment.backing_file);
    Ok([shown.name.as_slice(), identity.as_bytes(), file, end.as_bytes()].concat())
}

fn row(shown: &Shown, columns: &[Column], is_aligned: bool) -> Row {
    let value = |column: &Column| {
        let value = value(shown, *column)?;
        let is_pair = matches!(column, Column::MajMin | Column::BackMajMin);
        Some(if is_pair && !is_aligned { value.trim_ascii().to_vec() } else { value })
    };
    columns.iter().map(value).collect()
}

fn value(shown: &Shown, column: Column) -> Option<Vec<u8>> {
    match column {
        Column::Name => Some(shown.name.clone()),
        Column::BackFile => {
            let attachment = &shown.attached.as_ref()?.attachment;
            Some(from_bus_path(&attachment.backing_file).to_vec())
        }
        Column::MajMin | Column::Maj | Column::Min => {
            let (major, minor) = device_number(shown.number?)?;
            Some(numbers(column, major, minor).into_bytes())
        }
        _ => match &shown.attached {
            Some(attached) => attached_value(attached, column),
            None => unattached_value(shown.number, column),
        }
        .map(String::into_bytes),
    }
}

fn attached_value(attached: &Attached, column: Column) -> Option<String> {
    let attachment = &attached.attachment;
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

/// What losetup shows of a device that no file is attached to, if it is one at all.
fn unattached_value(number: Option<u32>, column: Column) -> Option<String> {
    match column {
        Column::Autoclear | Column::Dio => Some("0".to_owned()),
        Column::Ro => Some(number.and_then(|number| attribute(number, "ro")).unwrap_or("0".to_owned())),
        // So losetup says, whatever sysfs does.
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

/// Whether the user's locale can show every letter.
fn is_utf8() -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(std::env::var_os);
    let name = locale.into_iter().find(|value| !value.is_empty()).unwrap_or_default();
    let name = name.to_string_lossy().to_ascii_lowercase();
    name.contains("utf-8") || name.contains("utf8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::json::tests::example;

    fn shown() -> Shown {
        let mut attached = example();
        attached.attachment.backing_device = nix::sys::stat::makedev(254, 0);
        attached.attachment.backing_inode = 131;
        Shown { name: b"/dev/loop0".to_vec(), number: None, attached: Some(attached) }
    }

    fn text(shown: &Shown) -> String {
        String::from_utf8(line(shown).unwrap()).unwrap()
    }

    #[test]
    fn lines_are_losetups() {
        let mut shown = shown();
        assert_eq!(text(&shown), "/dev/loop0: [65024]:131 (/home/a/x.img)\n");
        let attachment = &mut shown.attached.as_mut().unwrap().attachment;
        (attachment.offset, attachment.size_limit, attachment.backing_device) = (512, 1024, 45);
        assert_eq!(text(&shown), "/dev/loop0: [0045]:131 (/home/a/x.img), offset 512, sizelimit 1024\n");
        shown.attached = None;
        assert_eq!(line(&shown).unwrap_err().to_string(), "/dev/loop0: No such file or directory");
    }

    #[test]
    fn device_numbers_are_aligned_at_the_colon() {
        let value = value(&shown(), Column::BackMajMin).unwrap();
        assert_eq!(value, b"     254:0  ");
        let row = row(&shown(), &[Column::BackMajMin], false);
        assert_eq!(row, [Some(b"254:0".to_vec())]);
        assert_eq!(numbers(Column::MajMin, 7, 20), "  7:20 ");
    }

    #[test]
    fn what_is_not_attached_has_few_values() {
        let none = Shown { name: b"/dev/x".to_vec(), number: None, attached: None };
        let columns =
            [Column::Offset, Column::Ro, Column::PartScan, Column::Ref, Column::Min, Column::LogSec];
        let expected = [None, Some(b"0".to_vec()), Some(b"1".to_vec()), None, None, None];
        assert_eq!(row(&none, &columns, true), expected);
    }
}
