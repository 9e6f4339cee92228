//! Sections that the docs of public functions must have: `# Cancel safety` on what is async,
//! `# Errors` on what can fail. Methods of public traits count as public.
//!
//! This reads lines, not Rust: it relies on the shape that rustfmt gives, and on tests standing
//! at the end of a file. Clippy knows of `# Errors` too, but not for what is public in name only.

use super::{Finding, Source};

pub(super) fn check(file: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut doc = String::new();
    let mut trait_end: Option<String> = None;
    let mut lines = file.text.lines().enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        let code = line.trim_start();
        if let Some(said) = code.strip_prefix("///") {
            doc.push_str(said.trim());
            doc.push('\n');
            continue;
        }
        if code.starts_with("#[") {
            let mut attribute = code.to_owned();
            while !is_balanced(&attribute) {
                let Some((_, more)) = lines.next() else { break };
                attribute.push_str(more.trim());
            }
            let before_module = lines
                .peek()
                .is_some_and(|(_, next)| next.trim_start().starts_with("mod "));
            if attribute == "#[cfg(test)]" && before_module {
                break;
            }
            doc.push_str(&attribute);
            doc.push('\n');
            continue;
        }
        if code.starts_with("//") {
            continue;
        }

        let indent = &line[..line.len() - code.len()];
        if code.starts_with("pub trait ") || code.starts_with("pub unsafe trait ") {
            trait_end = Some(format!("{indent}}}"));
        } else if trait_end.as_deref() == Some(line) {
            trait_end = None;
        }
        if let Some(function) = function(code, trait_end.is_some()) {
            let mut signature = code.to_owned();
            while !signature.ends_with(['{', ';', '}']) {
                let Some((_, more)) = lines.next() else { break };
                signature.push(' ');
                signature.push_str(more.trim());
            }
            for section in wanted(&signature, function.is_async) {
                if !doc.contains("#[doc(hidden)]") && !doc.lines().any(|line| line == section) {
                    findings.push(file.finding(
                        index + 1,
                        format!("{} has no section '{section}'", function.name),
                    ));
                }
            }
        }
        doc.clear();
    }
    findings
}

struct Function<'a> {
    name: &'a str,
    is_async: bool,
}

/// The public function that this line begins, if it does.
fn function(code: &str, in_trait: bool) -> Option<Function<'_>> {
    let mut rest = match code.strip_prefix("pub ") {
        Some(rest) => rest,
        None if in_trait => code,
        None => return None,
    };
    let mut is_async = false;
    loop {
        if let Some(name) = rest.strip_prefix("fn ") {
            let end = name.find(['(', '<']).unwrap_or(name.len());
            return Some(Function {
                name: &name[..end],
                is_async,
            });
        }
        let (word, after) = rest.split_once(' ')?;
        match word {
            "async" => is_async = true,
            "const" | "unsafe" | "extern" | "\"C\"" => {}
            _ => return None,
        }
        rest = after;
    }
}

fn wanted(signature: &str, is_async: bool) -> impl Iterator<Item = &'static str> {
    let cancel_safety = is_async.then_some("# Cancel safety");
    let errors = returns_result(signature).then_some("# Errors");
    cancel_safety.into_iter().chain(errors)
}

/// Whether the function's own result, not that of a closure it takes, is a `Result`.
fn returns_result(signature: &str) -> bool {
    let mut depth = 0_i32;
    let mut previous = ' ';
    for (at, character) in signature.char_indices() {
        match character {
            '(' | '[' | '<' => depth += 1,
            '>' if previous == '-' && depth == 0 => {
                let returned = signature[at + 1..].trim_start();
                let end = returned
                    .find(['<', ' ', '{', ';'])
                    .unwrap_or(returned.len());
                return returned[..end].rsplit("::").next() == Some("Result");
            }
            '>' if previous == '-' => {}
            ')' | ']' | '>' => depth -= 1,
            '{' | ';' if depth == 0 => return false,
            _ => {}
        }
        previous = character;
    }
    false
}

fn is_balanced(attribute: &str) -> bool {
    attribute.matches('[').count() == attribute.matches(']').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(text: &str) -> Vec<(usize, String)> {
        let file = Source {
            path: "src/a.rs".into(),
            text: text.into(),
        };
        check(&file)
            .into_iter()
            .map(|finding| (finding.line, finding.message))
            .collect()
    }

    #[test]
    fn functions_with_their_sections_are_fine() {
        let text = "\
/// Begins.
///
/// # Errors
///
/// - When late.
///
/// # Cancel safety
///
/// Cancel safe.
#[expect(
    clippy::too_many_arguments,
    reason = \"each [is] needed\"
)]
pub async fn begin(
    self,
    deadline: impl Future<Output = ()>,
) -> Result<Job, BeginError> {
    inner().await
}
";
        assert_eq!(findings(text), []);
    }

    #[test]
    fn missing_sections_are_found_where_the_function_begins() {
        let text = "\
/// Waits.
pub async fn wait(&self) {}

/// Opens.
pub fn open<F: Fn() -> u8>(
    path: &Path,
    make: F,
) -> io::Result<Self>
where
    F: Send,
{
}
";
        assert_eq!(
            findings(text),
            [
                (2, "wait has no section '# Cancel safety'".into()),
                (5, "open has no section '# Errors'".into())
            ]
        );
    }

    #[test]
    fn methods_of_public_traits_count_and_those_of_private_ones_do_not() {
        let methods = "    /// Dials.\n    async fn dial(&self) -> Result<Fd, Error>;\n}\nfn free() -> Result<(), E> {}\n";
        assert_eq!(findings(&format!("pub trait Dial {{\n{methods}")).len(), 2);
        assert_eq!(findings(&format!("trait Dial {{\n{methods}")), []);
        assert_eq!(
            findings(&format!("pub(crate) trait Dial {{\n{methods}")),
            []
        );
    }

    #[test]
    fn what_is_private_hidden_or_a_test_is_left_alone() {
        let text = "\
pub(crate) async fn inner() -> Result<(), E> {}
#[doc(hidden)]
pub fn for_macros() -> Result<(), E> {}
async fn own() {}
#[cfg(test)]
mod tests {
    pub async fn helper() -> Result<(), E> {}
}
";
        assert_eq!(findings(text), []);
    }

    #[test]
    fn only_the_functions_own_result_counts() {
        assert!(returns_result("pub fn a() -> std::result::Result<u8, E> {"));
        assert!(returns_result("pub fn a(f: impl Fn(u8) -> u8) -> Result {"));
        assert!(!returns_result(
            "pub fn a(f: impl Fn() -> Result<(), E>) -> u8 {"
        ));
        assert!(!returns_result(
            "pub fn a<F: Fn() -> Result<(), E>>(f: F) {"
        ));
        assert!(!returns_result("pub fn a() -> Option<Result<(), E>>;"));
        assert!(!returns_result(
            "pub fn a() { let f = || -> Result<(), E> { Ok(()) }; }"
        ));
    }

    #[test]
    fn a_section_belongs_to_the_item_below_it_only() {
        let text = "/// # Errors\nconst A: u8 = 1;\npub fn open() -> Result<(), E> {}\n";
        assert_eq!(findings(text).len(), 1);
    }
}
