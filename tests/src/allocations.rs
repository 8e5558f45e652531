//! The allocations of a daemon, counted by a library that is loaded before it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::fixture::Fixture;
use crate::process::{eventually, needs};

/// How long the counts must stay the same before the daemon is called quiet.
const QUIET: Duration = Duration::from_millis(100);

/// What a process has allocated since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Calls of malloc, realloc and the like.
    pub allocations: i64,
    /// Bytes that are held now, rounded up by the allocator.
    pub held: i64,
}

/// The counts of a running daemon.
#[derive(Debug)]
pub struct Allocations {
    counts: PathBuf,
}

impl Allocations {
    /// Starts the daemon again, with the library. It logs as much as a packaged one.
    ///
    /// # Errors
    /// There is no C compiler (the test is skipped), or the daemon does not start.
    pub async fn start(fixture: &mut Fixture) -> Result<Self> {
        let library = build(&fixture.directory)?;
        let counts = fixture.directory.join("allocations");
        let environment = [
            ("LD_PRELOAD", library.to_str().context("no UTF-8")?),
            ("ALLOCATIONS", counts.to_str().context("no UTF-8")?),
            ("LOOPD_LOG", "info"),
        ];
        fixture.restart_daemon(&environment).await?;
        Ok(Self { counts })
    }

    /// The counts, when the daemon has nothing left to do.
    ///
    /// # Errors
    /// It does not come to rest.
    pub async fn at_rest(&self) -> Result<Counts> {
        let mut counts = self.read()?;
        eventually("loopd allocates nothing", async || {
            tokio::time::sleep(QUIET).await;
            let before = std::mem::replace(&mut counts, self.read()?);
            Ok(before == counts)
        })
        .await?;
        Ok(counts)
    }

    fn read(&self) -> Result<Counts> {
        let bytes = std::fs::read(&self.counts)?;
        let (numbers, _) = bytes.as_chunks();
        let [allocations, held] = *numbers else { anyhow::bail!("loopd has not loaded the library") };
        Ok(Counts { allocations: i64::from_ne_bytes(allocations), held: i64::from_ne_bytes(held) })
    }
}

/// Compiles the library into a directory.
fn build(directory: &Path) -> Result<PathBuf> {
    needs("cc")?;
    let (source, library) = (directory.join("allocations.c"), directory.join("allocations.so"));
    std::fs::write(&source, include_str!("allocations.c"))?;
    let mut compile = Command::new("cc");
    let output = compile.args(["-O2", "-shared", "-fPIC", "-o"]).args([&library, &source]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}
