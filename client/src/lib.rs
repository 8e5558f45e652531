//! `loopctl`: attach, list and detach loop devices through loopd.
//!
//! The program is [`main`]. The other public modules are for the generator of the manual pages and
//! completions.

#![forbid(unsafe_code)]

mod advice;
mod bus;
pub mod cli;
mod command;
mod desktop;
mod device_node;
mod image;
mod in_use;
mod inspector;
pub mod losetup;
mod message;
mod passphrase;
mod program;
mod report;
mod show;
mod sysfs;
pub mod umount;

use std::process::ExitCode;

use clap::{ColorChoice, FromArgMatches};
use loopd_dbus::proxy::Interaction;

/// The program.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let program = arguments.next();
    if losetup::is_called(program.as_deref()) {
        let arguments: Vec<_> = arguments.collect();
        return ExitCode::from(block_on(losetup::run(&arguments, Interaction::Allowed)));
    }
    if inspector::is_called(program.as_deref()) {
        return ExitCode::from(inspector::run());
    }
    if umount::is_called(program.as_deref()) {
        let arguments: Vec<_> = arguments.collect();
        return ExitCode::from(block_on(umount::run(&arguments)));
    }
    ExitCode::from(match parse() {
        Ok(cli) => block_on(command::run(&cli)),
        Err(error) => report::report_usage(&error),
    })
}

fn parse() -> Result<cli::Cli, clap::Error> {
    let mut command = cli::command();
    // clap prints help before it returns the options; the arguments after `--` are another program's.
    if std::env::args_os().take_while(|argument| argument != "--").any(|argument| argument == "--no-color") {
        command = command.color(ColorChoice::Never);
    }
    cli::Cli::from_arg_matches(&command.try_get_matches()?)
}

/// Runs the future, which returns the exit status.
fn block_on(future: impl Future<Output = u8>) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            message::message(&format!("cannot start: {}", message::reason(&error)));
            return 1;
        }
    };
    let status = runtime.block_on(future);
    // Does not wait for a thread that is blocked in a write.
    runtime.shutdown_background();
    status
}
