//! The plot of a run.

use loopd_tests::report::plot::{Dots, Panel, Plot, Series};

use crate::names::{column, growth, table};
use crate::results::{Key, Results};

/// Attach and detach of each side, growth, and reading and writing; what was not measured is left out.
pub fn of(results: &Results) -> Plot {
    let mut panels: Vec<_> =
        results.groups(table::ATTACH).into_iter().map(|group| sides(results, group)).collect();
    let reactions = [growth::REPLY, growth::PROCESSED, growth::DETACH];
    let totals = [growth::END, growth::LIST, growth::OBJECTS];
    for (title, groups) in [("One more device", reactions), ("All devices", totals)] {
        panels.extend(grown(results, title, &groups));
    }
    panels.extend(results.groups(table::DIRECT_IO).into_iter().map(|group| throughput(results, group)));
    Plot { title: "loopd and its peers".to_owned(), panels }
}

fn dots(results: &Results, key: Key) -> Option<(f64, f64)> {
    let samples = results.samples(key)?;
    samples.median().zip(samples.percentile(95))
}

fn sides(results: &Results, group: &'static str) -> Panel {
    let columns = [column::ATTACH, column::DETACH];
    let row = |side: &'static str| Dots {
        label: side.to_owned(),
        values: columns
            .map(|column| dots(results, Key { table: table::ATTACH, group, side, column }))
            .to_vec(),
    };
    Panel::Dots {
        title: capitalized(group),
        unit: "ms".to_owned(),
        series: columns.map(str::to_owned).to_vec(),
        rows: results.sides(table::ATTACH, group).into_iter().map(row).collect(),
    }
}

fn grown(results: &Results, title: &str, groups: &[&'static str]) -> Option<Panel> {
    let columns = results.columns(table::GROWTH);
    let mut series = Vec::new();
    for &group in groups {
        for side in results.sides(table::GROWTH, group) {
            let point = |&column: &&'static str| {
                let held = column.replace(',', "").parse().ok()?;
                Some((held, results.median(Key { table: table::GROWTH, group, side, column })?))
            };
            let subject = group.split([',', ';']).next().unwrap_or(group);
            let waits = if group == growth::PROCESSED { " and udev" } else { "" };
            let name = format!("{subject}{waits}, {}", side.split(',').next().unwrap_or(side));
            series.push(Series { name, points: columns.iter().filter_map(point).collect() });
        }
    }
    let across = "devices held".to_owned();
    (!series.is_empty()).then(|| Panel::Lines {
        title: title.to_owned(),
        across,
        unit: "ms".to_owned(),
        series,
    })
}

fn throughput(results: &Results, group: &'static str) -> Panel {
    let columns: Vec<_> =
        results.columns(table::DIRECT_IO).into_iter().filter(|column| column.ends_with("MB/s")).collect();
    let row = |side: &'static str| Dots {
        label: side.to_owned(),
        values: columns
            .iter()
            .map(|&column| {
                let key = Key { table: table::DIRECT_IO, group, side, column };
                results.median(key).map(|median| (median, median))
            })
            .collect(),
    };
    Panel::Dots {
        title: format!("Throughput on {group}"),
        unit: "MB/s".to_owned(),
        series: columns.iter().map(|&column| column.to_owned()).collect(),
        rows: results.sides(table::DIRECT_IO, group).into_iter().map(row).collect(),
    }
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}
