//! Manual pages and completions, generated from the definitions that the programs use.

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
    /// Its path in the repository.
    pub path: PathBuf,
    /// Its contents.
    pub text: String,
}

/// A builder of a manual page.
#[derive(Debug)]
pub struct Manual {
    name: &'static str,
    section: u8,
    roff: Roff,
    is_after_heading: bool,
}

impl Manual {
    /// Starts a page with its name and a description.
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

    /// Starts a paragraph, except after a heading.
    fn paragraph(&mut self) {
        if !std::mem::take(&mut self.is_after_heading) {
            self.roff.control("PP", []);
        }
    }

    /// Adds a line to the paragraph; text between backticks is bold.
    pub fn line(&mut self, text: impl Into<String>) -> &mut Self {
        let text = text.into();
        let parts = text.split('`').enumerate();
        let inlines = parts.map(|(place, part)| if place % 2 == 0 { roman(part) } else { bold(part) });
        self.roff.text(inlines.collect::<Vec<_>>());
        self.is_after_heading = false;
        self
    }

    /// Adds paragraphs, separated by empty lines; indented ones are verbatim.
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

    /// Adds verbatim lines.
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

    /// Adds a term or an option with its meaning, in one or more paragraphs; indented ones are verbatim, except the
    /// first.
    pub fn item(&mut self, head: Vec<Inline>, text: &str) -> &mut Self {
        self.is_after_heading = false;
        self.roff.control("TP", []).text(head);
        for (place, paragraph) in text.split("\n\n").enumerate() {
            if place > 0 && paragraph.starts_with(' ') {
                self.indented(|manual| {
                    manual.verbatim(paragraph);
                });
                continue;
            }
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

    /// Adds items below the previous one.
    pub fn indented(&mut self, items: impl FnOnce(&mut Self)) -> &mut Self {
        self.roff.control("RS", []);
        items(self);
        self.roff.control("RE", []);
        self
    }

    /// Adds an entry of a list.
    pub fn bullet(&mut self, text: &str) -> &mut Self {
        self.roff.control("IP", ["\u{2022}", "2"]);
        self.line(text)
    }

    /// Adds a form of a command: its name in bold, capitals in italics.
    pub fn form(&mut self, text: &str) -> &mut Self {
        self.paragraph();
        self.roff.text(synopsis(text));
        self
    }

    /// Completes the page with references to others.
    #[must_use]
    pub fn see_also(mut self, pages: &[(&str, u8)]) -> Page {
        let names: Vec<String> = pages.iter().map(|(name, section)| format!("{name}({section})")).collect();
        self.heading("See also").line(names.join(", "));
        let path = PathBuf::from(format!("docs/man/{}.{}", self.name, self.section));
        // Characters that not every formatter and terminal supports.
        let body = self.roff.to_roff().replace('\u{2022}', "\\(bu").replace('\u{2026}', "...");
        let note = ".\\\" Generated by `make docs`; change its sources instead.";
        let (upper, section) = (self.name.to_uppercase(), self.section);
        let title = format!(".TH {upper} {section} \"\" \"loopd {}\"", env!("CARGO_PKG_VERSION"));
        let text = format!("{note}\n{title}\n{body}");
        Page { path, text }
    }
}

/// Splits a command form: words in capitals are placeholders; brackets and dots do not belong to a word.
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
