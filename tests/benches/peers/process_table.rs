//! The table of memory, idle calls, starts and sizes.

use loopd_tests::report::text_table::{TextTable, figure_or_dash};

use crate::names::{process, table};
use crate::results::{Key, Results};

/// Medians and 95th percentiles, if there is more than one value.
pub fn table(results: &Results) -> TextTable {
    let mut table = TextTable::new(&["the daemon", "median", "p95", "unit", "values"]);
    for group in results.groups(table::PROCESS) {
        for side in results.sides(table::PROCESS, group) {
            let key = Key { table: table::PROCESS, group, side, column: process::VALUE };
            let Some(samples) = results.samples(key) else { continue };
            let high = (samples.count() > 1).then(|| samples.percentile(95)).flatten();
            let cells = [
                figure_or_dash(samples.median()),
                figure_or_dash(high),
                results.unit(key).to_owned(),
                samples.count().to_string(),
            ];
            table.row(format!("  {side}"), cells);
        }
    }
    table
}
