//! Manual pages and completions, each made from the definition that the programs themselves use.

pub mod completion;
pub mod daemon;
pub mod interfaces;
pub mod loopctl;
pub mod losetup;
pub mod umount;

use std::path::PathBuf;

use roff::{Inline, Roff, bold, italic, roman};

/// A file among the documents.
#[derive(Clone, Debug)]
pub struct Page {
    /// Where it is kept, from the repository on.
    pub path: PathBuf,
    /// What is in it.
    pub text: String,
}

/// A manual page that is being written.
#[derive(Debug)]
pub struct Manual {
    name: &'static str,
    section: u8,
    roff: Roff,
    is_after_heading: bool,
}

impl Manual {
    /// A page with its name and what that stands for.
    #[must_use]
    pub fn new(name: &'static str, section: u8, about: &str) -> Self {
        let mut manual = Self { name, section, roff: Roff::new(), is_after_heading: false };
        manual.heading("Name").line(format!("{name} - {about}"));
        manual
    }

    /// A section's heading.
    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.roff.control("SH", [text.to_uppercase().as_str()]);
        self.is_after_heading = true;
        self
    }

    /// A heading within a section.
    pub fn subheading(&mut self, text: &str) -> &mut Self {
        self.roff.control("SS", [text]);
        self.is_after_heading = true;
        self
    }

    /// Starts a paragraph; a heading has done so.
    fn paragraph(&mut self) {
        if !std::mem::take(&mut self.is_after_heading) {
            self.roff.control("PP", []);
        }
    }

    /// A line of the paragraph; what stands between backticks is bold.
    pub fn line(&mut self, text: impl Into<String>) -> &mut Self {
        let text = text.into();
        let parts = text.split('`').enumerate();
        let inlines = parts.map(|(place, part)| if place % 2 == 0 { roman(part) } else { bold(part) });
        self.roff.text(inlines.collect::<Vec<_>>());
        self.is_after_heading = false;
        self
    }

    /// Paragraphs, parted by empty lines; those that are indented stay as they are.
    pub fn prose(&mut self, text: &str) -> &mut Self {
        for paragraph in text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
            if paragraph.starts_with(' ') {
                self.verbatim(paragraph);
            } else {
                self.paragraph();
                self.line(paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
            }
        }
        self
    }

    /// Lines that stay as they are.
    pub fn verbatim(&mut self, text: &str) -> &mut Self {
        self.paragraph();
        self.roff.control("RS", ["4"]).control("nf", []);
        let margin = text.lines().filter(|line| !line.trim().is_empty());
        let margin = margin.map(|line| line.len() - line.trim_start().len()).min().unwrap_or_default();
        for line in text.trim_end().lines() {
            self.roff.text([roman(line.get(margin..).unwrap_or_default())]);
        }
        self.roff.control("fi", []).control("RE", []);
        self
    }

    /// A word or an option, and what it means: one paragraph, or several.
    pub fn item(&mut self, head: Vec<Inline>, text: &str) -> &mut Self {
        self.is_after_heading = false;
        self.roff.control("TP", []).text(head);
        for (place, paragraph) in text.split("\n\n").enumerate() {
            if place > 0 {
                self.roff.control("IP", []);
            }
            let mut sentences = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
            if sentences.ends_with(|last: char| last.is_alphanumeric() || last == ')') {
                sentences.push('.');
            }
            self.line(sentences);
        }
        self
    }

    /// Items that belong to the one before them.
    pub fn indented(&mut self, items: impl FnOnce(&mut Self)) -> &mut Self {
        self.roff.control("RS", []);
        items(self);
        self.roff.control("RE", []);
        self
    }

    /// An entry of a list.
    pub fn bullet(&mut self, text: &str) -> &mut Self {
        self.roff.control("IP", ["\u{2022}", "2"]);
        self.line(text)
    }

    /// A way to call a program: its name in bold, words in capitals in italics.
    pub fn form(&mut self, text: &str) -> &mut Self {
        self.paragraph();
        self.roff.text(synopsis(text));
        self
    }

    /// Ends it with other pages to read.
    #[must_use]
    pub fn see_also(mut self, pages: &[(&str, u8)]) -> Page {
        let names: Vec<String> = pages.iter().map(|(name, section)| format!("{name}({section})")).collect();
        self.heading("See also").line(names.join(", "));
        let path = PathBuf::from(format!("docs/man/{}.{}", self.name, self.section));
        // What not every formatter and terminal has letters for.
        let body = self.roff.to_roff().replace('\u{2022}', "\\(bu").replace('\u{2026}', "...");
        let note = ".\\\" Made by `make docs`; change what it is made from.";
        let (upper, section) = (self.name.to_uppercase(), self.section);
        let title = format!(".TH {upper} {section} \"\" \"loopd {}\"", env!("CARGO_PKG_VERSION"));
        let text = format!("{note}\n{title}\n{body}");
        Page { path, text }
    }
}

/// Words in capitals stand for what a user puts there; brackets and dots are no part of a word.
#[must_use]
pub fn synopsis(text: &str) -> Vec<Inline> {
    let is_of_word = |letter: char| letter.is_alphanumeric() || "-_/{}".contains(letter);
    let mut inlines = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_word = is_of_word(first);
        let end = rest.find(|letter| is_of_word(letter) != is_word).unwrap_or(rest.len());
        let (part, behind) = rest.split_at(end);
        let is_placeholder = part.chars().all(|letter| letter.is_uppercase() || letter == '_');
        inlines.push(match (is_word, is_placeholder) {
            (false, _) => roman(part),
            (true, true) => italic(part),
            (true, false) => bold(part),
        });
        rest = behind;
    }
    inlines
}
