//! What a command line of losetup asks for.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::column::{self, Column};
use super::device::Device;
use super::failure::{Failure, Reason};
use super::number;
use super::options::{self, Name, Word, Words};
use super::table::Format;

const CRYPTOLOOP: &str = "encryption is not supported: the kernel dropped cryptoloop in Linux 5.16, use \
    cryptsetup(8) with a loop device instead";
const SETUP_ONLY: &str = "the options --{sizelimit,partscan,read-only,show} are allowed during loop device \
    setup only";

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Show the help.
    Help,
    /// Show the version.
    Version,
    /// Show devices.
    Show(Which, Shape),
    /// Attach a file.
    Attach(Attach),
    /// Name a free device.
    FindFree,
    /// Detach these.
    Detach(Vec<Device>),
    /// Detach all that there are.
    DetachAll,
    /// Take away the nodes of these.
    Remove(Vec<Device>),
    /// Read the file's size again.
    SetCapacity(Device),
    /// Bypass the page cache, or do not.
    SetDirectIo(Device, bool),
    /// Change the logical block size.
    SetBlockSize(Device, u64),
}

/// Which devices to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// All that are in use.
    All,
    /// Those that this file is attached to, at this offset where one is given.
    Of(OsString, Option<u64>),
    /// This one, in use or not.
    One(Device),
}

/// How to show them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A line of text for each, as losetup did it first.
    Lines,
    /// A table with these columns.
    Table(Vec<Column>, Format),
}

/// What to attach, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attach {
    /// The device; any free one where there is none.
    pub device: Option<Device>,
    /// The backing file.
    pub file: OsString,
    /// Bytes into the file.
    pub offset: u64,
    /// Bytes at most; 0 is up to the end.
    pub size_limit: u64,
    /// Logical block size in bytes; 0 is the kernel's choice.
    pub block_size: u64,
    /// Look for partitions.
    pub partition_scan: bool,
    /// Make it read-only.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct_io: bool,
    /// What to show as REF; the file's path where it is empty.
    pub reference: OsString,
    /// Do not attach what is attached already.
    pub no_overlap: bool,
    /// Print the device.
    pub show: bool,
}

/// The options that say what to do, of which one at most is given.
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

/// All that was given.
#[derive(Debug, Default)]
struct Given {
    mode: Option<Mode>,
    attach: Attach,
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

impl Order {
    /// Reads the words behind the program's name.
    ///
    /// # Errors
    /// What losetup would say is wrong with them.
    pub fn read(words: &[OsString]) -> Result<Self, Failure> {
        let mut given = Given::default();
        let mut operands = Vec::new();
        let mut reader = Words::new(words);
        while let Some(word) = reader.next()? {
            match word {
                Word::Operand(operand) => operands.push(operand),
                Word::Option(Name::Help, _) => return Ok(Self::Help),
                Word::Option(Name::Version, _) => return Ok(Self::Version),
                Word::Option(name, value) => given.take(name, value.as_deref())?,
            }
        }
        given.operands = operands.into_iter();
        given.order(words.len())
    }
}

impl Given {
    fn take(&mut self, name: Name, value: Option<&OsStr>) -> Result<(), Failure> {
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
                self.attach.offset = size(text, "failed to parse offset")?;
                self.has_offset = true;
            }
            Name::SizeLimit => self.attach.size_limit = size(text, "failed to parse size")?,
            Name::SectorSize => {
                self.attach.block_size = size(text, "failed to parse logical block size")?;
                self.has_block_size = true;
            }
            Name::DirectIo => {
                self.direct_io = Some(options::switch(value)?);
                // As losetup: a later `off` does not take back what `on` means for a new device.
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

    fn order(mut self, words: usize) -> Result<Order, Failure> {
        let is_bare = words == 0 || (words == 1 && (self.format.raw || self.format.json));
        if is_bare && self.mode.is_none() {
            (self.mode, self.list) = (Some(Mode::All), true);
        }
        let order = match self.mode {
            Some(Mode::All) => Order::Show(Which::All, Shape::Lines),
            Some(Mode::Associated) => {
                let offset = self.has_offset.then_some(self.attach.offset);
                Order::Show(Which::Of(std::mem::take(&mut self.associated), offset), Shape::Lines)
            }
            Some(Mode::DetachAll) => Order::DetachAll,
            Some(Mode::Detach) => Order::Detach(self.devices()?),
            Some(Mode::Remove) => Order::Remove(self.devices()?),
            Some(Mode::SetCapacity) => Order::SetCapacity(self.device()?),
            Some(Mode::Find) => self.find()?,
            None if self.list && self.operands.len() == 0 => Order::Show(Which::All, Shape::Lines),
            None if self.operands.len() == 1 => self.one_device()?,
            None => {
                self.attach.device = Some(self.device()?);
                self.attach.file = self.operands.next().unwrap_or_default();
                Order::Attach(std::mem::take(&mut self.attach))
            }
        };
        self.check(&order)?;
        match order {
            Order::Show(which, _) => Ok(Order::Show(which, self.shape()?)),
            order => Ok(order),
        }
    }

    fn device(&mut self) -> Result<Device, Failure> {
        let word = self.operands.next().ok_or_else(|| Failure::new("no loop device specified"))?;
        Ok(Device::named(&word))
    }

    fn devices(&mut self) -> Result<Vec<Device>, Failure> {
        let first = self.device()?;
        Ok(std::iter::once(first).chain(self.operands.by_ref().map(|word| Device::named(&word))).collect())
    }

    fn find(&mut self) -> Result<Order, Failure> {
        let Some(file) = self.operands.next() else { return Ok(Order::FindFree) };
        if self.operands.len() > 0 {
            return Err(Failure::new("unexpected arguments"));
        }
        Ok(Order::Attach(Attach { file, ..std::mem::take(&mut self.attach) }))
    }

    fn one_device(&mut self) -> Result<Order, Failure> {
        let device = self.device()?;
        Ok(match self.direct_io {
            Some(direct_io) => {
                // It is not one of the options of a setup here.
                self.attach.direct_io = false;
                Order::SetDirectIo(device, direct_io)
            }
            None if self.has_block_size => Order::SetBlockSize(device, self.attach.block_size),
            None => Order::Show(Which::One(device), Shape::Lines),
        })
    }

    /// Refuses options that have no meaning for what is to be done.
    fn check(&self, order: &Order) -> Result<(), Failure> {
        if matches!(order, Order::Attach(_)) {
            return Ok(());
        }
        let Attach { size_limit, partition_scan, read_only, direct_io, show, .. } = self.attach;
        if size_limit > 0 || partition_scan || read_only || direct_io || show {
            return Err(Failure::new(SETUP_ONLY));
        }
        if self.has_offset && !matches!(order, Order::Show(Which::Of(..), _)) {
            return Err(Failure::new("the option --offset is not allowed in this context"));
        }
        Ok(())
    }

    fn shape(self) -> Result<Shape, Failure> {
        if !self.list {
            return Ok(Shape::Lines);
        }
        let default = if self.output_all { column::ALL.to_vec() } else { column::DEFAULT.to_vec() };
        let columns = match self.output {
            Some(list) => column::read(list.as_bytes(), default)?,
            None => default,
        };
        Ok(Shape::Table(columns, self.format))
    }
}

fn size(text: &OsStr, what: &str) -> Result<u64, Failure> {
    number::parse(text.as_bytes()).map_err(|errno: Errno| {
        let reason = Reason::from(errno).text();
        Failure::new([what.as_bytes(), b": '", text.as_bytes(), b"': ", reason.as_bytes()].concat())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Order, String> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Order::read(&words).map_err(|failure| failure.to_string())
    }

    fn device(name: &str) -> Device {
        Device::named(OsStr::new(name))
    }

    fn table(format: Format) -> Shape {
        Shape::Table(column::DEFAULT.to_vec(), format)
    }

    #[test]
    fn what_is_shown() {
        let plain = Format::default();
        for (line, which, shape) in [
            ("", Which::All, table(plain)),
            ("-a", Which::All, Shape::Lines),
            ("-l", Which::All, table(plain)),
            ("-J", Which::All, table(Format { json: true, ..plain })),
            ("--raw", Which::All, table(Format { raw: true, ..plain })),
            ("-J -a", Which::All, Shape::Lines),
            ("-nl", Which::All, table(Format { headings: false, ..plain })),
            ("-a whatever it is", Which::All, Shape::Lines),
            ("loop3", Which::One(device("/dev/loop3")), Shape::Lines),
            ("-l loop3", Which::One(device("/dev/loop3")), table(plain)),
            ("-j x -o 1K", Which::Of("x".into(), Some(1024)), Shape::Lines),
        ] {
            assert_eq!(read(line), Ok(Order::Show(which, shape)), "{line:?}");
        }
    }

    #[test]
    fn which_columns_are_shown() {
        let columns = |line| match read(line) {
            Ok(Order::Show(_, Shape::Table(columns, _))) => Ok(columns),
            Ok(other) => Err(format!("{other:?}")),
            Err(said) => Err(said),
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
    fn what_is_attached() {
        let attach = Attach { file: "x".into(), ..Attach::default() };
        assert_eq!(read("-f x"), Ok(Order::Attach(attach.clone())));
        assert_eq!(
            read("loop3 x -Pr --show more words"),
            Ok(Order::Attach(Attach {
                device: Some(device("/dev/loop3")),
                partition_scan: true,
                read_only: true,
                show: true,
                ..attach.clone()
            }))
        );
        let options = "-f x -o 1K --sizelimit 2K -b 4096 -L --loop-ref r --direct-io";
        let expected = Attach {
            offset: 1024,
            size_limit: 2048,
            block_size: 4096,
            no_overlap: true,
            reference: "r".into(),
            direct_io: true,
            ..attach
        };
        assert_eq!(read(options), Ok(Order::Attach(expected)));
    }

    #[test]
    fn what_else_is_done() {
        assert_eq!(read("-f"), Ok(Order::FindFree));
        assert_eq!(read("-d a /dev/b"), Ok(Order::Detach(vec![device("a"), device("/dev/b")])));
        assert_eq!(read("--remove a"), Ok(Order::Remove(vec![device("a")])));
        assert_eq!(read("-D extra"), Ok(Order::DetachAll));
        assert_eq!(read("-c a b"), Ok(Order::SetCapacity(device("a"))));
        assert_eq!(read("--direct-io a"), Ok(Order::SetDirectIo(device("a"), true)));
        assert_eq!(read("-b 1K --direct-io=off a"), Ok(Order::SetDirectIo(device("a"), false)));
        assert_eq!(read("-b 1K a"), Ok(Order::SetBlockSize(device("a"), 1024)));
        assert_eq!(read("-x -h"), Err("invalid option -- 'x'".to_owned()));
        assert_eq!(read("-h -x"), Ok(Order::Help));
    }

    #[test]
    fn what_does_not_go_together() {
        for line in
            ["--show -a", "-r loop3", "-P -l", "--sizelimit 1 -d loop3", "--direct-io -j x", "--show -f"]
        {
            assert_eq!(read(line), Err(SETUP_ONLY.to_owned()), "{line}");
        }
        for line in ["-o 0 -a", "-o 5 -f", "-o 0 loop3", "-o 0 -d loop3"] {
            let said = read(line).unwrap_err();
            assert_eq!(said, "the option --offset is not allowed in this context", "{line}");
        }
        for line in ["-d", "--show", "-n", "-n -J", "-o 5"] {
            assert_eq!(read(line), Err("no loop device specified".to_owned()), "{line}");
        }
        assert_eq!(read("-f x y"), Err("unexpected arguments".to_owned()));
        assert_eq!(read("-o -1 -a"), Err("failed to parse offset: '-1': Invalid argument".to_owned()));
        assert!(read("-e aes x").unwrap_err().contains("5.16, use cryptsetup(8)"));
    }
}
