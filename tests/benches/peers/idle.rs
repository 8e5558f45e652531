//! The part `idle`: the system calls of a loopd that nobody uses.

use anyhow::Result;
use loopd_tests::Skipped;
use loopd_tests::strace::Strace;

use crate::names::{process, table};
use crate::results::{Key, Results};
use crate::scale::Scale;
use crate::scene::Scene;
use crate::workspace::{Workspace, quiet};

/// Counts them, with the default configuration and without a watchdog: no service manager has started loopd.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let scene = Scene::start_unconfigured(workspace, "idle").await?;
    let (connection, manager) = scene.connect().await?;
    manager.version().await?;
    connection.close().await?;
    quiet().await?;
    tokio::time::sleep(scale.rest).await;
    let strace = match Strace::attach(scene.daemon.pid(), &scene.directory).await {
        Ok(strace) => strace,
        Err(error) => {
            results.skip(process::CALLS, error.downcast::<Skipped>()?.to_string());
            return Ok(());
        }
    };
    let calls = strace
        .count(async || {
            tokio::time::sleep(scale.idle).await;
            Ok(())
        })
        .await?;
    if !calls.is_empty() {
        println!("system calls while idle: {calls:?}");
    }
    let key = Key { table: table::PROCESS, group: "idle", side: process::CALLS, column: process::VALUE };
    results.add(key, "calls", calls.values().sum::<usize>() as f64);
    Ok(())
}
