//! loopd: attaches files to loop devices for unprivileged users.
//!
//! `docs/architecture.md` names the tasks of the daemon and what each waits for.

#![forbid(unsafe_code)]
#![cfg_attr(feature = "simulate", expect(dead_code, unused_imports, reason = "items that only Linux needs"))]

mod arguments;
mod bus;
mod config;
mod daemon;
mod exit;
mod idle;
mod lock;
mod log;
mod mount;
mod platform;
mod reload;
mod shutdown;
mod startup;
mod store;
mod systemd;
mod unlock;
mod watchdog;

use std::process::ExitCode;
use std::time::Duration;

use tracing::error;

use arguments::Arguments;
use exit::{Exit, Failure};

/// The limit of threads that block in the kernel. Those of all users other than root are limited to fewer than
/// 700 (calls in progress, background work, lookups in the user database): the rest is for root and the daemon.
const MAX_THREADS: usize = 1024;

fn main() -> ExitCode {
    match arguments::read(std::env::args_os().skip(1)) {
        Arguments::Run(configuration) => run(configuration),
        Arguments::Check(configuration) => print(configuration.check()),
        Arguments::Print(text) => print(Ok(text)),
        Arguments::Invalid(message) => {
            eprintln!("loopd: {message}");
            ExitCode::from(2)
        }
    }
}

fn print(result: Result<String, String>) -> ExitCode {
    match result {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(configuration: config::Source) -> ExitCode {
    log::start();
    match run_to_exit(configuration) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            error!("{}", failure.message());
            failure.exit_code()
        }
    }
}

fn run_to_exit(configuration: config::Source) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_THREADS)
        // The threads only run system calls: small stacks, and they end soon after a burst.
        .thread_stack_size(256 * 1024)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(daemon::run(configuration));
    // Do not wait for threads: one may hang in an ioctl on a file that hangs.
    runtime.shutdown_background();
    result
}
