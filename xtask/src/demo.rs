//! `demo`: the main job on a real guest. Prepares the stage; the play is an example of `tests`.

use crate::error::Failure;
use crate::rig::Rig;
use crate::run;

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(other) = arguments.iter().find(|argument| *argument != "--json") {
        return Err(Failure::Usage(format!("demo does not know '{other}'")));
    }
    let mut demo = Rig::prepare(None)?.cargo();
    demo.args([
        "run",
        "--quiet",
        "--package",
        "tests",
        "--example",
        "demo",
        "--",
    ]);
    run::run(demo.args(arguments))
}
