//! losetup's options, read as getopt_long(3) does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use lexopt::{Arg, Parser};

use super::failure::Failure;

/// An option, named as on the command line.
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
    Value,
    /// Only behind an equals sign.
    PerhapsValue,
}

#[derive(Clone, Copy, Debug)]
struct Spec {
    name: Name,
    short: Option<char>,
    long: &'static str,
    takes: Takes,
}

const fn spec(name: Name, short: Option<char>, long: &'static str, takes: Takes) -> Spec {
    Spec { name, short, long, takes }
}

/// In the order in which getopt names those that an abbreviation may stand for.
const OPTIONS: &[Spec] = &[
    spec(Name::All, Some('a'), "all", Takes::Nothing),
    spec(Name::SetCapacity, Some('c'), "set-capacity", Takes::Nothing),
    spec(Name::Detach, Some('d'), "detach", Takes::Nothing),
    spec(Name::DetachAll, Some('D'), "detach-all", Takes::Nothing),
    spec(Name::Find, Some('f'), "find", Takes::Nothing),
    spec(Name::NoOverlap, Some('L'), "nooverlap", Takes::Nothing),
    spec(Name::Help, Some('h'), "help", Takes::Nothing),
    spec(Name::Associated, Some('j'), "associated", Takes::Value),
    spec(Name::Json, Some('J'), "json", Takes::Nothing),
    spec(Name::List, Some('l'), "list", Takes::Nothing),
    spec(Name::SectorSize, Some('b'), "sector-size", Takes::Value),
    spec(Name::NoHeadings, Some('n'), "noheadings", Takes::Nothing),
    spec(Name::Offset, Some('o'), "offset", Takes::Value),
    spec(Name::Output, Some('O'), "output", Takes::Value),
    spec(Name::OutputAll, None, "output-all", Takes::Nothing),
    spec(Name::SizeLimit, None, "sizelimit", Takes::Value),
    spec(Name::PartScan, Some('P'), "partscan", Takes::Nothing),
    spec(Name::ReadOnly, Some('r'), "read-only", Takes::Nothing),
    spec(Name::DirectIo, None, "direct-io", Takes::PerhapsValue),
    spec(Name::Raw, None, "raw", Takes::Nothing),
    spec(Name::LoopRef, None, "loop-ref", Takes::Value),
    spec(Name::Show, None, "show", Takes::Nothing),
    spec(Name::Remove, None, "remove", Takes::Nothing),
    spec(Name::Version, Some('V'), "version", Takes::Nothing),
];

/// Options of older versions, which cannot be abbreviated.
const HISTORIC: &[Spec] = &[
    spec(Name::Verbose, Some('v'), "verbose", Takes::Nothing),
    spec(Name::Cryptoloop, Some('e'), "encryption", Takes::Nothing),
    spec(Name::Cryptoloop, Some('E'), "encryption", Takes::Nothing),
    spec(Name::Cryptoloop, Some('k'), "keybits", Takes::Nothing),
    spec(Name::Cryptoloop, Some('N'), "nohashpass", Takes::Nothing),
    spec(Name::Cryptoloop, Some('p'), "pass-fd", Takes::Nothing),
];

/// Options of which only one can be given.
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
    /// As on the command line, in full.
    #[must_use]
    pub fn long(self) -> String {
        let spec = OPTIONS.iter().chain(HISTORIC).find(|spec| spec.name == self);
        format!("--{}", spec.map_or("", |spec| spec.long))
    }
}

/// A part of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// An option and its value.
    Option(Name, Option<OsString>),
    /// A device or a file.
    Operand(OsString),
}

/// Reads the words one after the other, so that what is wrong first is said first.
pub struct Words {
    parser: Parser,
    given: Vec<Name>,
}

impl Words {
    /// The words behind the program's name.
    #[must_use]
    pub fn new(words: &[OsString]) -> Self {
        let mut parser = Parser::from_args(words);
        // As for getopt, `-o=5` is the value `=5`.
        parser.set_short_equals(false);
        Self { parser, given: Vec::new() }
    }

    /// The next part.
    ///
    /// # Errors
    /// getopt would refuse it, or it does not go with one before it.
    pub fn next(&mut self) -> Result<Option<Word>, Failure> {
        let (spec, is_long) = match self.parser.next() {
            Ok(None) => return Ok(None),
            Ok(Some(Arg::Value(operand))) => return Ok(Some(Word::Operand(operand))),
            Ok(Some(Arg::Short(letter))) => (short(letter)?, false),
            Ok(Some(Arg::Long(name))) => (long(name)?, true),
            // The value of the option before this was asked for at its time.
            Err(error) => return Err(Failure::usage(error.to_string())),
        };
        let value = self.value(spec, is_long)?;
        self.exclude(spec.name)?;
        self.given.push(spec.name);
        Ok(Some(Word::Option(spec.name, value)))
    }

    fn value(&mut self, spec: Spec, is_long: bool) -> Result<Option<OsString>, Failure> {
        match spec.takes {
            Takes::Value => self.parser.value().map(Some).map_err(|_| {
                Failure::usage(match spec.short {
                    Some(letter) if !is_long => format!("option requires an argument -- '{letter}'"),
                    _ => format!("option '--{}' requires an argument", spec.long),
                })
            }),
            Takes::PerhapsValue => Ok(self.parser.optional_value()),
            // What stands behind a letter are further letters.
            Takes::Nothing if !is_long || self.parser.optional_value().is_none() => Ok(None),
            Takes::Nothing => {
                Err(Failure::usage(format!("option '--{}' doesn't allow an argument", spec.long)))
            }
        }
    }

    /// Refuses the option where one was given that it does not go with.
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

/// By its name or by the start of it.
fn long(name: &str) -> Result<Spec, Failure> {
    if let Some(spec) = OPTIONS.iter().chain(HISTORIC).find(|spec| spec.long == name) {
        return Ok(*spec);
    }
    let meant: Vec<&Spec> = OPTIONS.iter().filter(|spec| spec.long.starts_with(name)).collect();
    match meant.as_slice() {
        [] => Err(Failure::usage(format!("unrecognized option '--{name}'"))),
        [one] => Ok(**one),
        several => {
            let names: Vec<String> = several.iter().map(|spec| format!("'--{}'", spec.long)).collect();
            let names = names.join(" ");
            Err(Failure::usage(format!("option '--{name}' is ambiguous; possibilities: {names}")))
        }
    }
}

/// The options that have a meaning today, each as the help has it.
#[cfg(test)]
pub fn all() -> impl Iterator<Item = String> {
    OPTIONS.iter().map(|spec| match spec.short {
        Some(letter) => format!("-{letter}, --{}", spec.long),
        None => format!("    --{}", spec.long),
    })
}

/// A switch's value.
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

    fn read(line: &str) -> Result<Vec<Word>, String> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let mut words = Words::new(&words);
        let mut read = Vec::new();
        while let Some(word) = words.next().map_err(|failure| failure.to_string())? {
            read.push(word);
        }
        Ok(read)
    }

    fn option(name: Name, value: &str) -> Word {
        Word::Option(name, Some(value.into()))
    }

    #[test]
    fn options_and_operands_come_in_any_order() {
        let bare = |name| Word::Option(name, None);
        let operand = |word: &str| Word::Operand(word.into());
        let expected = [bare(Name::Find), bare(Name::PartScan), operand("x"), option(Name::Offset, "=5")];
        assert_eq!(read("-fP x -o=5").unwrap(), expected);
        assert_eq!(read("-o -1 -- -j").unwrap(), [option(Name::Offset, "-1"), operand("-j")]);
        assert_eq!(read("--off=1 --off 2").unwrap(), [option(Name::Offset, "1"), option(Name::Offset, "2")]);
        assert_eq!(
            read("--direct-io on --direct-io=on").unwrap(),
            [bare(Name::DirectIo), operand("on"), option(Name::DirectIo, "on")]
        );
    }

    #[test]
    fn getopts_words_for_what_is_wrong() {
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
            assert_eq!(read(line), Err(text.to_owned()), "{line}");
        }
        assert!(read("-a -a -l -l -O x -O y").is_ok());
    }

    #[test]
    fn historic_options_cannot_be_abbreviated() {
        assert_eq!(read("-v --verbose").unwrap().len(), 2);
        assert_eq!(read("--verb"), Err("unrecognized option '--verb'".to_owned()));
        assert_eq!(read("--pass-fd").unwrap(), [Word::Option(Name::Cryptoloop, None)]);
    }
}
