//! The log: to the journal, with fields, where it listens, else to standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging. `LOOPD_LOG` sets the level (`info` by default).
pub fn start() {
    let wanted = std::env::var("LOOPD_LOG").ok().and_then(|level| level.parse::<Targets>().ok());
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let registry = tracing_subscriber::registry().with(filter);
    // systemd.exec(5): set where standard error goes to the journal anyhow.
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        // Without a prefix: DEVICE=, DISK_SEQUENCE=, UID=, FILE=.
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
