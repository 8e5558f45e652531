//! `make field`: cases that people have reported of similar tools, tried on loopd row by row. Each row prints its kind, its
//! input and the outcome. A row with another outcome than the right one is WRONG, and the program fails.

mod files;
mod machines;
mod mounts;
mod row;
mod tables;

use std::process::ExitCode;

use loopd_tests::{host, runner};

fn main() -> ExitCode {
    if let Some(why) = host::unfit() {
        println!("SKIPPED all rows: {why}");
        return ExitCode::SUCCESS;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let rows = [files::ROWS, tables::ROWS, mounts::ROWS, machines::ROWS].concat();
    let is_wanted = |row: &&row::Row| wanted.is_empty() || wanted.iter().any(|word| row.is_about(word));
    let (mut right, mut wrong, mut skipped) = (0, 0, 0);
    for row in rows.iter().filter(is_wanted) {
        let outcome = runner::run(row.test());
        let verdict = row::verdict(&outcome);
        match verdict {
            row::Verdict::Right => right += 1,
            row::Verdict::Wrong => wrong += 1,
            row::Verdict::Skipped => skipped += 1,
        }
        row.print(verdict, &outcome);
    }
    host::stop();
    println!("{right} right, {wrong} wrong, {skipped} skipped");
    ExitCode::from(u8::from(wrong > 0))
}
