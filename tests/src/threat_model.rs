//! Checks `docs/threat-model.md`: each row of its tables names tests, and the tests exist.

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use crate::bus::repository;

    /// The header of the column that names the tests.
    const COLUMN: &str = "test";

    /// The rows of the tables that have a column of tests, as cells, with their line numbers.
    fn rows(page: &str) -> Vec<(usize, Vec<&str>)> {
        let mut rows = Vec::new();
        let mut columns = None;
        for (number, line) in page.lines().enumerate() {
            let Some(inner) = line.strip_prefix('|').and_then(|line| line.trim_end().strip_suffix('|'))
            else {
                columns = None;
                continue;
            };
            let cells: Vec<&str> = inner.split('|').map(str::trim).collect();
            match columns {
                None => columns = Some((cells.len(), cells.last() == Some(&COLUMN))),
                Some((_, false)) => {}
                Some((count, true)) => {
                    assert_eq!(cells.len(), count, "line {}: {line}", number + 1);
                    if !cells.iter().all(|cell| cell.chars().all(|character| "-: ".contains(character))) {
                        rows.push((number + 1, cells));
                    }
                }
            }
        }
        rows
    }

    /// The names in backticks, without the modules before them.
    fn names(cell: &str) -> Vec<&str> {
        let quoted = cell.split('`').skip(1).step_by(2);
        quoted.map(|name| name.rsplit("::").next().unwrap_or(name)).collect()
    }

    /// The text of all source files that may contain tests.
    fn sources(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let is_source = path.extension().is_some_and(|extension| extension == "rs" || extension == "sh");
            if kind.is_dir() && entry.file_name() != "target" {
                sources(&path, text);
            } else if kind.is_file() && is_source {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn each_row_names_tests_that_exist() {
        let page = fs::read_to_string(repository().join("docs/threat-model.md")).unwrap();
        let mut text = String::new();
        for directory in ["client", "daemon", "dbus", "tests"] {
            sources(&repository().join(directory), &mut text);
        }
        let rows = rows(&page);
        assert!(rows.len() > 20, "the tables have no column called {COLUMN:?}");
        for (line, cells) in rows {
            // Only the first cell may be empty: the row goes on with the input above it.
            assert!(cells[1..].iter().all(|cell| !cell.is_empty()), "line {line} has an empty cell");
            let names = names(cells.last().unwrap());
            assert!(!names.is_empty(), "line {line} names no test");
            for name in names {
                // A function, one of a shell script, or a row of a table of tests.
                let forms = [format!("fn {name}("), format!("{name}() {{"), format!("    {name}: \"")];
                let is_there = forms.iter().any(|form| text.contains(form));
                assert!(is_there, "line {line}: there is no test {name}");
            }
        }
    }
}
