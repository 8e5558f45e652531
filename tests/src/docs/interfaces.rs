//! org.loopd1(5), generated from the introspection XML and its comments.

use anyhow::{Context as _, Result};
use loopd_dbus::names::{ATTACHMENT, CLEARTEXT, ENCRYPTED, MANAGER, PARTITION, VOLUME};
use roff::{bold, italic, roman};
use roxmltree::{Document, Node, ParsingOptions};

use super::{Manual, Page};
use crate::bus::repository;

/// The page.
///
/// # Errors
/// An interface cannot be read, or a member of it has no comment.
pub fn page() -> Result<Page> {
    let mut manual = Manual::new("org.loopd1", 5, "the D-Bus interface of loopd");
    manual.heading("Description").prose(
        "loopd has the name org.loopd1 on the system bus. The object /org/loopd1 has the interface \
         org.freedesktop.DBus.ObjectManager, whose signals announce added and removed objects. Changes are announced \
         with PropertiesChanged of org.freedesktop.DBus.Properties.",
    );
    for name in [MANAGER, ATTACHMENT, PARTITION, VOLUME, ENCRYPTED, CLEARTEXT] {
        let path = format!("dbus/{name}.xml");
        let text = std::fs::read_to_string(repository().join(&path)).with_context(|| path.clone())?;
        describe(&mut manual, &text, name).with_context(|| path)?;
    }
    Ok(manual.see_also(&[("loopctl", 1), ("loopd", 8), ("busctl", 1)]))
}

fn describe(manual: &mut Manual, text: &str, name: &str) -> Result<()> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)?;
    let about = document.root().children().find(Node::is_comment).context("no comment at its start")?;
    manual.heading(name).prose(&unindented(about.text().unwrap_or_default()));
    let interface =
        document.descendants().find(|node| node.has_tag_name("interface")).context("no interface")?;
    let mut comment = None;
    for node in interface.children() {
        if node.is_comment() {
            comment = node.text().map(unindented);
        } else if node.is_element() {
            let member = node.attribute("name").unwrap_or_default();
            let description = comment.take().with_context(|| format!("{member} has no comment"))?;
            let description = description
                .strip_prefix(&format!("{member}:"))
                .with_context(|| format!("not of {member}: {description}"))?;
            match node.tag_name().name() {
                "property" => property(manual, node, description.trim()),
                _ => method(manual, node, description),
            }
        }
    }
    Ok(())
}

fn property(manual: &mut Manual, node: Node<'_, '_>, description: &str) {
    let attribute = |name| node.attribute(name).unwrap_or_default();
    manual.item(vec![bold(attribute("name")), roman(" "), italic(attribute("type"))], description);
}

/// Writes `Name (type argument, …) -> (type argument, …)`, its arguments and its description.
fn method(manual: &mut Manual, node: Node<'_, '_>, description: &str) {
    let arguments = |direction| {
        let chosen = node.children().filter(|child| child.attribute("direction") == Some(direction));
        let shown = chosen.map(|argument| {
            let attribute = |name| argument.attribute(name).unwrap_or_default();
            format!("{} {}", attribute("type"), attribute("name"))
        });
        format!("({})", shown.collect::<Vec<_>>().join(", "))
    };
    let head =
        format!("{} {} -> {}", node.attribute("name").unwrap_or_default(), arguments("in"), arguments("out"));
    manual.subheading(&head);
    let (parameters, text) =
        description.trim_start_matches('\n').split_once("\n\n").unwrap_or((description, ""));
    let (parameters, text) = match parameters.trim_start().starts_with('@') {
        true => (parameters, text),
        false => ("", description),
    };
    for parameter in parameters.split('@').skip(1) {
        let (name, what) = parameter.split_once(':').unwrap_or((parameter, ""));
        manual.item(vec![italic(name)], what.trim());
    }
    manual.prose(text);
}

/// The comment without its common indentation.
fn unindented(comment: &str) -> String {
    let lines = comment.lines().skip(usize::from(comment.starts_with('\n')));
    let indent = |line: &str| line.len() - line.trim_start().len();
    let margin = lines.clone().filter(|line| !line.trim().is_empty()).map(indent).min().unwrap_or_default();
    let lines: Vec<&str> = lines.map(|line| line.get(margin..).unwrap_or_default().trim_end()).collect();
    lines.join("\n").trim_end().to_owned()
}
