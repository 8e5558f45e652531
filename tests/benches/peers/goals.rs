//! The goals, beside the figures of the same run.

use loopd_tests::report::goal::{Goal, Limit};
use loopd_tests::report::statistics::{Growth, ratio};

use crate::names::{column, group, growth, process, side, table};
use crate::results::{Key, Results};

/// All goals. One whose figures are missing is skipped.
pub fn of(results: &Results) -> Vec<Goal> {
    let figures = Figures(results);
    let mut goals = figures.attach();
    goals.extend(figures.growth());
    goals.extend(figures.process());
    goals
}

fn goal(name: impl Into<String>, found: Option<f64>, limit: Limit, unit: &'static str) -> Goal {
    Goal { name: name.into(), found, limit, unit }
}

fn difference(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? - other?)
}

struct Figures<'a>(&'a Results);

impl Figures<'_> {
    fn time(&self, group: &'static str, side: &'static str, column: &'static str) -> Option<f64> {
        self.0.median(Key { table: table::ATTACH, group, side, column })
    }

    fn held(&self, group: &'static str, side: &'static str, held: &'static str) -> Option<f64> {
        self.0.median(Key { table: table::GROWTH, group, side, column: held })
    }

    fn value(&self, group: &'static str, name: &'static str) -> Option<f64> {
        self.0.median(Key { table: table::PROCESS, group, side: name, column: process::VALUE })
    }

    fn attach(&self) -> Vec<Goal> {
        let attach = |group, side| self.time(group, side, column::ATTACH);
        let above = |group| difference(attach(group, side::LOOPD), attach(group, side::IOCTLS));
        let floor = |group| ratio(attach(group, side::LOOPD), attach(group, side::IOCTLS));
        let user = |group| difference(attach(group, side::LOOPD_USER), attach(group, side::LOOPD));
        let udisks = attach(group::PROCESSED, side::UDISKS);
        let faster = |group| ratio(udisks, attach(group, side::LOOPD));
        let detach = |group| {
            let detach = |side| self.time(group, side, column::DETACH);
            difference(detach(side::LOOPD), detach(side::IOCTLS))
        };
        let whole = |side| {
            let step = |column| self.time(group::COMMANDS, side, column);
            Some(step(column::ATTACH)? + step(column::DETACH)?)
        };
        vec![
            goal(
                "attach, not waiting for udev, above the ioctls",
                above(group::REPLY),
                Limit::AtMost(0.6),
                "ms",
            ),
            goal("  UDisks2 takes", faster(group::REPLY), Limit::AtLeast(25.0), "times"),
            goal(
                "attach until udev is done, against the ioctls",
                floor(group::PROCESSED),
                Limit::AtMost(1.2),
                "times",
            ),
            goal("  UDisks2 takes", faster(group::PROCESSED), Limit::AtLeast(8.0), "times"),
            goal("  2 partitions, against the ioctls", floor(group::TWO), Limit::AtMost(1.2), "times"),
            goal("  255 partitions, against the ioctls", floor(group::MOST), Limit::AtMost(1.2), "times"),
            goal("ordinary user above root, not waiting", user(group::REPLY), Limit::AtMost(2.0), "ms"),
            goal(
                "ordinary user above root, until udev is done",
                user(group::PROCESSED),
                Limit::AtMost(2.0),
                "ms",
            ),
            goal("detach until free, above the ioctls", detach(group::REPLY), Limit::AtMost(0.5), "ms"),
            goal("  after an attach until udev is done", detach(group::PROCESSED), Limit::AtMost(0.5), "ms"),
            goal(
                "loopctl attach and detach, against losetup",
                ratio(whole(side::LOOPCTL), whole(side::LOSETUP)),
                Limit::AtMost(2.0),
                "times",
            ),
        ]
    }

    /// 1,000 held devices against 10, the growth of the ioctls taken off.
    fn growth(&self) -> Vec<Goal> {
        let growth = |group, side| {
            let [first, last] = ["10", "1,000"].map(|held| self.held(group, side, held));
            Some(Growth { first: first?, last: last? })
        };
        let grown = |group| growth(group, side::LOOPD)?.above(growth(group, side::IOCTLS)?);
        let list = |group| self.held(group, side::LOOPD, "1,000");
        let end = |side| self.held(growth::END, side, "1,000");
        let limit = Limit::AtMost(1.15);
        vec![
            goal("1,000 held against 10: attach, not waiting", grown(growth::REPLY), limit, "times"),
            goal("  attach until udev is done", grown(growth::PROCESSED), limit, "times"),
            goal("  detach until free", grown(growth::DETACH), limit, "times"),
            goal("List of 1,000", list(growth::LIST), Limit::AtMost(10.0), "ms"),
            goal("GetManagedObjects of 1,000", list(growth::OBJECTS), Limit::AtMost(15.0), "ms"),
            goal(
                "end of a client with 1,000, against the ioctls",
                ratio(end(side::LOOPD), end(side::IOCTLS)),
                Limit::AtMost(1.5),
                "times",
            ),
        ]
    }

    fn process(&self) -> Vec<Goal> {
        let mb = |group, name: &'static str, limit| {
            goal(name, self.value(group, name), Limit::AtMost(limit), "MB")
        };
        vec![
            goal(process::START, self.value("start", process::START), Limit::AtMost(8.0), "ms"),
            mb("memory", process::RESIDENT, 4.0),
            mb("memory", process::PROPORTIONAL, 2.5),
            goal(
                process::PER_ATTACHMENT,
                self.value("memory", process::PER_ATTACHMENT),
                Limit::AtMost(4.0),
                "KiB",
            ),
            goal(
                "RSS after all have gone, above idle",
                self.value("memory", process::LEFT),
                Limit::AtMost(1.0),
                "MB",
            ),
            goal(process::CALLS, self.value("idle", process::CALLS), Limit::AtMost(0.0), "calls"),
            mb("sizes", process::DAEMON, 2.5),
            mb("sizes", process::CLIENT, 2.5),
        ]
    }
}
