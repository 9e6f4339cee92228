//! What holds for every Rust file: it says what it is, its SAFETY comments are its own, it is
//! not too long, and nothing unfinished is left in it.

use std::collections::HashMap;

use super::{Finding, Source};

/// Beyond this a file probably has a second subject (STYLE, Shape).
const LONG: usize = 500;

/// Left over from writing. In halves, so that this file does not find itself.
const LEFTOVERS: &[&str] = &[
    concat!("dbg", "!("),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
];

pub(super) fn check(file: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !opens_with_its_purpose(&file.text) {
        findings.push(file.finding(
            1,
            "does not open with //! saying what it owns and must not know",
        ));
    }
    for (index, line) in file.text.lines().enumerate() {
        for word in LEFTOVERS.iter().filter(|word| line.contains(**word)) {
            findings.push(file.finding(index + 1, format!("{word} is left over")));
        }
    }
    findings
}

/// Attributes of the whole file (`#![expect(unsafe_code, ...)]`) may stand before the `//!`.
fn opens_with_its_purpose(text: &str) -> bool {
    let mut attribute = false;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        attribute |= line.starts_with("#![");
        if !attribute {
            return line.starts_with("//!");
        }
        attribute = !line.ends_with(']');
    }
    false
}

pub(super) fn long_file(file: &Source) -> Option<Finding> {
    let lines = file.text.lines().count();
    let long = file.path.ends_with(".rs") && lines > LONG;
    long.then(|| file.finding(1, format!("{lines} lines; look for the second subject")))
}

/// A SAFETY comment that fits in two places explains neither.
pub(super) fn repeated_safety<'a>(files: impl IntoIterator<Item = &'a Source>) -> Vec<Finding> {
    let mut first: HashMap<String, (&str, usize)> = HashMap::new();
    let mut findings = Vec::new();
    for file in files {
        for (line, comment) in safety_comments(&file.text) {
            if let Some((path, earlier)) = first.get(&comment) {
                let message =
                    format!("the same SAFETY comment as {path}:{earlier}; say why it holds here");
                findings.push(file.finding(line, message));
            } else {
                first.insert(comment, (&file.path, line));
            }
        }
    }
    findings
}

/// Each SAFETY comment, its lines joined, with the line it begins on.
fn safety_comments(text: &str) -> Vec<(usize, String)> {
    let mut comments: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (index, line) in text.lines().enumerate() {
        let comment = line
            .trim()
            .strip_prefix("//")
            .filter(|rest| !rest.starts_with(['/', '!']));
        match comment.map(str::trim) {
            Some(said) if said.starts_with("SAFETY:") => {
                comments.push((index + 1, said.to_owned()));
                open = true;
            }
            Some(said) if open => {
                if let Some((_, comment)) = comments.last_mut() {
                    comment.push(' ');
                    comment.push_str(said);
                }
            }
            _ => open = false,
        }
    }
    comments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.into(),
            text: text.into(),
        }
    }

    #[test]
    fn a_file_that_opens_with_its_purpose_is_fine() {
        assert_eq!(
            check(&source("a.rs", "\n//! Owns a.\n\nfn main() {}\n")),
            []
        );
        let below = "#![expect(unsafe_code, reason = \"x\")]\n#![expect(\n    dead_code,\n)]\n//! Owns a.\n";
        assert_eq!(check(&source("a.rs", below)), []);
    }

    #[test]
    fn a_headless_file_and_leftovers_are_found() {
        let text = format!("fn main() {{\n    {}x);\n}}\n", LEFTOVERS[0]);
        let lines: Vec<_> = check(&source("a.rs", &text))
            .into_iter()
            .map(|finding| finding.line)
            .collect();
        assert_eq!(lines, [1, 2]);
    }

    #[test]
    fn only_rust_files_over_the_limit_are_long() {
        assert!(long_file(&source("a.rs", &"x\n".repeat(LONG))).is_none());
        assert!(long_file(&source("a.rs", &"x\n".repeat(LONG + 1))).is_some());
        assert!(long_file(&source("Cargo.toml", &"x\n".repeat(LONG + 1))).is_none());
    }

    #[test]
    fn safety_comments_differ_by_what_they_say_not_by_how_they_wrap() {
        let one = source(
            "a.rs",
            "// SAFETY: by clause 3 the\n// descriptor is ours.\nunsafe {}\n// SAFETY: by clause 4.\n",
        );
        let two = source(
            "b.rs",
            "fn f() {\n    // SAFETY: by clause 3 the descriptor\n    // is ours.\n    unsafe {}\n}\n",
        );
        let message = "the same SAFETY comment as a.rs:1; say why it holds here";
        assert_eq!(
            repeated_safety(&[one, two]),
            [Finding {
                path: "b.rs".into(),
                line: 2,
                message: message.into()
            }]
        );
    }

    #[test]
    fn distinct_safety_comments_are_fine() {
        let one = source(
            "a.rs",
            "// SAFETY: one.\nunsafe {}\n// SAFETY: two.\n/// SAFETY: one.\n",
        );
        assert_eq!(repeated_safety(&[one]), []);
    }
}
