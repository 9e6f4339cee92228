//! `bench NAME`: measures one crate in release build. The benches are an example of `tests`.

use crate::error::Failure;
use crate::rig::Rig;
use crate::run;

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|word| word.starts_with('-'));
    if let Some(other) = flags.iter().find(|flag| **flag != "--short") {
        return Err(Failure::Usage(format!("bench does not know '{other}'")));
    }
    let [name] = names[..] else {
        return Err(Failure::Usage(format!(
            "bench takes one name, not {}",
            names.len()
        )));
    };
    let mut bench = Rig::prepare(None)?.cargo();
    bench.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "tests",
        "--example",
        "bench",
        "--",
    ]);
    run::run(bench.arg(name).args(flags))
}
