//! What a run has measured.

use std::collections::BTreeMap;
use std::time::Duration;

use loopd_tests::report::goal::Goal;
use loopd_tests::report::statistics::{Samples, milliseconds};
use serde_json::{Value, json};

/// The place of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub table: &'static str,
    pub group: &'static str,
    pub side: &'static str,
    pub column: &'static str,
}

/// Milliseconds.
pub const MS: &str = "ms";

#[derive(Debug)]
struct Entry {
    key: Key,
    unit: &'static str,
    samples: Samples,
}

/// The figures, in the order in which they were first added.
#[derive(Debug, Default)]
pub struct Results {
    entries: Vec<Entry>,
    index: BTreeMap<Key, usize>,
    skipped: Vec<(String, String)>,
    parts: Vec<(&'static str, Duration)>,
}

impl Results {
    /// Adds a value to a figure.
    pub fn add(&mut self, key: Key, unit: &'static str, value: f64) {
        let index = *self.index.entry(key).or_insert_with(|| {
            self.entries.push(Entry { key, unit, samples: Samples::default() });
            self.entries.len() - 1
        });
        self.entries[index].samples.add(value);
    }

    /// Adds a duration to a figure in milliseconds.
    pub fn add_time(&mut self, key: Key, time: Duration) {
        self.add(key, MS, milliseconds(time));
    }

    /// The values of a figure.
    pub fn samples(&self, key: Key) -> Option<&Samples> {
        Some(&self.entries[*self.index.get(&key)?].samples)
    }

    /// The median of a figure.
    pub fn median(&self, key: Key) -> Option<f64> {
        self.samples(key)?.median()
    }

    /// The unit of a figure.
    pub fn unit(&self, key: Key) -> &'static str {
        self.index.get(&key).map_or("", |&index| self.entries[index].unit)
    }

    /// The groups of a table.
    pub fn groups(&self, table: &str) -> Vec<&'static str> {
        self.distinct(|key| (key.table == table).then_some(key.group))
    }

    /// The sides in a group.
    pub fn sides(&self, table: &str, group: &str) -> Vec<&'static str> {
        self.distinct(|key| (key.table == table && key.group == group).then_some(key.side))
    }

    /// The columns of a table.
    pub fn columns(&self, table: &str) -> Vec<&'static str> {
        self.distinct(|key| (key.table == table).then_some(key.column))
    }

    fn distinct(&self, name: impl Fn(&Key) -> Option<&'static str>) -> Vec<&'static str> {
        let mut names = Vec::new();
        for found in self.entries.iter().filter_map(|entry| name(&entry.key)) {
            if !names.contains(&found) {
                names.push(found);
            }
        }
        names
    }

    /// Notes that something is not measured, and prints it.
    pub fn skip(&mut self, what: impl Into<String>, why: impl Into<String>) {
        let skipped = (what.into(), why.into());
        println!("SKIPPED {}: {}", skipped.0, skipped.1);
        self.skipped.push(skipped);
    }

    /// Notes how long a part has taken.
    pub fn part(&mut self, name: &'static str, time: Duration) {
        self.parts.push((name, time));
    }

    /// How long each part has taken.
    pub fn parts(&self) -> &[(&'static str, Duration)] {
        &self.parts
    }

    /// Everything, for other programs.
    pub fn json(&self, goals: &[Goal]) -> Value {
        let figures: Vec<_> = self.entries.iter().map(Entry::json).collect();
        let skipped: Vec<_> =
            self.skipped.iter().map(|(what, why)| json!({ "what": what, "why": why })).collect();
        let parts: BTreeMap<_, _> =
            self.parts.iter().map(|(name, time)| (*name, time.as_secs_f64())).collect();
        let goals: Vec<_> = goals
            .iter()
            .map(|goal| {
                let mut value = json!(goal);
                value["verdict"] = json!(goal.verdict());
                value
            })
            .collect();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        json!({
            "kernel": kernel.trim_end(),
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "figures": figures,
            "goals": goals,
            "skipped": skipped,
            "seconds": parts,
        })
    }
}

impl Entry {
    fn json(&self) -> Value {
        let Key { table, group, side, column } = self.key;
        let samples = &self.samples;
        json!({
            "table": table, "group": group, "side": side, "column": column, "unit": self.unit,
            "count": samples.count(), "median": samples.median(), "p95": samples.percentile(95),
            "least": samples.percentile(0),
        })
    }
}
