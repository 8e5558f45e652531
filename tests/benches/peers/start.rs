//! The part `start`: from the exec of loopd to its first reply.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use loopd_dbus::names::BUS_NAME;
use loopd_tests::process::{PATIENCE, eventually};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::names::{process, table};
use crate::results::{Key, Results};
use crate::scale::Scale;
use crate::scene::Scene;
use crate::workspace::Workspace;

/// A shell that executes its arguments when a line arrives in the pipe of this name: what the process needs before
/// its exec is not measured.
const WAIT: &str = r#"read -r line <"$0"; exec "$@""#;

/// Measures several starts.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let mut scene = Scene::start(workspace, "start").await?;
    scene.daemon.terminate().await?;
    let key = Key { table: table::PROCESS, group: "start", side: process::START, column: process::VALUE };
    for _ in 0..scale.starts {
        let time = start(&mut scene).await?;
        results.add_time(key, time);
    }
    Ok(())
}

async fn start(scene: &mut Scene) -> Result<Duration> {
    let pipe = scene.directory.join("go");
    if !pipe.exists() {
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU)?;
    }
    let (connection, manager) = scene.connect().await?;
    let names = zbus::fdo::DBusProxy::new(&connection).await?;
    let mut owners = names.receive_name_owner_changed_with_args(&[(0, BUS_NAME)]).await?;
    scene.daemon = scene.spawn(&["sh", "-c", WAIT, pipe.to_str().context("UTF-8")?])?;
    let mut go = writer(&pipe).await?;
    let start = Instant::now();
    go.write_all(b"\n")?;
    drop(go);
    tokio::time::timeout(PATIENCE, owners.next()).await.context("loopd does not start")?;
    manager.version().await?;
    let time = start.elapsed();
    scene.daemon.terminate().await?;
    Ok(time)
}

/// Opens a pipe for writing when it has a reader: then the shell waits.
async fn writer(pipe: &Path) -> Result<File> {
    let mut opened = None;
    eventually("the shell waits", async || {
        match File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(pipe) {
            Ok(file) => opened = Some(file),
            Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(opened.is_some())
    })
    .await?;
    opened.context("no pipe")
}
