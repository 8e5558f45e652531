//! Tables of text for a terminal.

use std::fmt;

/// The columns of a terminal that a table fits into.
pub const WIDTH: usize = 100;
/// Columns between two cells.
const GAP: usize = 2;
/// A name is not shortened below this.
const SHORTEST: usize = 8;

/// A table: names on the left, figures on the right.
#[derive(Clone, Debug, Default)]
pub struct TextTable {
    headings: Vec<String>,
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
enum Line {
    Group(String),
    Row(Vec<String>),
}

impl TextTable {
    /// An empty table. The first heading is that of the names.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        Self { headings: headings.iter().map(|&heading| heading.to_owned()).collect(), lines: Vec::new() }
    }

    /// Adds a line that names the rows below it.
    pub fn group(&mut self, name: impl Into<String>) {
        self.lines.push(Line::Group(name.into()));
    }

    /// Adds a row: a name, and a cell for each further heading.
    pub fn row(&mut self, name: impl Into<String>, cells: impl IntoIterator<Item = String>) {
        self.lines.push(Line::Row(std::iter::once(name.into()).chain(cells).collect()));
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<_> = self.headings.iter().map(|heading| heading.chars().count()).collect();
        for line in &self.lines {
            let Line::Row(cells) = line else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let others: usize = widths.iter().skip(1).map(|width| width + GAP).sum();
        if let Some(name) = widths.first_mut() {
            *name = (*name).min(WIDTH.saturating_sub(others).max(SHORTEST));
        }
        widths
    }
}

impl fmt::Display for TextTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        write_row(f, &self.headings, &widths)?;
        for line in &self.lines {
            match line {
                Line::Group(name) => writeln!(f, "{}", shortened(name, WIDTH))?,
                Line::Row(cells) => write_row(f, cells, &widths)?,
            }
        }
        Ok(())
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, cells: &[String], widths: &[usize]) -> fmt::Result {
    let mut line = String::new();
    for (index, (cell, &width)) in cells.iter().zip(widths).enumerate() {
        match index {
            0 => line.push_str(&format!("{:<width$}", shortened(cell, width))),
            _ => line.push_str(&format!("{:GAP$}{cell:>width$}", "")),
        }
    }
    writeln!(f, "{}", line.trim_end())
}

fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// A figure with about three digits: `0.123`, `1.23`, `12.3`, `1,234`.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size < 0.0995 => format!("{value:.3}"),
        size if size < 9.995 => format!("{value:.2}"),
        size if size < 99.95 => format!("{value:.1}"),
        _ => grouped(&format!("{value:.0}")),
    }
}

/// The same; `-` if there is none.
#[must_use]
pub fn figure_or_dash(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), figure)
}

/// Puts a comma before each group of three digits.
fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let mut text = sign.to_owned();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_on_the_left_and_figures_on_the_right() {
        let mut table = TextTable::new(&["side", "ms", "ratio"]);
        table.group("a group");
        table.row("loopd", ["12.5".to_owned(), "1.00".to_owned()]);
        table.row("l", ["1,234".to_owned(), "-".to_owned()]);
        let expected = "side      ms  ratio\na group\nloopd   12.5   1.00\nl      1,234      -\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn long_names_are_shortened_to_the_width() {
        let mut table = TextTable::new(&["side", "ms"]);
        table.group("g".repeat(200));
        table.row("ä".repeat(200), ["0.12".to_owned()]);
        for line in table.to_string().lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        assert!(table.to_string().contains("ä…  0.12"));
    }

    #[test]
    fn figures_have_three_digits() {
        let found = [0.0, 0.0123, 0.5, 9.994, 9.996, 99.94, 123.4, 1234.4, 1_234_567.0, -1234.0].map(figure);
        let expected =
            ["0.000", "0.012", "0.50", "9.99", "10.0", "99.9", "123", "1,234", "1,234,567", "-1,234"];
        assert_eq!(found, expected);
        assert_eq!(figure_or_dash(None), "-");
    }
}
