//! A goal beside the figure that was measured.

use serde::Serialize;

use super::text_table::{TextTable, figure, figure_or_dash};

/// Which figures meet a goal.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The figure must not exceed this.
    AtMost(f64),
    /// The figure must not be below this.
    AtLeast(f64),
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The figure is within the limit.
    Met,
    /// The figure is not.
    Missed,
    /// There is no figure.
    Skipped,
}

impl Verdict {
    /// The word of the table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::Skipped => "SKIPPED",
        }
    }
}

/// A goal and its figure.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// What is measured.
    pub name: String,
    /// The figure; `None` if this run has not measured it.
    pub found: Option<f64>,
    /// The limit.
    pub limit: Limit,
    /// The unit of both: `ms`, `MB`, `times` and so on.
    pub unit: &'static str,
}

impl Goal {
    /// Compares the figure with the limit.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let is_met = match (self.found, self.limit) {
            (None, _) => return Verdict::Skipped,
            (Some(found), Limit::AtMost(limit)) => found <= limit,
            (Some(found), Limit::AtLeast(limit)) => found >= limit,
        };
        if is_met { Verdict::Met } else { Verdict::Missed }
    }
}

/// The table of goals.
#[must_use]
pub fn table(goals: &[Goal]) -> TextTable {
    let mut table = TextTable::new(&["goal", "found", "limit", "unit", "verdict"]);
    for goal in goals {
        let limit = match goal.limit {
            Limit::AtMost(limit) => format!("<= {}", figure(limit)),
            Limit::AtLeast(limit) => format!(">= {}", figure(limit)),
        };
        let cells =
            [figure_or_dash(goal.found), limit, goal.unit.to_owned(), goal.verdict().word().to_owned()];
        table.row(goal.name.as_str(), cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(found: Option<f64>, limit: Limit) -> Goal {
        Goal { name: "attach".to_owned(), found, limit, unit: "ms" }
    }

    #[test]
    fn figures_at_the_limit_meet_the_goal() {
        let cases = [
            (Some(0.6), Limit::AtMost(0.6), Verdict::Met),
            (Some(0.61), Limit::AtMost(0.6), Verdict::Missed),
            (Some(25.0), Limit::AtLeast(25.0), Verdict::Met),
            (Some(24.9), Limit::AtLeast(25.0), Verdict::Missed),
            (None, Limit::AtMost(1.0), Verdict::Skipped),
        ];
        for (found, limit, verdict) in cases {
            assert_eq!(goal(found, limit).verdict(), verdict, "{found:?} {limit:?}");
        }
    }

    #[test]
    fn table_has_figure_limit_and_verdict() {
        let text =
            table(&[goal(Some(0.75), Limit::AtMost(0.6)), goal(None, Limit::AtLeast(8.0))]).to_string();
        let words: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[1], ["attach", "0.75", "<=", "0.60", "ms", "MISSED"]);
        assert_eq!(words[2], ["attach", "-", ">=", "8.00", "ms", "SKIPPED"]);
    }
}
