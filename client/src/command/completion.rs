//! `loopctl completion`.

use crate::cli;
use crate::show::stdout::print;

/// Prints the completion script.
pub fn run(args: cli::Completion) -> anyhow::Result<u8> {
    // Through a buffer: the generator panics if a write fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::command(), "loopctl", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(0)
}
