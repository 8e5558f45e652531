//! The part `sizes`: the release binaries, which are built stripped.

use anyhow::{Context as _, Result};
use loopd_tests::host::built;

use crate::names::{process, table};
use crate::results::{Key, Results};

/// Reads their sizes.
pub fn measure(results: &mut Results) -> Result<()> {
    for (side, name) in
        [(process::DAEMON, "loopd"), (process::CLIENT, "loopctl"), (process::FLOOR, "loopd-floor")]
    {
        let program = built(name);
        if cfg!(debug_assertions) {
            results.skip(side, "not a release build");
            continue;
        }
        let bytes = std::fs::metadata(&program).with_context(|| program.display().to_string())?.len();
        let key = Key { table: table::PROCESS, group: "sizes", side, column: process::VALUE };
        results.add(key, "MB", bytes as f64 / 1e6);
    }
    Ok(())
}
