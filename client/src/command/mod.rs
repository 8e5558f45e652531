//! The verbs, one file each.

mod attach;
mod completion;
mod detach;
mod info;
mod list;
mod monitor;
mod rescan;
mod run;

use loopd_dbus::proxy::Interaction;

use crate::cli::{Cli, Global, Verb};

/// Does what the command line says; gives the exit status.
///
/// # Errors
/// It failed; [`crate::output::report`] knows the exit status.
pub async fn run(cli: &Cli) -> anyhow::Result<u8> {
    let interaction = interaction(cli.global);
    match &cli.verb {
        Verb::Attach(args) => attach::run(args, interaction).await,
        Verb::Detach(args) => detach::run(args, interaction).await,
        Verb::List(args) => list::run(args, cli.global.no_color).await,
        Verb::Info(args) => info::run(args).await,
        Verb::Rescan(args) => rescan::run(args, interaction).await,
        Verb::Run(args) => run::run(args, interaction).await,
        Verb::Monitor(args) => monitor::run(*args).await,
        Verb::Completion(args) => completion::run(*args),
    }
}

/// Without a terminal a prompt is allowed, too: a graphical agent may be there.
fn interaction(global: Global) -> Interaction {
    if global.no_ask_password { Interaction::Forbidden } else { Interaction::Allowed }
}
