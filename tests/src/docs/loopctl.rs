//! loopctl(1), generated from the definition of its command line.

use clap::builder::StyledStr;
use clap::{Arg, Command};
use roff::{Inline, bold, italic, roman};

use super::{Manual, Page};

/// The page.
#[must_use]
pub fn page() -> Page {
    let mut command = ::loopctl::cli::command();
    command.build();
    let about = plain(command.get_about());
    let mut manual = Manual::new("loopctl", 1, about.trim_end_matches('.'));
    manual.heading("Synopsis").form("loopctl [OPTION]... VERB [ARGUMENT]...");
    manual.heading("Description").prose(&description(&command));
    manual.heading("Global options");
    command.get_arguments().filter(|argument| is_shown(argument)).for_each(|argument| {
        item(&mut manual, argument);
    });
    manual.heading("Verbs");
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        describe(&mut manual, verb);
    }
    notes(&mut manual, &command, true);
    environment(&mut manual);
    manual.see_also(&[
        ("loopctl-losetup", 1),
        ("org.loopd1", 5),
        ("losetup", 8),
        ("umount.loopd", 8),
        ("loopd", 8),
        ("polkit", 8),
    ])
}

/// Writes a verb: its form, its description, its arguments and the sections of its help.
fn describe(manual: &mut Manual, verb: &Command) {
    manual.subheading(verb.get_name());
    let usage = verb.clone().render_usage().to_string();
    for line in usage.lines() {
        let line = line.trim().trim_start_matches("Usage: ");
        manual.form(&line.replace(['<', '>'], "").replace("[OPTIONS]", "[OPTION]..."));
    }
    manual.prose(&description(verb));
    verb.get_positionals().for_each(|argument| item(manual, argument));
    let options = verb.get_arguments().filter(|argument| !argument.is_positional());
    options
        .filter(|option| is_shown(option) && !option.is_global_set())
        .for_each(|option| item(manual, option));
    notes(manual, verb, false);
}

fn is_shown(argument: &Arg) -> bool {
    !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str())
}

fn item(manual: &mut Manual, argument: &Arg) {
    let help = argument.get_long_help().or(argument.get_help());
    let mut text = plain(help);
    let values = argument.get_possible_values();
    let values: Vec<_> = values.iter().filter(|value| !value.is_hide_set()).collect();
    let are_described =
        values.iter().any(|value| value.get_help().is_some_and(|help| !help.to_string().is_empty()));
    let takes_values = argument.get_action().takes_values() && !values.is_empty();
    if takes_values && !are_described {
        let names: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
        text.push_str(&format!("\n\nOne of: {}.", names.join(", ")));
    }
    let defaults = argument.get_default_values();
    if !defaults.is_empty() && argument.get_action().takes_values() && !argument.is_hide_default_value_set() {
        let names: Vec<_> = defaults.iter().map(|value| value.to_string_lossy()).collect();
        text.push_str(&format!("\n\nThe default is {}.", names.join(",")));
    }
    manual.item(head(argument), &text);
    if takes_values && are_described {
        manual.indented(|manual| {
            for value in values {
                manual.item(vec![bold(value.get_name())], &plain(value.get_help()));
            }
        });
    }
}

/// `-o, --offset N`
fn head(argument: &Arg) -> Vec<Inline> {
    let mut names = Vec::new();
    if let Some(letter) = argument.get_short() {
        names.push(bold(format!("-{letter}")));
    }
    if let Some(long) = argument.get_long() {
        if !names.is_empty() {
            names.push(roman(", "));
        }
        names.push(bold(format!("--{long}")));
    }
    if argument.get_action().takes_values() {
        if !names.is_empty() {
            names.push(roman(" "));
        }
        let values = argument.get_value_names().unwrap_or_default();
        names.push(italic(values.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(" ")));
        if argument.is_positional() && argument.get_num_args().is_some_and(|range| range.max_values() > 1) {
            names.push(roman("..."));
        }
    }
    names
}

/// Writes the sections at the end of the help: a heading in capitals with indented text.
fn notes(manual: &mut Manual, command: &Command, is_top: bool) {
    let text = plain(command.get_after_long_help().or(command.get_after_help()));
    for part in text.split("\n\n") {
        let (first, rest) = part.split_once('\n').unwrap_or((part, ""));
        let is_heading =
            !first.is_empty() && first.chars().all(|letter| letter.is_uppercase() || letter == ' ');
        let body = match (is_heading, is_top) {
            (true, true) => {
                manual.heading(first);
                rest
            }
            (true, false) => {
                manual.item(vec![bold(capitalised(first))], "");
                rest
            }
            (false, _) => part,
        };
        paragraphs(manual, body);
    }
}

/// Writes paragraphs; commands and their output are verbatim.
fn paragraphs(manual: &mut Manual, body: &str) {
    let is_code = |line: &&str| line.starts_with("    ");
    let mut lines = body.lines().peekable();
    while lines.peek().is_some() {
        let mut prose = Vec::new();
        while let Some(line) = lines.next_if(|line| !is_code(line)) {
            prose.push(line.trim());
        }
        if !prose.is_empty() {
            manual.prose(&prose.join(" "));
        }
        let mut code = Vec::new();
        while let Some(line) = lines.next_if(is_code) {
            code.push(line);
        }
        if !code.is_empty() {
            manual.verbatim(&code.join("\n"));
        }
    }
}

fn capitalised(text: &str) -> String {
    let lower = text.to_lowercase();
    lower[..1].to_uppercase() + &lower[1..]
}

fn environment(manual: &mut Manual) {
    manual.heading("Environment");
    for (name, text) in ::loopctl::cli::ENVIRONMENT {
        manual.item(vec![bold(*name)], text);
    }
}

fn description(command: &Command) -> String {
    plain(command.get_long_about().or(command.get_about()))
}

fn plain(text: Option<&StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}
