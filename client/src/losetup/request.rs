//! Parses losetup's command line into a request.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::column::{self, Column};
use super::device::Device;
use super::failure::{Failure, Reason};
use super::options::{self, Argument, Arguments, Name};
use super::size;
use super::table::Format;

const CRYPTOLOOP: &str = "encryption is not supported: the kernel dropped cryptoloop in Linux 5.16, use \
    cryptsetup(8) with a loop device instead";
const SETUP_ONLY: &str = "the options --{sizelimit,partscan,read-only,show} are allowed during loop device \
    setup only";

/// An operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Print the help.
    Help,
    /// Print the version.
    Version,
    /// List devices.
    List(Selection, Output),
    /// Attach a file.
    Attach(AttachRequest),
    /// Print a free device.
    FindFree,
    /// Detach these devices.
    Detach(Vec<Device>),
    /// Detach all devices.
    DetachAll,
    /// Remove the nodes of these devices.
    Remove(Vec<Device>),
    /// Re-read the size of the backing file.
    SetCapacity(Device),
    /// Turn direct I/O on or off.
    SetDirectIo(Device, bool),
    /// Change the logical block size.
    SetBlockSize(Device, u64),
}

/// The devices to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All devices in use.
    All,
    /// The devices of this file, at this offset if given.
    File(OsString, Option<u64>),
    /// One device, in use or not.
    Device(Device),
}

/// The output format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A line of text for each device, the traditional format.
    Lines,
    /// A table of these columns.
    Table(Vec<Column>, Format),
}

/// The file to attach, and the options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachRequest {
    /// The device; `None` for any free one.
    pub device: Option<Device>,
    /// The backing file.
    pub file: OsString,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Maximum number of bytes; 0 is up to the end.
    pub size_limit: u64,
    /// Logical block size in bytes; 0 is the default.
    pub block_size: u64,
    /// Scan for partitions.
    pub partition_scan: bool,
    /// Attach read-only.
    pub read_only: bool,
    /// Use direct I/O.
    pub direct_io: bool,
    /// The reference; empty for the file's path.
    pub reference: OsString,
    /// Do not attach a file that is already attached.
    pub no_overlap: bool,
    /// Print the device.
    pub show: bool,
}

/// The options that choose the operation; at most one is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    All,
    Associated,
    Find,
    Detach,
    DetachAll,
    Remove,
    SetCapacity,
}

/// The parsed options and operands.
#[derive(Debug, Default)]
struct Given {
    mode: Option<Mode>,
    attach: AttachRequest,
    has_offset: bool,
    has_block_size: bool,
    direct_io: Option<bool>,
    associated: OsString,
    list: bool,
    output_all: bool,
    output: Option<OsString>,
    format: Format,
    operands: std::vec::IntoIter<OsString>,
}

impl Request {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// The error of losetup.
    pub fn parse(arguments: &[OsString]) -> Result<Self, Failure> {
        let mut given = Given::default();
        let mut operands = Vec::new();
        let mut parser = Arguments::new(arguments);
        while let Some(argument) = parser.next()? {
            match argument {
                Argument::Operand(operand) => operands.push(operand),
                Argument::Option(Name::Help, _) => return Ok(Self::Help),
                Argument::Option(Name::Version, _) => return Ok(Self::Version),
                Argument::Option(name, value) => given.apply(name, value.as_deref())?,
            }
        }
        given.operands = operands.into_iter();
        given.request(arguments.len())
    }
}

impl Given {
    fn apply(&mut self, name: Name, value: Option<&OsStr>) -> Result<(), Failure> {
        let text = value.unwrap_or_default();
        match name {
            Name::All => self.mode = Some(Mode::All),
            Name::SetCapacity => self.mode = Some(Mode::SetCapacity),
            Name::Detach => self.mode = Some(Mode::Detach),
            Name::DetachAll => self.mode = Some(Mode::DetachAll),
            Name::Find => self.mode = Some(Mode::Find),
            Name::Remove => self.mode = Some(Mode::Remove),
            Name::Associated => {
                self.mode = Some(Mode::Associated);
                self.associated = text.to_owned();
            }
            Name::NoOverlap => self.attach.no_overlap = true,
            Name::PartScan => self.attach.partition_scan = true,
            Name::ReadOnly => self.attach.read_only = true,
            Name::Show => self.attach.show = true,
            Name::LoopRef => self.attach.reference = text.to_owned(),
            Name::Offset => {
                self.attach.offset = parse_size(text, "failed to parse offset")?;
                self.has_offset = true;
            }
            Name::SizeLimit => self.attach.size_limit = parse_size(text, "failed to parse size")?,
            Name::SectorSize => {
                self.attach.block_size = parse_size(text, "failed to parse logical block size")?;
                self.has_block_size = true;
            }
            Name::DirectIo => {
                self.direct_io = Some(options::switch(value)?);
                // As in losetup, a later `off` does not cancel an `on` for a new device.
                self.attach.direct_io |= self.direct_io == Some(true);
            }
            Name::Json => self.format.json = true,
            Name::Raw => self.format.raw = true,
            Name::NoHeadings => self.format.headings = false,
            Name::List => self.list = true,
            Name::OutputAll => (self.list, self.output_all) = (true, true),
            Name::Output => (self.list, self.output) = (true, Some(text.to_owned())),
            Name::Cryptoloop => return Err(Failure::new(CRYPTOLOOP)),
            Name::Verbose | Name::Help | Name::Version => {}
        }
        Ok(())
    }

    fn request(mut self, count: usize) -> Result<Request, Failure> {
        let is_bare = count == 0 || (count == 1 && (self.format.raw || self.format.json));
        if is_bare && self.mode.is_none() {
            (self.mode, self.list) = (Some(Mode::All), true);
        }
        let request = match self.mode {
            Some(Mode::All) => Request::List(Selection::All, Output::Lines),
            Some(Mode::Associated) => {
                let offset = self.has_offset.then_some(self.attach.offset);
                Request::List(Selection::File(std::mem::take(&mut self.associated), offset), Output::Lines)
            }
            Some(Mode::DetachAll) => Request::DetachAll,
            Some(Mode::Detach) => Request::Detach(self.devices()?),
            Some(Mode::Remove) => Request::Remove(self.devices()?),
            Some(Mode::SetCapacity) => Request::SetCapacity(self.device()?),
            Some(Mode::Find) => self.find()?,
            None if self.list && self.operands.len() == 0 => Request::List(Selection::All, Output::Lines),
            None if self.operands.len() == 1 => self.one_device()?,
            None => {
                self.attach.device = Some(self.device()?);
                self.attach.file = self.operands.next().unwrap_or_default();
                Request::Attach(std::mem::take(&mut self.attach))
            }
        };
        self.check(&request)?;
        match request {
            Request::List(which, _) => Ok(Request::List(which, self.output_format()?)),
            request => Ok(request),
        }
    }

    fn device(&mut self) -> Result<Device, Failure> {
        let name = self.operands.next().ok_or_else(|| Failure::new("no loop device specified"))?;
        Ok(Device::named(&name))
    }

    fn devices(&mut self) -> Result<Vec<Device>, Failure> {
        let first = self.device()?;
        Ok(std::iter::once(first).chain(self.operands.by_ref().map(|name| Device::named(&name))).collect())
    }

    fn find(&mut self) -> Result<Request, Failure> {
        let Some(file) = self.operands.next() else { return Ok(Request::FindFree) };
        if self.operands.len() > 0 {
            return Err(Failure::new("unexpected arguments"));
        }
        Ok(Request::Attach(AttachRequest { file, ..std::mem::take(&mut self.attach) }))
    }

    fn one_device(&mut self) -> Result<Request, Failure> {
        let device = self.device()?;
        Ok(match self.direct_io {
            Some(direct_io) => {
                // Here it is not an attach option.
                self.attach.direct_io = false;
                Request::SetDirectIo(device, direct_io)
            }
            None if self.has_block_size => Request::SetBlockSize(device, self.attach.block_size),
            None => Request::List(Selection::Device(device), Output::Lines),
        })
    }

    /// Rejects options that do not apply to the operation.
    fn check(&self, request: &Request) -> Result<(), Failure> {
        if matches!(request, Request::Attach(_)) {
            return Ok(());
        }
        let AttachRequest { size_limit, partition_scan, read_only, direct_io, show, .. } = self.attach;
        if size_limit > 0 || partition_scan || read_only || direct_io || show {
            return Err(Failure::new(SETUP_ONLY));
        }
        if self.has_offset && !matches!(request, Request::List(Selection::File(..), _)) {
            return Err(Failure::new("the option --offset is not allowed in this context"));
        }
        Ok(())
    }

    fn output_format(self) -> Result<Output, Failure> {
        if !self.list {
            return Ok(Output::Lines);
        }
        let default = if self.output_all { column::ALL.to_vec() } else { column::DEFAULT.to_vec() };
        let columns = match self.output {
            Some(list) => column::parse(list.as_bytes(), default)?,
            None => default,
        };
        Ok(Output::Table(columns, self.format))
    }
}

fn parse_size(text: &OsStr, what: &str) -> Result<u64, Failure> {
    size::parse(text.as_bytes()).map_err(|errno: Errno| {
        let reason = Reason::from(errno).text();
        Failure::new([what.as_bytes(), b": '", text.as_bytes(), b"': ", reason.as_bytes()].concat())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Request, String> {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Request::parse(&arguments).map_err(|failure| failure.to_string())
    }

    fn device(name: &str) -> Device {
        Device::named(OsStr::new(name))
    }

    fn table(format: Format) -> Output {
        Output::Table(column::DEFAULT.to_vec(), format)
    }

    #[test]
    fn listings_are_parsed() {
        let plain = Format::default();
        for (line, selection, output) in [
            ("", Selection::All, table(plain)),
            ("-a", Selection::All, Output::Lines),
            ("-l", Selection::All, table(plain)),
            ("-J", Selection::All, table(Format { json: true, ..plain })),
            ("--raw", Selection::All, table(Format { raw: true, ..plain })),
            ("-J -a", Selection::All, Output::Lines),
            ("-nl", Selection::All, table(Format { headings: false, ..plain })),
            ("-a whatever it is", Selection::All, Output::Lines),
            ("loop3", Selection::Device(device("/dev/loop3")), Output::Lines),
            ("-l loop3", Selection::Device(device("/dev/loop3")), table(plain)),
            ("-j x -o 1K", Selection::File("x".into(), Some(1024)), Output::Lines),
        ] {
            assert_eq!(parse(line), Ok(Request::List(selection, output)), "{line:?}");
        }
    }

    #[test]
    fn columns_are_parsed() {
        let columns = |line| match parse(line) {
            Ok(Request::List(_, Output::Table(columns, _))) => Ok(columns),
            Ok(other) => Err(format!("{other:?}")),
            Err(text) => Err(text),
        };
        assert_eq!(columns("-O name,RO"), Ok(vec![Column::Name, Column::Ro]));
        assert_eq!(columns("-O name -O RO loop3"), Ok(vec![Column::Ro]));
        assert_eq!(columns("-l -O +REF"), Ok([&column::DEFAULT[..], &[Column::Ref]].concat()));
        assert_eq!(columns("--output-all"), Ok(column::ALL.to_vec()));
        assert_eq!(columns("-O name --output-all"), Ok(vec![Column::Name]));
        assert_eq!(columns("-j x -O name,+ro"), Err("unknown column: +ro".to_owned()));
        assert_eq!(columns("-O name -r"), Err(SETUP_ONLY.to_owned()));
    }

    #[test]
    fn attach_options_are_parsed() {
        let attach = AttachRequest { file: "x".into(), ..AttachRequest::default() };
        assert_eq!(parse("-f x"), Ok(Request::Attach(attach.clone())));
        assert_eq!(
            parse("loop3 x -Pr --show more words"),
            Ok(Request::Attach(AttachRequest {
                device: Some(device("/dev/loop3")),
                partition_scan: true,
                read_only: true,
                show: true,
                ..attach.clone()
            }))
        );
        let options = "-f x -o 1K --sizelimit 2K -b 4096 -L --loop-ref r --direct-io";
        let expected = AttachRequest {
            offset: 1024,
            size_limit: 2048,
            block_size: 4096,
            no_overlap: true,
            reference: "r".into(),
            direct_io: true,
            ..attach
        };
        assert_eq!(parse(options), Ok(Request::Attach(expected)));
    }

    #[test]
    fn other_operations_are_parsed() {
        assert_eq!(parse("-f"), Ok(Request::FindFree));
        assert_eq!(parse("-d a /dev/b"), Ok(Request::Detach(vec![device("a"), device("/dev/b")])));
        assert_eq!(parse("--remove a"), Ok(Request::Remove(vec![device("a")])));
        assert_eq!(parse("-D extra"), Ok(Request::DetachAll));
        assert_eq!(parse("-c a b"), Ok(Request::SetCapacity(device("a"))));
        assert_eq!(parse("--direct-io a"), Ok(Request::SetDirectIo(device("a"), true)));
        assert_eq!(parse("-b 1K --direct-io=off a"), Ok(Request::SetDirectIo(device("a"), false)));
        assert_eq!(parse("-b 1K a"), Ok(Request::SetBlockSize(device("a"), 1024)));
        assert_eq!(parse("-x -h"), Err("invalid option -- 'x'".to_owned()));
        assert_eq!(parse("-h -x"), Ok(Request::Help));
    }

    #[test]
    fn conflicting_options_are_rejected() {
        for line in
            ["--show -a", "-r loop3", "-P -l", "--sizelimit 1 -d loop3", "--direct-io -j x", "--show -f"]
        {
            assert_eq!(parse(line), Err(SETUP_ONLY.to_owned()), "{line}");
        }
        for line in ["-o 0 -a", "-o 5 -f", "-o 0 loop3", "-o 0 -d loop3"] {
            let text = parse(line).unwrap_err();
            assert_eq!(text, "the option --offset is not allowed in this context", "{line}");
        }
        for line in ["-d", "--show", "-n", "-n -J", "-o 5"] {
            assert_eq!(parse(line), Err("no loop device specified".to_owned()), "{line}");
        }
        assert_eq!(parse("-f x y"), Err("unexpected arguments".to_owned()));
        assert_eq!(parse("-o -1 -a"), Err("failed to parse offset: '-1': Invalid argument".to_owned()));
        assert!(parse("-e aes x").unwrap_err().contains("5.16, use cryptsetup(8)"));
    }
}
