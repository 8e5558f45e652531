//! Logging: to the journal with fields if standard error is connected to it, else to standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging. `LOOPD_LOG` sets the level (`info` by default).
pub fn start() {
    let given = std::env::var("LOOPD_LOG").ok().and_then(|level| level.parse::<Targets>().ok());
    let filter = given.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(filter);
    // The service manager sets JOURNAL_STREAM if standard error is connected to the journal (systemd.exec(5)).
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        // Fields without a prefix: DEVICE=, DISK_SEQUENCE=, UID=, FILE=.
        Some(journal) => registry.with(journal.with_field_prefix(None)).init(),
        None => {
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false);
            registry.with(lines).init();
        }
    }
}
