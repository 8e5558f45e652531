//! Checks that no two modules of a crate import each other, directly or through others, and neither do
//! two of its top-level groups.
//!
//! A module is a file. A file that only declares and re-exports modules is not one: a path through it
//! counts as an import of the module that defines the item. Test code is ignored, since a unit test may
//! need any module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The crates of the product, by directory.
const CRATES: &[&str] = &[
    "client",
    "daemon/engine",
    "daemon/kernel",
    "daemon/loopd",
    "daemon/partition-table",
    "daemon/unlock",
    "dbus",
    "dbus/common",
];

/// A path in the crate, without the leading `crate`.
type CratePath = Vec<String>;
/// The modules that each module imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    PathSeparator,
    Other(char),
}

impl Token {
    fn is(&self, text: &str) -> bool {
        match self {
            Self::Word(word) => word == text,
            Self::PathSeparator => text == "::",
            Self::Other(character) => text.chars().eq([*character]),
        }
    }

    fn word(&self) -> Option<&str> {
        match self {
            Self::Word(word) => Some(word),
            _ => None,
        }
    }
}

/// Splits source text into tokens; drops comments, literals and lifetimes.
fn tokenize(text: &str) -> Vec<Token> {
    let characters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&character) = characters.get(at) {
        let rest = &characters[at..];
        at += match rest {
            ['/', '/', ..] => length_until(rest, &['\n']),
            ['/', '*', ..] => block_comment_length(rest),
            ['"', ..] => string_length(rest),
            ['\'', ..] => quote_length(rest),
            [':', ':', ..] => {
                tokens.push(Token::PathSeparator);
                2
            }
            _ if character.is_alphanumeric() || character == '_' => {
                let length = rest.iter().take_while(|c| c.is_alphanumeric() || **c == '_').count();
                let word: String = rest[..length].iter().collect();
                match raw_string_length(&word, &rest[length..]) {
                    Some(literal) => length + literal,
                    // The prefix of a byte or C string.
                    None if ["b", "c"].contains(&word.as_str()) && matches!(rest.get(length), Some('"')) => {
                        length
                    }
                    None => {
                        tokens.push(Token::Word(word));
                        length
                    }
                }
            }
            _ => {
                if !character.is_whitespace() {
                    tokens.push(Token::Other(character));
                }
                1
            }
        };
    }
    tokens
}

fn length_until(text: &[char], end: &[char]) -> usize {
    let found = text.windows(end.len()).position(|window| window == end);
    found.map_or(text.len(), |start| start + end.len())
}

fn block_comment_length(text: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match &text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] if depth == 1 => return at + 2,
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    text.len()
}

fn string_length(text: &[char]) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// A raw string after its prefix, which may be the start of a raw identifier instead.
fn raw_string_length(prefix: &str, text: &[char]) -> Option<usize> {
    if !["r", "br", "cr"].contains(&prefix) {
        return None;
    }
    let hashes = text.iter().take_while(|character| **character == '#').count();
    (text.get(hashes) == Some(&'"')).then(|| {
        let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
        hashes + 1 + length_until(&text[hashes + 1..], &end)
    })
}

/// A character literal; for a lifetime only the quote.
fn quote_length(text: &[char]) -> usize {
    match text {
        ['\'', '\\', _, rest @ ..] => 3 + length_until(rest, &['\'']),
        ['\'', _, '\'', ..] => 3,
        _ => 1,
    }
}

/// The number of tokens up to the bracket that closes the first one.
fn group_length(tokens: &[Token]) -> usize {
    let mut depth = 0_u32;
    for (index, token) in tokens.iter().enumerate() {
        match token {
            Token::Other('(' | '[' | '{') => depth += 1,
            Token::Other(')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => continue,
        }
        if depth == 0 {
            return index + 1;
        }
    }
    tokens.len()
}

/// The tokens without the items under `#[cfg(test)]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let marker = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let rest = &tokens[at..];
        if rest.len() >= marker.len() && rest.iter().zip(marker).all(|(token, text)| token.is(text)) {
            at += marker.len() + item_length(&rest[marker.len()..]);
        } else {
            kept.push(rest[0].clone());
            at += 1;
        }
    }
    kept
}

/// The number of tokens of the item, field or statement at the start.
fn item_length(tokens: &[Token]) -> usize {
    const ITEMS: &[&str] = &[
        "fn",
        "mod",
        "impl",
        "struct",
        "enum",
        "trait",
        "union",
        "extern",
        "unsafe",
        "async",
        "macro_rules",
    ];
    let mut at = 0;
    let mut is_item = false;
    let mut is_use = false;
    while at < tokens.len() {
        match &tokens[at] {
            Token::Other('#') => at += 1,
            Token::Other('{') if is_item && !is_use => return at + group_length(&tokens[at..]),
            Token::Other('(' | '[' | '{') => at += group_length(&tokens[at..]),
            Token::Other(')' | ']' | '}') => return at,
            Token::Other(';') => return at + 1,
            Token::Other(',') if !is_item => return at + 1,
            token => {
                is_item |= token.word().is_some_and(|word| ITEMS.contains(&word));
                is_use |= token.is("use");
                at += 1;
            }
        }
    }
    tokens.len()
}

/// A path of a `use` declaration, or of code.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Import {
    path: Vec<String>,
    /// The name that it introduces; `None` for a path of code.
    name: Option<String>,
    is_public: bool,
    /// The inline modules around it.
    inline: Vec<String>,
}

/// A source file.
#[derive(Debug, Default)]
struct Source {
    /// The child modules that are files.
    children: Vec<String>,
    imports: Vec<Import>,
    /// Whether it has anything besides declarations and imports.
    has_code: bool,
}

/// Parses the tokens of a file.
fn parse(tokens: &[Token]) -> Source {
    let mut source = Source::default();
    let mut inline: Vec<(String, usize)> = Vec::new();
    let mut depth = 0;
    let mut at = 0;
    while at < tokens.len() {
        let rest = &tokens[at..];
        let is_public = at > 0 && (tokens[at - 1].is("pub") || tokens[at - 1].is(")"));
        let around = || inline.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        match rest {
            [Token::Other('#'), Token::Other('['), ..] => at += 1 + group_length(&rest[1..]),
            [Token::Other('#'), Token::Other('!'), Token::Other('['), ..] => {
                at += 2 + group_length(&rest[2..])
            }
            [first, Token::Word(name), Token::Other(';'), ..] if first.is("mod") => {
                source.children.push(name.clone());
                at += 3;
            }
            [first, Token::Word(name), Token::Other('{'), ..] if first.is("mod") => {
                inline.push((name.clone(), depth));
                (depth, at) = (depth + 1, at + 3);
            }
            [first, ..] if first.is("use") && !is_precise_capture(rest) => {
                let end = rest.iter().position(|token| token.is(";")).unwrap_or(rest.len());
                let mut trees = Vec::new();
                use_tree(&rest[1..end], &[], &mut trees);
                source.imports.extend(trees.into_iter().map(|(path, name)| Import {
                    path,
                    name: Some(name),
                    is_public,
                    inline: around(),
                }));
                at += end + 1;
            }
            [first, Token::Other('('), ..] if first.is("pub") => at += 1 + group_length(&rest[1..]),
            [first, ..] if first.is("pub") => at += 1,
            [Token::Word(_), Token::PathSeparator, ..] if !continues_a_path(tokens, at) => {
                source.has_code = true;
                let path = path_at(rest);
                at += 2 * path.len() - 1;
                source.imports.push(Import { path, name: None, is_public: false, inline: around() });
            }
            _ => {
                source.has_code = true;
                match rest[0] {
                    Token::Other('{') => depth += 1,
                    Token::Other('}') => {
                        depth = depth.saturating_sub(1);
                        inline.retain(|(_, outer)| *outer < depth);
                    }
                    _ => {}
                }
                at += 1;
            }
        }
    }
    source
}

/// `use<'a>` of a return type.
fn is_precise_capture(tokens: &[Token]) -> bool {
    matches!(tokens.get(1), Some(Token::Other('<')))
}

fn continues_a_path(tokens: &[Token], at: usize) -> bool {
    at > 0 && (tokens[at - 1] == Token::PathSeparator || tokens[at - 1].is("."))
}

fn path_at(tokens: &[Token]) -> Vec<String> {
    let mut path = Vec::new();
    let mut rest = tokens;
    while let [Token::Word(word), tail @ ..] = rest {
        path.push(word.clone());
        match tail {
            [Token::PathSeparator, next @ ..] if matches!(next.first(), Some(Token::Word(_))) => rest = next,
            _ => break,
        }
    }
    path
}

/// Adds the paths of a `use` tree, each with the name that it introduces.
fn use_tree(tokens: &[Token], prefix: &[String], trees: &mut Vec<(Vec<String>, String)>) {
    let mut path = prefix.to_vec();
    let mut rest = tokens;
    loop {
        match rest {
            [Token::Other('{'), ..] => {
                let inner = &rest[1..group_length(rest).saturating_sub(1).max(1)];
                for tree in split_at_commas(inner) {
                    use_tree(tree, &path, trees);
                }
                return;
            }
            [Token::Other('*'), ..] => return trees.push((path, "*".to_owned())),
            [Token::PathSeparator, tail @ ..] => rest = tail,
            [Token::Word(word), tail @ ..] if word == "self" && !path.is_empty() => rest = tail,
            [Token::Word(word), Token::Word(name), ..] if word == "as" => {
                return trees.push((path, name.clone()));
            }
            [Token::Word(word), tail @ ..] => {
                path.push(word.clone());
                rest = tail;
            }
            _ => {
                let name = path.last().cloned().unwrap_or_default();
                if !path.is_empty() {
                    trees.push((path, name));
                }
                return;
            }
        }
    }
}

fn split_at_commas(tokens: &[Token]) -> Vec<&[Token]> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_u32, 0);
    for (index, token) in tokens.iter().enumerate() {
        match token {
            Token::Other('{') => depth += 1,
            Token::Other('}') => depth = depth.saturating_sub(1),
            Token::Other(',') if depth == 0 => {
                parts.push(&tokens[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&tokens[start..]);
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

/// The files of a crate by module path; the root has the empty path.
struct Crate {
    modules: BTreeMap<CratePath, Source>,
}

impl Crate {
    /// Reads the file of the root and those of its modules.
    fn read(root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Self {
        let mut modules = BTreeMap::new();
        let mut pending = vec![(CratePath::new(), root.to_owned())];
        while let Some((path, file)) = pending.pop() {
            let text = read(&file).unwrap_or_else(|| panic!("cannot read {}", file.display()));
            let source = parse(&without_tests(&tokenize(&text)));
            let parent = file.parent().unwrap_or(Path::new(""));
            let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let is_directory_module = ["lib", "main", "mod"].contains(&stem);
            let directory = if is_directory_module { parent.to_owned() } else { parent.join(stem) };
            for child in &source.children {
                let files = [directory.join(format!("{child}.rs")), directory.join(child).join("mod.rs")];
                let found = files.iter().find(|file| read(file).is_some());
                let found = found.unwrap_or_else(|| panic!("{}: no file of module {child}", file.display()));
                pending.push(([&path[..], std::slice::from_ref(child)].concat(), found.clone()));
            }
            modules.insert(path, source);
        }
        Self { modules }
    }

    /// The path in the crate that an import names; `None` for another crate or a local name.
    fn absolute(&self, module: &CratePath, import: &Import) -> Option<CratePath> {
        let mut path = [&module[..], &import.inline[..]].concat();
        let (first, rest) = import.path.split_first()?;
        match first.as_str() {
            "crate" => path.clear(),
            "self" => {}
            "super" => drop(path.pop()),
            name => {
                let source = &self.modules[module];
                let imported = source.imports.iter().find(|other| {
                    other.name.as_deref() == Some(name)
                        && other.path.first().is_some_and(|first| first != name)
                });
                if source.children.iter().any(|child| child == name) {
                    path = [&module[..], &[name.to_owned()]].concat();
                } else if let (Some(imported), None) = (imported, &import.name) {
                    path = self.absolute(module, imported)?;
                } else {
                    return None;
                }
            }
        }
        for segment in rest {
            if segment == "super" {
                path.pop();
            } else {
                path.push(segment.clone());
            }
        }
        Some(path)
    }

    /// The modules that define the item of a path. Usually one; more for a glob re-export.
    fn owners(&self, path: &[String], visited: &mut Vec<CratePath>) -> Vec<CratePath> {
        if visited.contains(&path.to_vec()) {
            return Vec::new();
        }
        visited.push(path.to_vec());
        let end = (0..=path.len()).rev().find(|end| self.modules.contains_key(&path[..*end]));
        let (module, rest) = path.split_at(end.unwrap_or_default());
        let source = &self.modules[module];
        let Some((item, inner)) = rest.split_first() else {
            return if source.has_code { vec![module.to_vec()] } else { Vec::new() };
        };
        let public = || source.imports.iter().filter(|import| import.is_public);
        let mut named = public().filter(|import| import.name.as_deref() == Some(item));
        if let Some(path) = named.find_map(|import| self.absolute(&module.to_vec(), import)) {
            return self.owners(&[&path[..], inner].concat(), visited);
        }
        if source.has_code {
            return vec![module.to_vec()];
        }
        let globs = public().filter(|import| import.name.as_deref() == Some("*"));
        let globs: Vec<CratePath> =
            globs.filter_map(|import| self.absolute(&module.to_vec(), import)).collect();
        globs.iter().flat_map(|path| self.owners(path, visited)).collect()
    }

    /// The imports of each module that has code.
    fn graph(&self) -> Graph {
        let mut graph = Graph::new();
        for (module, source) in self.modules.iter().filter(|(_, source)| source.has_code) {
            let paths = source.imports.iter().filter_map(|import| self.absolute(module, import));
            let owners = paths.flat_map(|path| self.owners(&path, &mut Vec::new()));
            let others = owners.filter(|owner| owner != module).map(|owner| name(&owner));
            graph.insert(name(module), others.collect());
        }
        graph
    }
}

fn name(path: &[String]) -> String {
    if path.is_empty() { "crate".to_owned() } else { path.join("::") }
}

/// The imports between the top-level modules, each with everything below it.
fn groups(graph: &Graph) -> Graph {
    let group = |module: &str| module.split("::").next().unwrap_or_default().to_owned();
    let mut groups = Graph::new();
    for (module, imports) in graph {
        let own = group(module);
        let others = imports.iter().map(|import| group(import)).filter(|other| *other != own);
        groups.entry(own.clone()).or_default().extend(others);
    }
    groups
}

/// The first cycle, as a list that ends where it starts.
fn cycle(graph: &Graph) -> Option<Vec<String>> {
    let mut finished = BTreeSet::new();
    graph.keys().find_map(|start| visit(graph, start, &mut Vec::new(), &mut finished))
}

fn visit(
    graph: &Graph,
    module: &str,
    path: &mut Vec<String>,
    finished: &mut BTreeSet<String>,
) -> Option<Vec<String>> {
    if let Some(start) = path.iter().position(|other| other == module) {
        return Some([&path[start..], &[module.to_owned()]].concat());
    }
    if finished.contains(module) {
        return None;
    }
    path.push(module.to_owned());
    let found = graph.get(module).into_iter().flatten().find_map(|other| visit(graph, other, path, finished));
    path.pop();
    finished.insert(module.to_owned());
    found
}

/// Reads a crate of the repository.
fn read_crate(directory: &str) -> Crate {
    let sources = crate::bus::repository().join(directory).join("src");
    let read = |file: &Path| std::fs::read_to_string(file).ok();
    let roots: [PathBuf; 2] = ["lib.rs", "main.rs"].map(|root| sources.join(root));
    let root = roots.iter().find(|root| root.exists());
    Crate::read(root.unwrap_or_else(|| panic!("{directory} has no lib.rs and no main.rs")), &read)
}

#[test]
fn no_two_modules_import_each_other() {
    let mut errors = Vec::new();
    for directory in CRATES {
        let graph = read_crate(directory).graph();
        let kinds = [("modules", cycle(&graph)), ("groups of modules", cycle(&groups(&graph)))];
        errors.extend(kinds.into_iter().filter_map(|(kind, cycle)| {
            cycle.map(|cycle| format!("{directory}: cycle between {kind}: {}", cycle.join(" -> ")))
        }));
    }
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}

#[test]
fn every_crate_of_the_product_is_listed() {
    let manifest = std::fs::read_to_string(crate::bus::repository().join("Cargo.toml")).unwrap();
    let members = manifest.lines().find(|line| line.starts_with("members")).unwrap();
    for member in members.split('"').skip(1).step_by(2).filter(|member| !member.starts_with("tests")) {
        assert!(CRATES.contains(&member), "{member}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(files: &[(&str, &str)]) -> Graph {
        let read = |path: &Path| {
            let found = files.iter().find(|(file, _)| Path::new(file) == path);
            found.map(|(_, text)| (*text).to_owned())
        };
        Crate::read(Path::new("lib.rs"), &read).graph()
    }

    fn imports(graph: &Graph, module: &str) -> Vec<String> {
        graph[module].iter().cloned().collect()
    }

    #[test]
    fn imports_and_inline_paths_are_found() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod b; mod c; mod d; mod e;"),
            ("a.rs", "use crate::{b::{self, X}, c::Y as Z}; fn f() -> Vec<crate::d::T> { super::e::g() }"),
            ("b.rs", "pub struct X;"),
            ("c.rs", "pub struct Y;"),
            ("d.rs", "pub struct T;"),
            ("e.rs", "pub fn g() {}"),
        ]);
        assert_eq!(imports(&graph, "a"), ["b", "c", "d", "e"]);
        assert_eq!(cycle(&graph), None);
    }

    #[test]
    fn comments_literals_and_tests_are_ignored() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                r##"// crate::b::f
                /* crate::b /* nested */ crate::b::f */
                fn f<'a>(s: &'a str) { g("crate::b::f \" ", '"', r#"crate::b::f"#, b"crate::b", '\''); }
                #[cfg(test)] use crate::b::f as g;
                #[cfg(test)] #[must_use] fn h() -> u8 { crate::b::f() }
                #[cfg(test)] mod tests { use crate::b::f; fn x() { f() } }"##,
            ),
            ("b.rs", "pub fn f() {}"),
        ]);
        assert_eq!(imports(&graph, "a"), [""; 0]);
    }

    #[test]
    fn code_after_tests_is_parsed() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "#[cfg(test)] mod tests { fn x() {} } fn f() { crate::b::f() }"),
            ("b.rs", "pub fn f() {}"),
        ]);
        assert_eq!(imports(&graph, "a"), ["b"]);
    }

    #[test]
    fn re_exports_lead_to_the_defining_module() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod group; pub use group::Item;"),
            (
                "a.rs",
                "use crate::Item; use crate::group::Other; use crate::group; fn f() { group::one::f() }",
            ),
            ("group/mod.rs", "mod one; mod two; mod three; pub use one::Item; pub use self::two::*;"),
            ("group/one.rs", "pub struct Item; pub fn f() {}"),
            ("group/two.rs", "pub struct Other;"),
            ("group/three.rs", "use super::Item; fn f() { super::one::f() }"),
        ]);
        assert_eq!(imports(&graph, "a"), ["group::one", "group::two"]);
        assert_eq!(imports(&graph, "group::three"), ["group::one"]);
        assert!(!graph.contains_key("group") && !graph.contains_key("crate"));
    }

    #[test]
    fn a_parent_and_a_child_that_use_each_other_are_a_cycle() {
        let parent = "mod child; pub struct Item; fn f() { child::f() }";
        let files = [("lib.rs", "mod parent;"), ("parent.rs", parent)];
        let used = graph(&[&files[..], &[("parent/child.rs", "use super::Item; pub fn f() {}")]].concat());
        assert_eq!(cycle(&used).unwrap().join(" -> "), "parent -> parent::child -> parent");
        let unused = graph(&[&files[..], &[("parent/child.rs", "pub fn f() {}")]].concat());
        assert_eq!(cycle(&unused), None);
    }

    #[test]
    fn cycles_through_other_modules_and_between_groups_are_named() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B; pub struct A;"),
            ("b.rs", "use crate::c::C; pub struct B;"),
            ("c.rs", "pub struct C(crate::a::A);"),
        ]);
        assert_eq!(cycle(&graph).unwrap().join(" -> "), "a -> b -> c -> a");
        let graph = self::graph(&[
            ("lib.rs", "mod x; mod y;"),
            ("x/mod.rs", "mod one; mod two;"),
            ("x/one.rs", "use crate::y::Y; fn f(_: Y) {}"),
            ("x/two.rs", "pub struct Two;"),
            ("y.rs", "use crate::x::two::Two; pub struct Y;"),
        ]);
        assert_eq!(cycle(&graph), None);
        assert_eq!(cycle(&groups(&graph)).unwrap().join(" -> "), "x -> y -> x");
    }

    #[test]
    fn a_path_of_an_inline_module_belongs_to_its_file() {
        let graph = graph(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "pub mod inner { use super::super::b::B; use super::T; } pub struct T;"),
            ("b.rs", "pub struct B;"),
        ]);
        assert_eq!(imports(&graph, "a"), ["b"]);
    }
}
