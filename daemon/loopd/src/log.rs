//! Logging: to the journal with fields if standard error is connected to it, else to standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging. `LOOPD_LOG` sets the level (`info` by default).
pub fn start() {
    let given = std::env::var("LOOPD_LOG").ok().and_then(|level| level.parse::<Targets>().ok());
    let filter = given.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(without_spans_of_zbus(filter));
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

/// zbus formats every message for a span at the level info: only a log of more than that has them.
fn without_spans_of_zbus(filter: Targets) -> Targets {
    match filter.default_level() {
        Some(level) if level > LevelFilter::INFO => filter,
        _ => filter.with_target("zbus", LevelFilter::WARN),
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn spans_of_zbus_are_left_out_unless_more_is_logged() {
        for (text, expected) in [("info", false), ("warn", false), ("debug", true), ("trace", true)] {
            let filter = without_spans_of_zbus(text.parse().unwrap());
            assert_eq!(filter.would_enable("zbus::object_server", &Level::INFO), expected, "{text}");
            assert_eq!(filter.would_enable("loopd", &Level::INFO), text != "warn", "{text}");
        }
    }
}
