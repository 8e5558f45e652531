//! `umount.loopd`: umount(8) calls it for a user who is not root, where a mount has `uhelper=loopd`
//! among its options.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Context;
use lexopt::{Arg, Parser};
use loopd_dbus::proxy::Interaction;
use loopd_dbus::{Error, ErrorKind, UnmountOptions};

use crate::agent::{Interrupted, with_agent};
use crate::command::unmount::{self, InUse, explanation};
use crate::connection;
use crate::output::{escaped, printable};

/// The name under which loopctl is umount's helper.
const NAME: &str = "umount.loopd";

/// How it is called.
pub const SYNOPSIS: &str = "umount.loopd [OPTION]... DIR|DEVICE";

/// The options, with what they mean.
pub const OPTIONS: &[(&str, &str)] = &[
    ("-l", "Take the file system from the tree at once, and unmount it with its last user."),
    ("-v", "Say what was unmounted."),
    ("-f", "Nothing: a loop device waits for no server."),
    ("-n", "Nothing: loopd writes no mtab."),
    ("-r", "Nothing: a file system that is in use stays as it is."),
    ("-t TYPE", "Nothing: the kernel knows the type."),
    ("-N NAMESPACE", "Refused: loopd's mounts are those of the host's namespace."),
];

/// umount's exit statuses, as far as they occur here.
pub const STATUSES: &[(u8, &str)] = &[
    (0, "It is unmounted."),
    (WRONG, "The arguments are wrong, or the user may not do it."),
    (NO_SYSTEM, "The system bus cannot be reached."),
    (INTERRUPTED, "The user interrupted it."),
    (FAILED, "It could not be unmounted."),
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

/// Does what the words behind the program's name say; gives the exit status.
pub async fn run(words: &[OsString]) -> u8 {
    let order = match Words::read(words) {
        Ok(order) => order,
        Err(error) => {
            say(&[format!("{error:#}; it is called as {SYNOPSIS}")]);
            return WRONG;
        }
    };
    match unmount(&order).await {
        Ok(()) => {
            if order.is_verbose {
                say(&[format!("{} unmounted", printable(order.target.as_os_str().as_encoded_bytes()))]);
            }
            0
        }
        Err(error) => {
            say(&explanation(&error));
            status(&error)
        }
    }
}

async fn unmount(words: &Words) -> anyhow::Result<()> {
    let bus = connection::open(Interaction::Allowed).await.context(Unreachable)?;
    let options = UnmountOptions { lazy: words.is_lazy };
    with_agent(bus.interaction, async {
        let orders = unmount::find(&bus, words.target.as_os_str()).await?;
        for order in &orders {
            unmount::carry_out(&bus, order, options).await?;
        }
        Ok(())
    })
    .await
}

/// The bus could not be reached.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cannot ask loopd")]
struct Unreachable;

fn status(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        return INTERRUPTED;
    }
    if error.is::<Unreachable>() {
        return NO_SYSTEM;
    }
    let contract =
        error.downcast_ref::<Error>().or(error.downcast_ref::<InUse>().map(|in_use| &in_use.error));
    match contract.map(|error| error.kind) {
        Some(
            ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired | ErrorKind::InvalidArgs,
        ) => WRONG,
        _ => FAILED,
    }
}

fn say(lines: &[String]) {
    for line in lines {
        eprintln!("{NAME}: {}", escaped(line.as_bytes()));
    }
}

/// What the words say.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Words {
    target: PathBuf,
    is_lazy: bool,
    is_verbose: bool,
}

impl Words {
    fn read(words: &[OsString]) -> anyhow::Result<Self> {
        let mut parser = Parser::from_args(words);
        let (mut target, mut is_lazy, mut is_verbose) = (None, false, false);
        while let Some(word) = parser.next()? {
            match word {
                Arg::Short('l') => is_lazy = true,
                Arg::Short('v') => is_verbose = true,
                Arg::Short('f' | 'n' | 'r') => {}
                Arg::Short('t') => drop(parser.value()?),
                Arg::Short('N') => anyhow::bail!("another mount namespace is out of reach"),
                Arg::Value(value) if target.is_none() => target = Some(PathBuf::from(value)),
                other => return Err(other.unexpected().into()),
            }
        }
        let target = target.context("what to unmount is missing")?;
        Ok(Self { target, is_lazy, is_verbose })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> anyhow::Result<Words> {
        Words::read(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_program_knows_its_name() {
        assert!(is_called(Some(OsStr::new("/sbin/umount.loopd"))));
        for name in ["loopctl", "umount", "umount.loopd2", "losetup"] {
            assert!(!is_called(Some(OsStr::new(name))), "{name}");
        }
    }

    #[test]
    fn umount_s_words_are_understood() {
        let plain = Words { target: "/mnt/a".into(), is_lazy: false, is_verbose: false };
        assert_eq!(read(&["/mnt/a"]).unwrap(), plain);
        assert_eq!(read(&["/mnt/a", "-n", "-f", "-r", "-t", "ext4.x"]).unwrap(), plain);
        let lazy = Words { is_lazy: true, is_verbose: true, ..plain };
        assert_eq!(read(&["/mnt/a", "-n", "-l", "-v"]).unwrap(), lazy);
        assert_eq!(read(&["-nlv", "/mnt/a"]).unwrap(), lazy);
        for wrong in [
            &[][..],
            &["-l"],
            &["/a", "/b"],
            &["/a", "-x"],
            &["/a", "--lazy"],
            &["/a", "-N", "7"],
            &["/a", "-t"],
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn statuses_are_umount_s() {
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
