//! The commands, one file each.

mod attach;
mod change;
mod completion;
mod create;
mod detach;
mod info;
mod list;
mod lock;
mod monitor;
mod mount;
mod release;
mod rescan;
mod resize;
mod run;
mod set;
mod unlock;
mod unmount;

use loopd_dbus::proxy::Interaction;

use crate::advice::Operation;
use crate::cli::{Cli, Global, Verb};
use crate::losetup;
use crate::report::report;

/// Runs the command; returns the exit status.
pub async fn run(cli: &Cli) -> u8 {
    let interaction = interaction(cli.global);
    let result = match &cli.verb {
        Verb::Attach(args) => attach::run(args, interaction).await,
        Verb::Detach(args) => detach::run(args, interaction).await,
        Verb::List(args) => list::run(args, cli.global.no_color).await,
        Verb::Info(args) => info::run(args).await,
        Verb::Mount(args) => mount::run(args, interaction).await,
        Verb::Unmount(args) => unmount::run(args, interaction).await,
        Verb::Unlock(args) => unlock::run(args, interaction).await,
        Verb::Lock(args) => lock::run(args, interaction).await,
        Verb::Create(args) => create::run(args, interaction).await,
        Verb::Resize(args) => resize::run(args, interaction).await,
        Verb::Set(args) => set::run(args, interaction).await,
        Verb::Rescan(args) => rescan::run(args, interaction).await,
        Verb::Run(args) => run::run(args, interaction).await,
        Verb::Monitor(args) => monitor::run(*args).await,
        Verb::Losetup(args) => Ok(losetup::run(&args.arguments, interaction).await),
        Verb::Completion(args) => completion::run(*args),
    };
    result.unwrap_or_else(|error| report(&error, operation(&cli.verb)))
}

fn operation(verb: &Verb) -> Operation {
    match verb {
        Verb::Attach(_) | Verb::Run(_) => Operation::Attach,
        Verb::Mount(_) => Operation::Mount,
        Verb::Unlock(_) => Operation::Unlock,
        _ => Operation::Other,
    }
}

/// Prompts are allowed even without a terminal: there may be a graphical agent.
fn interaction(global: Global) -> Interaction {
    if global.no_ask_password { Interaction::Forbidden } else { Interaction::Allowed }
}
