//! `loopctl`: attach, list and detach loop devices through loopd.

mod agent;
mod cli;
mod command;
mod connection;
mod objects;
mod output;
mod partition;
mod size;
mod target;

use std::process::ExitCode;

use clap::{ColorChoice, FromArgMatches};

fn main() -> ExitCode {
    ExitCode::from(match parse() {
        Ok(cli) => run(&cli),
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

fn run(cli: &cli::Cli) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::message(&format!("cannot start: {}", output::reason(&error)));
            return 1;
        }
    };
    let result = runtime.block_on(command::run(cli));
    // A thread that hangs in a write is left behind.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| output::report(&error))
}
