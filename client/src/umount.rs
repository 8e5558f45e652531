//! `umount.loopd`: the helper that umount(8) runs for users other than root if a mount has the option
//! `uhelper=loopd`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Context;
use lexopt::{Arg, Parser};
use loopd_dbus::proxy::Interaction;
use loopd_dbus::{ErrorKind, UnmountOptions};

use crate::bus::agent::{Interrupted, with_agent};
use crate::bus::connection::Bus;
use crate::bus::error::kind;
use crate::image::unmount;
use crate::in_use::explanation;
use crate::message::{escaped, printable};

/// The name under which loopctl is umount's helper.
const NAME: &str = "umount.loopd";

/// How it is called.
pub const SYNOPSIS: &str = "umount.loopd [OPTION]... DIR|DEVICE";

/// An option and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    letter: char,
    /// The name of its value, if it takes one.
    value: Option<&'static str>,
    effect: Effect,
    /// What it does, as a sentence.
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Lazy,
    Verbose,
    None,
    Refused(&'static str),
}

impl Flag {
    /// The option as it is written on the command line.
    #[must_use]
    pub fn usage(&self) -> String {
        match self.value {
            Some(value) => format!("-{} {value}", self.letter),
            None => format!("-{}", self.letter),
        }
    }
}

const fn flag(letter: char, value: Option<&'static str>, effect: Effect, help: &'static str) -> Flag {
    Flag { letter, value, effect, help }
}

/// The options, for the parser and the manual page.
pub const OPTIONS: &[Flag] = &[
    flag(
        'l',
        None,
        Effect::Lazy,
        "Remove the file system from the tree now, and unmount it when its last user is done.",
    ),
    flag('v', None, Effect::Verbose, "Print what was unmounted."),
    flag('f', None, Effect::None, "No effect: a loop device depends on no server."),
    flag('n', None, Effect::None, "No effect: loopd writes no mtab."),
    flag('r', None, Effect::None, "No effect: a file system that is in use is left unchanged."),
    flag('t', Some("TYPE"), Effect::None, "No effect: the kernel knows the type."),
    flag(
        'N',
        Some("NAMESPACE"),
        Effect::Refused("umount.loopd cannot unmount in another mount namespace"),
        "Not supported: loopd mounts in the host's namespace.",
    ),
];

/// The exit statuses of umount(8) that the helper uses.
pub const STATUSES: &[(u8, &str)] = &[
    (0, "The file system was unmounted."),
    (WRONG, "The arguments are invalid, or the user is not authorized."),
    (NO_SYSTEM, "The system bus cannot be reached."),
    (INTERRUPTED, "The user interrupted it."),
    (FAILED, "The unmount failed."),
];

const WRONG: u8 = 1;
const NO_SYSTEM: u8 = 2;
const INTERRUPTED: u8 = 8;
const FAILED: u8 = 32;

/// Whether the program was started under the helper's name.
#[must_use]
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()).is_some_and(|name| name == NAME)
}

/// Runs with the arguments after the program's name; returns the exit status.
pub async fn run(arguments: &[OsString]) -> u8 {
    let arguments = match Arguments::parse(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            print(&[format!("{error:#}; usage: {SYNOPSIS}")]);
            return WRONG;
        }
    };
    match unmount(&arguments).await {
        Ok(()) => {
            if arguments.is_verbose {
                let target = printable(arguments.target.as_os_str().as_encoded_bytes());
                print(&[format!("{target} unmounted")]);
            }
            0
        }
        Err(error) => {
            print(&explanation(&error));
            status(&error)
        }
    }
}

async fn unmount(arguments: &Arguments) -> anyhow::Result<()> {
    let bus = Bus::open(Interaction::Allowed).await.context(Unreachable)?;
    let options = UnmountOptions { lazy: arguments.is_lazy };
    with_agent(bus.interaction, async {
        let requests = unmount::find(&bus, arguments.target.as_os_str()).await?;
        for request in &requests {
            unmount::unmount(&bus, request, options).await?;
        }
        Ok(())
    })
    .await
}

/// The bus could not be reached.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cannot reach loopd")]
struct Unreachable;

fn status(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        return INTERRUPTED;
    }
    if error.is::<Unreachable>() {
        return NO_SYSTEM;
    }
    match kind(error) {
        Some(
            ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired | ErrorKind::InvalidArgs,
        ) => WRONG,
        _ => FAILED,
    }
}

fn print(lines: &[String]) {
    for line in lines {
        eprintln!("{NAME}: {}", escaped(line.as_bytes()));
    }
}

/// The parsed arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Arguments {
    target: PathBuf,
    is_lazy: bool,
    is_verbose: bool,
}

impl Arguments {
    fn parse(arguments: &[OsString]) -> anyhow::Result<Self> {
        let mut parser = Parser::from_args(arguments);
        let (mut target, mut is_lazy, mut is_verbose) = (None, false, false);
        while let Some(argument) = parser.next()? {
            let option = match argument {
                Arg::Short(letter) => OPTIONS.iter().find(|option| option.letter == letter),
                _ => None,
            };
            match (option, argument) {
                (Some(option), _) => {
                    match option.effect {
                        Effect::Lazy => is_lazy = true,
                        Effect::Verbose => is_verbose = true,
                        Effect::None => {}
                        Effect::Refused(reason) => anyhow::bail!(reason),
                    }
                    if option.value.is_some() {
                        parser.value()?;
                    }
                }
                (None, Arg::Value(value)) if target.is_none() => target = Some(PathBuf::from(value)),
                (None, other) => return Err(other.unexpected().into()),
            }
        }
        let target = target.context("no mount point or device specified")?;
        Ok(Self { target, is_lazy, is_verbose })
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::Error;

    use super::*;
    use crate::in_use::InUse;

    fn parse(arguments: &[&str]) -> anyhow::Result<Arguments> {
        Arguments::parse(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_program_is_recognized_by_its_name() {
        assert!(is_called(Some(OsStr::new("/sbin/umount.loopd"))));
        for name in ["loopctl", "umount", "umount.loopd2", "losetup"] {
            assert!(!is_called(Some(OsStr::new(name))), "{name}");
        }
    }

    #[test]
    fn arguments_of_umount_are_accepted() {
        let plain = Arguments { target: "/mnt/a".into(), is_lazy: false, is_verbose: false };
        assert_eq!(parse(&["/mnt/a"]).unwrap(), plain);
        assert_eq!(parse(&["/mnt/a", "-n", "-f", "-r", "-t", "ext4.x"]).unwrap(), plain);
        let lazy = Arguments { is_lazy: true, is_verbose: true, ..plain };
        assert_eq!(parse(&["/mnt/a", "-n", "-l", "-v"]).unwrap(), lazy);
        assert_eq!(parse(&["-nlv", "/mnt/a"]).unwrap(), lazy);
    }

    #[test]
    fn invalid_arguments_are_rejected() {
        for wrong in [
            &[][..],
            &["-l"],
            &["/a", "/b"],
            &["/a", "-x"],
            &["/a", "--lazy"],
            &["/a", "-N", "7"],
            &["/a", "-t"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn exit_statuses_are_those_of_umount() {
        let of = |kind| status(&Error::new(kind, "").into());
        assert_eq!(of(ErrorKind::AccessDenied), 1);
        assert_eq!(of(ErrorKind::Busy), 32);
        let in_use = InUse { error: Error::new(ErrorKind::Busy, ""), holders: Vec::new() };
        assert_eq!(status(&in_use.into()), 32);
        assert_eq!(status(&Interrupted(2).into()), 8);
        assert_eq!(status(&anyhow::anyhow!("gone").context(Unreachable)), 2);
        assert_eq!(status(&anyhow::anyhow!("not mounted")), 32);
    }
}
