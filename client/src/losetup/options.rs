//! losetup's options, parsed as getopt_long(3) does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use lexopt::{Arg, Parser};

use super::failure::Failure;

/// An option by its long name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    All,
    SetCapacity,
    Detach,
    DetachAll,
    Find,
    NoOverlap,
    Help,
    Associated,
    Json,
    List,
    SectorSize,
    NoHeadings,
    Offset,
    Output,
    OutputAll,
    SizeLimit,
    PartScan,
    ReadOnly,
    DirectIo,
    Raw,
    LoopRef,
    Show,
    Remove,
    Version,
    Verbose,
    Cryptoloop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// A value, with its name in the help.
    Value(&'static str),
    /// A value only after an equals sign, with its name in the help.
    OptionalValue(&'static str),
}

#[derive(Clone, Copy, Debug)]
struct Spec {
    name: Name,
    short: Option<char>,
    long: &'static str,
    takes: Takes,
    help: &'static str,
}

const fn spec(name: Name, short: Option<char>, long: &'static str, takes: Takes, help: &'static str) -> Spec {
    Spec { name, short, long, takes, help }
}

/// In the order in which getopt lists the candidates of an ambiguous abbreviation.
const OPTIONS: &[Spec] = &[
    spec(Name::All, Some('a'), "all", Takes::Nothing, "list all loop devices in use, one per line"),
    spec(
        Name::SetCapacity,
        Some('c'),
        "set-capacity",
        Takes::Nothing,
        "re-read the size of the backing file",
    ),
    spec(
        Name::Detach,
        Some('d'),
        "detach",
        Takes::Nothing,
        "detach; a device in use is detached at its last close",
    ),
    spec(Name::DetachAll, Some('D'), "detach-all", Takes::Nothing, "detach every loop device"),
    spec(Name::Find, Some('f'), "find", Takes::Nothing, "use a free loop device"),
    spec(
        Name::NoOverlap,
        Some('L'),
        "nooverlap",
        Takes::Nothing,
        "do not attach a file twice; with -f, return the existing device",
    ),
    spec(Name::Help, Some('h'), "help", Takes::Nothing, "print a short help"),
    spec(
        Name::Associated,
        Some('j'),
        "associated",
        Takes::Value("FILE"),
        "list the loop devices that FILE is attached to",
    ),
    spec(Name::Json, Some('J'), "json", Takes::Nothing, "print JSON"),
    spec(Name::List, Some('l'), "list", Takes::Nothing, "list them as a table; this is the default"),
    spec(
        Name::SectorSize,
        Some('b'),
        "sector-size",
        Takes::Value("N"),
        "logical block size; without FILE, change it",
    ),
    spec(Name::NoHeadings, Some('n'), "noheadings", Takes::Nothing, "print no header"),
    spec(Name::Offset, Some('o'), "offset", Takes::Value("N"), "start at offset N in the file"),
    spec(
        Name::Output,
        Some('O'),
        "output",
        Takes::Value("COLUMN,..."),
        "columns of the table; with a leading +, in addition to the default ones",
    ),
    spec(Name::OutputAll, None, "output-all", Takes::Nothing, "all columns"),
    spec(Name::SizeLimit, None, "sizelimit", Takes::Value("N"), "use at most N bytes of it"),
    spec(Name::PartScan, Some('P'), "partscan", Takes::Nothing, "create partition nodes"),
    spec(Name::ReadOnly, Some('r'), "read-only", Takes::Nothing, "make the device read-only"),
    spec(
        Name::DirectIo,
        None,
        "direct-io",
        Takes::OptionalValue("on|off"),
        "bypass the page cache of the file; without FILE, change it",
    ),
    spec(Name::Raw, None, "raw", Takes::Nothing, "no alignment, spaces escaped"),
    spec(Name::LoopRef, None, "loop-ref", Takes::Value("TEXT"), "reference; the default is the file's path"),
    spec(Name::Show, None, "show", Takes::Nothing, "print the device"),
    spec(Name::Remove, None, "remove", Takes::Nothing, "remove the nodes of free loop devices"),
    spec(Name::Version, Some('V'), "version", Takes::Nothing, "print the version"),
];

/// Options of older versions, which cannot be abbreviated.
const HISTORIC: &[Spec] = &[
    spec(Name::Verbose, Some('v'), "verbose", Takes::Nothing, "accepted, no effect"),
    spec(Name::Cryptoloop, Some('e'), "encryption", Takes::Nothing, ""),
    spec(Name::Cryptoloop, Some('E'), "encryption", Takes::Nothing, ""),
    spec(Name::Cryptoloop, Some('k'), "keybits", Takes::Nothing, ""),
    spec(Name::Cryptoloop, Some('N'), "nohashpass", Takes::Nothing, ""),
    spec(Name::Cryptoloop, Some('p'), "pass-fd", Takes::Nothing, ""),
];

/// Mutually exclusive options.
const EXCLUSIVE: &[&[Name]] = &[
    &[
        Name::DetachAll,
        Name::All,
        Name::SetCapacity,
        Name::Detach,
        Name::Find,
        Name::Associated,
        Name::Remove,
    ],
    &[Name::DetachAll, Name::SetCapacity, Name::Detach, Name::Find, Name::List, Name::Remove],
    &[Name::DetachAll, Name::Output, Name::SetCapacity, Name::Detach, Name::Find, Name::Remove],
    &[Name::Json, Name::Raw],
];

impl Name {
    fn spec(self) -> Option<&'static Spec> {
        OPTIONS.iter().chain(HISTORIC).find(|spec| spec.name == self)
    }

    /// The long option, with its dashes.
    #[must_use]
    pub fn long(self) -> String {
        format!("--{}", self.spec().map_or("", |spec| spec.long))
    }

    /// The option in the form of the help, and what it does.
    #[must_use]
    pub fn usage(self) -> (String, &'static str) {
        let Some(spec) = self.spec() else { return (String::new(), "") };
        let short = spec.short.map_or("    ".to_owned(), |letter| format!("-{letter}, "));
        let value = match spec.takes {
            Takes::Nothing => String::new(),
            Takes::Value(name) => format!(" {name}"),
            Takes::OptionalValue(name) => format!("[={name}]"),
        };
        (format!("{short}--{}{value}", spec.long), spec.help)
    }
}

/// A parsed argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// An option and its value.
    Option(Name, Option<OsString>),
    /// A device or a file.
    Operand(OsString),
}

/// Parses the arguments one after the other, so that the first error is reported.
pub struct Arguments {
    parser: Parser,
    given: Vec<Name>,
}

impl Arguments {
    /// A parser of the arguments after the program's name.
    #[must_use]
    pub fn new(arguments: &[OsString]) -> Self {
        let mut parser = Parser::from_args(arguments);
        // As for getopt, `-o=5` is the value `=5`.
        parser.set_short_equals(false);
        Self { parser, given: Vec::new() }
    }

    /// The next argument; `None` at the end.
    ///
    /// # Errors
    /// getopt rejects it, or it conflicts with an earlier option.
    pub fn next(&mut self) -> Result<Option<Argument>, Failure> {
        let (spec, is_long) = match self.parser.next() {
            Ok(None) => return Ok(None),
            Ok(Some(Arg::Value(operand))) => return Ok(Some(Argument::Operand(operand))),
            Ok(Some(Arg::Short(letter))) => (short(letter)?, false),
            Ok(Some(Arg::Long(name))) => (long(name)?, true),
            // lexopt fails here only for an unused value, and values are always taken.
            Err(error) => return Err(Failure::usage(error.to_string())),
        };
        let value = self.value(spec, is_long)?;
        self.exclude(spec.name)?;
        self.given.push(spec.name);
        Ok(Some(Argument::Option(spec.name, value)))
    }

    fn value(&mut self, spec: Spec, is_long: bool) -> Result<Option<OsString>, Failure> {
        match spec.takes {
            Takes::Value(_) => self.parser.value().map(Some).map_err(|_| {
                Failure::usage(match spec.short {
                    Some(letter) if !is_long => format!("option requires an argument -- '{letter}'"),
                    _ => format!("option '--{}' requires an argument", spec.long),
                })
            }),
            Takes::OptionalValue(_) => Ok(self.parser.optional_value()),
            // More letters may follow a short option.
            Takes::Nothing if !is_long || self.parser.optional_value().is_none() => Ok(None),
            Takes::Nothing => {
                Err(Failure::usage(format!("option '--{}' doesn't allow an argument", spec.long)))
            }
        }
    }

    /// Rejects an option that conflicts with an earlier one.
    fn exclude(&self, name: Name) -> Result<(), Failure> {
        for group in EXCLUSIVE.iter().filter(|group| group.contains(&name)) {
            let other = self.given.iter().find(|given| **given != name && group.contains(given));
            if let Some(other) = other {
                let text = format!("options {} and {} cannot be combined", other.long(), name.long());
                return Err(Failure::new(text));
            }
        }
        Ok(())
    }
}

fn short(letter: char) -> Result<Spec, Failure> {
    let spec = OPTIONS.iter().chain(HISTORIC).find(|spec| spec.short == Some(letter));
    spec.copied().ok_or_else(|| Failure::usage(format!("invalid option -- '{letter}'")))
}

/// Finds an option by its name or an unambiguous abbreviation.
fn long(name: &str) -> Result<Spec, Failure> {
    if let Some(spec) = OPTIONS.iter().chain(HISTORIC).find(|spec| spec.long == name) {
        return Ok(*spec);
    }
    let candidates: Vec<&Spec> = OPTIONS.iter().filter(|spec| spec.long.starts_with(name)).collect();
    match candidates.as_slice() {
        [] => Err(Failure::usage(format!("unrecognized option '--{name}'"))),
        [one] => Ok(**one),
        several => {
            let names: Vec<String> = several.iter().map(|spec| format!("'--{}'", spec.long)).collect();
            let names = names.join(" ");
            Err(Failure::usage(format!("option '--{name}' is ambiguous; possibilities: {names}")))
        }
    }
}

/// The options of the current losetup.
#[cfg(test)]
pub fn all() -> impl Iterator<Item = Name> {
    OPTIONS.iter().map(|spec| spec.name)
}

/// Parses the value of `--direct-io`.
///
/// # Errors
/// It is neither `on` nor `off`.
pub fn switch(value: Option<&OsStr>) -> Result<bool, Failure> {
    match value.map(OsStr::as_bytes) {
        None | Some(b"on") => Ok(true),
        Some(b"off") => Ok(false),
        Some(other) => Err(Failure::new([b"unsupported argument: ", other].concat())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Vec<Argument>, String> {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let mut arguments = Arguments::new(&arguments);
        let mut parsed = Vec::new();
        while let Some(argument) = arguments.next().map_err(|failure| failure.to_string())? {
            parsed.push(argument);
        }
        Ok(parsed)
    }

    fn option(name: Name, value: &str) -> Argument {
        Argument::Option(name, Some(value.into()))
    }

    #[test]
    fn options_and_operands_are_accepted_in_any_order() {
        let bare = |name| Argument::Option(name, None);
        let operand = |text: &str| Argument::Operand(text.into());
        let expected = [bare(Name::Find), bare(Name::PartScan), operand("x"), option(Name::Offset, "=5")];
        assert_eq!(parse("-fP x -o=5").unwrap(), expected);
        assert_eq!(parse("-o -1 -- -j").unwrap(), [option(Name::Offset, "-1"), operand("-j")]);
        assert_eq!(parse("--off=1 --off 2").unwrap(), [option(Name::Offset, "1"), option(Name::Offset, "2")]);
        assert_eq!(
            parse("--direct-io on --direct-io=on").unwrap(),
            [bare(Name::DirectIo), operand("on"), option(Name::DirectIo, "on")]
        );
    }

    #[test]
    fn errors_are_those_of_getopt() {
        for (line, text) in [
            ("-x", "invalid option -- 'x'"),
            ("-d/dev/loop3", "invalid option -- '/'"),
            ("--foo", "unrecognized option '--foo'"),
            ("--l", "option '--l' is ambiguous; possibilities: '--list' '--loop-ref'"),
            ("-o", "option requires an argument -- 'o'"),
            ("--off", "option '--offset' requires an argument"),
            ("--all=3", "option '--all' doesn't allow an argument"),
            ("-a -d", "options --all and --detach cannot be combined"),
            ("-O x -D", "options --output and --detach-all cannot be combined"),
            ("--raw -J", "options --raw and --json cannot be combined"),
        ] {
            assert_eq!(parse(line), Err(text.to_owned()), "{line}");
        }
        assert!(parse("-a -a -l -l -O x -O y").is_ok());
    }

    #[test]
    fn historic_options_cannot_be_abbreviated() {
        assert_eq!(parse("-v --verbose").unwrap().len(), 2);
        assert_eq!(parse("--verb"), Err("unrecognized option '--verb'".to_owned()));
        assert_eq!(parse("--pass-fd").unwrap(), [Argument::Option(Name::Cryptoloop, None)]);
    }
}
