//! Short texts that name owners, phases and commands: free to make from a literal, cheap to clone otherwise.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// A short text: a literal, or shared. Cloning never copies the text.
#[derive(Clone)]
pub struct Label(Text);

/// Two words: a thin `Arc` lies where the literal has its length.
#[derive(Clone)]
enum Text {
    Literal(&'static str),
    Shared(Arc<Box<str>>),
}

impl Deref for Label {
    type Target = str;

    fn deref(&self) -> &str {
        match &self.0 {
            Text::Literal(text) => text,
            Text::Shared(text) => text,
        }
    }
}

impl From<&'static str> for Label {
    fn from(text: &'static str) -> Self {
        Self(Text::Literal(text))
    }
}

impl From<String> for Label {
    fn from(text: String) -> Self {
        Self(Text::Shared(Arc::new(text.into_boxed_str())))
    }
}

impl From<Arc<str>> for Label {
    fn from(text: Arc<str>) -> Self {
        Self(Text::Shared(Arc::new((*text).into())))
    }
}

impl PartialEq for Label {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Label {}

impl PartialEq<str> for Label {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<&str> for Label {
    fn eq(&self, other: &&str) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_two_words_however_it_was_made() {
        assert_eq!(size_of::<Label>(), 2 * size_of::<usize>());
        let made = [
            Label::from("web"),
            "web".to_owned().into(),
            Arc::<str>::from("web").into(),
        ];
        assert!(made.iter().all(|label| label == "web"));
    }
}
