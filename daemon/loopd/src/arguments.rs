//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::config;
use crate::platform::IS_SIMULATED;

/// The request on the command line.
#[derive(Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Run the daemon with this configuration.
    Run(config::Source),
    /// Check this configuration.
    Check(config::Source),
    /// Print this text.
    Print(String),
    /// The command line is invalid: print this message.
    Invalid(String),
}

const HELP: &str = "\
loopd attaches files to loop devices for unprivileged users.

Usage: loopd [--config FILE]
       loopd --check-config [FILE]
       loopd --help | --version

The service manager starts it as the system service loopd, or the message bus on
the first call; users run loopctl. SIGHUP reloads the configuration. SIGTERM stops
loopd when the calls in progress have ended; a second one stops it at once.

  --config FILE          read FILE and FILE.d/*.toml, not /etc/loopd/loopd.toml
                         and /etc/loopd/loopd.toml.d/*.toml
  --check-config [FILE]  check the configuration and print its errors

LOOPD_LOG sets the level of the log: error, warn, info, debug or trace.
";

const HELP_OF_SIMULATED: &str = "\
This build of loopd serves a simulated machine on the session bus: no loop device
is attached and nothing is mounted. It is for those who write a client.

Usage: loopd --simulate
       loopd --help | --version
";

/// Reads the command line.
pub fn read(mut arguments: impl Iterator<Item = OsString>) -> Arguments {
    let Some(first) = arguments.next() else { return run(config::Source::default()) };
    let second = arguments.next();
    let rest = arguments.next();
    match (first.to_str(), second, rest) {
        (Some("-h" | "--help"), None, None) if IS_SIMULATED => Arguments::Print(HELP_OF_SIMULATED.to_owned()),
        (Some("-h" | "--help"), None, None) => Arguments::Print(HELP.to_owned()),
        (Some("-V" | "--version"), None, None) => {
            Arguments::Print(format!("loopd {}\n", env!("CARGO_PKG_VERSION")))
        }
        (Some("--config"), Some(file), None) => run(named(file)),
        (Some("--check-config"), file, None) => Arguments::Check(file.map(named).unwrap_or_default()),
        (Some("--simulate"), None, None) if IS_SIMULATED => Arguments::Run(config::Source::default()),
        (Some("--simulate"), None, None) => {
            Arguments::Invalid("this build cannot simulate; build loopd with --features simulate".to_owned())
        }
        (Some("--config"), None, None) => {
            Arguments::Invalid("--config needs a file; loopd --help".to_owned())
        }
        (_, second, rest) => {
            let unknown = rest.or(second).filter(|_| is_option(&first)).unwrap_or(first);
            Arguments::Invalid(format!("unexpected argument {}; loopd --help", unknown.display()))
        }
    }
}

/// A build with the feature `simulate` only simulates, so that it is never mistaken for the daemon.
fn run(configuration: config::Source) -> Arguments {
    if IS_SIMULATED {
        return Arguments::Invalid("this build only simulates; loopd --simulate".to_owned());
    }
    Arguments::Run(configuration)
}

fn named(file: OsString) -> config::Source {
    config::Source::named(PathBuf::from(file))
}

fn is_option(argument: &OsString) -> bool {
    let options = ["-h", "--help", "-V", "--version", "--config", "--check-config", "--simulate"];
    options.iter().any(|option| argument == option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_options_are_accepted_and_others_rejected() {
        let read = |arguments: &[&str]| read(arguments.iter().map(OsString::from));
        let named = |name: &str| config::Source::named(PathBuf::from(name));
        assert_eq!(read(&[]), Arguments::Run(config::Source::default()));
        assert_eq!(read(&["--config", "a"]), Arguments::Run(named("a")));
        assert_eq!(read(&["--check-config"]), Arguments::Check(config::Source::default()));
        assert_eq!(read(&["--check-config", "a"]), Arguments::Check(named("a")));
        assert!(matches!(read(&["--version"]), Arguments::Print(text) if text.starts_with("loopd ")));
        assert!(matches!(read(&["--help"]), Arguments::Print(_)));
        for (arguments, expected) in [
            (&["--nonsense"][..], "--nonsense"),
            (&["--nonsense", "a"], "--nonsense"),
            (&["--help", "me"], "me"),
            (&["--config"], "--config needs"),
            (&["--config", "a", "b"], "b"),
            (&["--check-config", "a", "b"], "b"),
        ] {
            let Arguments::Invalid(message) = read(arguments) else { panic!("{arguments:?} is accepted") };
            assert!(message.contains(expected), "{message}");
        }
    }
}
