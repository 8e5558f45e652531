//! loopctl-losetup(1), generated from the sources of `losetup --help`.

use ::loopctl::losetup::usage;
use roff::bold;

use super::{Manual, Page, synopsis};

/// The page.
#[must_use]
pub fn page() -> Page {
    let mut manual = Manual::new("loopctl-losetup", 1, "util-linux's losetup, by way of loopd");
    manual.heading("Synopsis").form("loopctl losetup [ARGUMENT]...");
    usage::FORMS.iter().for_each(|(form, _)| {
        manual.form(form);
    });
    manual.heading("Description").prose(usage::DESCRIPTION);
    for (form, what) in usage::FORMS {
        manual.item(synopsis(form), &sentence(what));
    }
    manual.heading("Options").prose(usage::NUMBERS);
    for (group, options) in usage::options() {
        manual.subheading(group);
        for (flags, what) in options {
            manual.item(synopsis(flags.trim()), &sentence(what));
        }
    }
    manual.heading("Columns");
    for (header, what) in usage::columns() {
        manual.item(vec![bold(header)], &sentence(what));
    }
    manual.heading("Exit status").prose(usage::STATUS);
    manual.heading("Differences from losetup(8)");
    usage::DIFFERENCES.iter().for_each(|difference| {
        manual.bullet(difference);
    });
    manual.see_also(&[("loopctl", 1), ("losetup", 8), ("loopd", 8)])
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}
