//! `loopctl completion`.

use crate::{cli, output};

/// Prints the script.
pub fn run(args: cli::Completion) -> anyhow::Result<u8> {
    // By way of a buffer: the generator panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::command(), "loopctl", &mut script);
    output::print(&String::from_utf8(script)?)?;
    Ok(0)
}
