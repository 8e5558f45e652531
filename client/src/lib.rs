//! `loopctl`: attach, list and detach loop devices through loopd.
//!
//! The program is one call of [`main`]; a library is around it for those who make its manual pages
//! and completions.

#![forbid(unsafe_code)]

mod agent;
pub mod cli;
mod command;
mod connection;
mod desktop;
mod holder;
pub mod losetup;
mod mount_point;
mod mount_table;
mod objects;
mod output;
mod partition;
mod size;
mod target;
mod throwaway;
pub mod umount;
mod volume;

use std::process::ExitCode;

use clap::{ColorChoice, FromArgMatches};
use loopd_dbus::proxy::Interaction;

/// The program.
pub fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let program = words.next();
    if losetup::is_called(program.as_deref()) {
        let words: Vec<_> = words.collect();
        return ExitCode::from(run(losetup::run(&words, Interaction::Allowed)));
    }
    if umount::is_called(program.as_deref()) {
        let words: Vec<_> = words.collect();
        return ExitCode::from(run(umount::run(&words)));
    }
    ExitCode::from(match parse() {
        Ok(cli) => run(async { command::run(&cli).await.unwrap_or_else(|error| output::report(&error)) }),
        Err(error) => output::report_usage(&error),
    })
}

fn parse() -> Result<cli::Cli, clap::Error> {
    let mut command = cli::command();
    // Help is printed before the options are known to us; what follows `--` is another program's.
    if std::env::args_os().take_while(|word| word != "--").any(|word| word == "--no-color") {
        command = command.color(ColorChoice::Never);
    }
    cli::Cli::from_arg_matches(&command.try_get_matches()?)
}

/// Does the work; gives the exit status.
fn run(work: impl Future<Output = u8>) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::message(&format!("cannot start: {}", output::reason(&error)));
            return 1;
        }
    };
    let status = runtime.block_on(work);
    // A thread that hangs in a write is left behind.
    runtime.shutdown_background();
    status
}
