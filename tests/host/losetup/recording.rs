//! The recorded answers of losetup from util-linux 2.42, for machines with an older one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use loopd_tests::bus::repository;

use super::script::{Answer, Script, Stage};

const FILE: &str = "tests/host/losetup/util-linux-2.42.txt";

/// The answers as texts, by script and position.
#[derive(Debug, Default)]
pub struct Recording {
    answers: BTreeMap<(String, usize), String>,
}

impl Recording {
    /// Reads the recording that is stored with the tests.
    pub fn read() -> Result<Self> {
        let text = std::fs::read_to_string(path()).context(FILE)?;
        let mut recording = Self::default();
        for part in text.split("\n# ").skip(1) {
            let (heading, answer) = part.split_once('\n').context("no answer")?;
            let (script, place) = heading.rsplit_once(' ').context("no place")?;
            recording.answers.insert((script.to_owned(), place.parse()?), answer.trim_end().to_owned());
        }
        Ok(recording)
    }

    /// Stores it with the tests.
    pub fn write(&self) -> Result<()> {
        let mut text =
            "What losetup from util-linux 2.42 answers. Made by the tests; see losetup.rs.\n".to_owned();
        for ((script, place), answer) in &self.answers {
            text.push_str(&format!("\n# {script} {place}\n{answer}\n"));
        }
        Ok(std::fs::write(path(), text)?)
    }

    /// Adds an answer.
    pub fn add(&mut self, stage: &Stage, script: &Script, answer: &Answer) {
        let place = (script.name.to_owned(), answer.place);
        self.answers.insert(place, written(stage, answer));
    }

    /// The recorded answer to the same command line.
    pub fn of(&self, script: &Script, answer: &Answer) -> Option<&String> {
        self.answers.get(&(script.name.to_owned(), answer.place))
    }

    /// Whether this answer was recorded.
    pub fn has(&self, stage: &Stage, script: &Script, answer: &Answer) -> bool {
        self.of(script, answer) == Some(&written(stage, answer))
    }
}

fn path() -> PathBuf {
    repository().join(FILE)
}

/// The answer as a text that is the same on every machine: without device and inode numbers, the resulting column
/// widths, and the order of the devices in sysfs.
fn written(stage: &Stage, answer: &Answer) -> String {
    let mut text = format!("$ losetup {}\n", answer.line);
    let is_json = answer.stdout.starts_with('{');
    let mut printed: Vec<String> = answer.stdout.lines().map(|line| general(stage, line)).collect();
    if !is_json {
        printed.sort_unstable();
    }
    text.extend(printed.iter().map(|line| format!("1| {line}\n")));
    text.extend(answer.stderr.lines().map(|line| format!("2| {}\n", general(stage, line))));
    let lines = text + &format!("= {}", answer.status);
    lines.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn general(stage: &Stage, line: &str) -> String {
    let names = stage.names_of_numbers();
    let words = line.split_whitespace().map(|word| {
        names.iter().fold(word.to_owned(), |word, (number, name)| replace_number(&word, number, name))
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Replaces the number, unless it is part of a longer one.
fn replace_number(word: &str, number: &str, name: &str) -> String {
    let is_digit = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_digit());
    match word.split_once(number) {
        Some((before, behind)) if !is_digit(before.chars().last()) && !is_digit(behind.chars().next()) => {
            format!("{before}{name}{behind}")
        }
        _ => word.to_owned(),
    }
}
