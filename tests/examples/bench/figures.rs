//! Figures with their bars: a line each for people and machines, and the same as JSON under `target/figures/`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// What a figure must keep to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtMost(f64),
    /// Told for comparison only.
    None,
}

pub(crate) struct Figures {
    name: &'static str,
    all: Vec<Value>,
    is_short: bool,
}

impl Figures {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            all: Vec::new(),
            is_short: false,
        }
    }

    pub(crate) fn put(&mut self, name: &str, value: f64, unit: &str, bar: Bar) {
        let name = format!("{}/{name}", self.name);
        let (text, limit, is_kept) = match bar {
            Bar::AtMost(limit) => (format!("bar <= {limit}"), Some(limit), value <= limit),
            Bar::None => ("bar - -".to_owned(), None, true),
        };
        println!(
            "figure {name} {value:.3} {unit} {text} {}",
            if is_kept { "ok" } else { "short" }
        );
        self.is_short |= !is_kept;
        self.all.push(
            json!({"name": name, "value": value, "unit": unit, "at_most": limit, "ok": is_kept}),
        );
    }

    /// Writes the file. Whether every bar was kept.
    pub(crate) fn end(self) -> bool {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/figures");
        let text = format!("{:#}\n", Value::from(self.all));
        let written = fs::create_dir_all(&folder)
            .and_then(|()| fs::write(folder.join(format!("{}.json", self.name)), text));
        written.expect("the target folder can be written");
        !self.is_short
    }
}
