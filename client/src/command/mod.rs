//! The verbs, one file each.

pub mod attach;
mod completion;
pub mod detach;
mod info;
mod list;
mod monitor;
mod mount;
mod rescan;
mod resize;
mod run;
mod set;
pub mod unmount;

use std::ffi::OsStr;

use loopd_dbus::proxy::{Attachment, Interaction};

use crate::agent::with_agent;
use crate::cli::{Cli, Global, Verb};
use crate::target::Target;
use crate::{connection, losetup};

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
        Verb::Mount(args) => mount::run(args, interaction).await,
        Verb::Unmount(args) => unmount::run(args, interaction).await,
        Verb::Resize(args) => resize::run(args, interaction).await,
        Verb::Set(args) => set::run(args, interaction).await,
        Verb::Rescan(args) => rescan::run(args, interaction).await,
        Verb::Run(args) => run::run(args, interaction).await,
        Verb::Monitor(args) => monitor::run(*args).await,
        Verb::Losetup(args) => Ok(losetup::run(&args.words, interaction).await),
        Verb::Completion(args) => completion::run(*args),
    }
}

/// Without a terminal a prompt is allowed, too: a graphical agent may be there.
fn interaction(global: Global) -> Interaction {
    if global.no_ask_password { Interaction::Forbidden } else { Interaction::Allowed }
}

/// Makes the change to each device that the word stands for; one that fails does not stop the
/// others.
async fn change_each(
    word: &OsStr,
    interaction: Interaction,
    change: impl AsyncFn(&Attachment) -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let bus = connection::open(interaction).await?;
    let found = Target::resolve(word).find(&bus.manager).await?;
    with_agent(interaction, async {
        if let [one] = found.as_slice() {
            return change(&bus.attachment(&one.path).await?).await.map(|()| 0);
        }
        let mut results = Vec::new();
        for one in &found {
            results.push(change(&bus.attachment(&one.path).await?).await);
        }
        Ok(detach::status(&results))
    })
    .await
}
