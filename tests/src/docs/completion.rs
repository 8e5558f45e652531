//! The completion scripts.

use clap_complete::Shell;

use super::Page;

/// A script for each shell, with the file name that the shell expects.
#[must_use]
pub fn scripts() -> Vec<Page> {
    let files = [(Shell::Bash, "loopctl"), (Shell::Zsh, "_loopctl"), (Shell::Fish, "loopctl.fish")];
    let script = |(shell, name): (Shell, &str)| {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut ::loopctl::cli::command(), "loopctl", &mut text);
        let text = String::from_utf8_lossy(&text).into_owned();
        Page { path: format!("docs/completion/{shell}/{name}").into(), text }
    };
    files.map(script).into()
}
