//! How a test of the suite is written down and run: a sentence, an async function, and what it needs of the machine.

use std::pin::Pin;
use std::sync::Arc;

use libtest_mimic::{Completion, Trial};
use tokio::runtime::Builder;

use crate::rig::{Env, Rig};

/// A test on a rig of its own.
pub(crate) type Test = fn(Rig) -> Pin<Box<dyn Future<Output = Completion> + Send>>;
/// The tests of a module, by name.
pub(crate) type Tests = &'static [(&'static str, Test)];

/// What a test comes back with: nothing, or what the machine lacks for it beside QEMU and a guest.
pub(crate) trait Outcome {
    fn completion(self) -> Completion;
}

impl Outcome for () {
    fn completion(self) -> Completion {
        Completion::Completed
    }
}

impl Outcome for Completion {
    fn completion(self) -> Completion {
        self
    }
}

/// Writes the table of a module's tests: the functions' names are the sentences.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: $crate::harness::Tests =
            &[$((stringify!($name), |rig| {
                Box::pin(async { $crate::harness::Outcome::completion($name(rig).await) })
            })),*];
    };
}
pub(crate) use tests;

/// A module's tests, named `real::MODULE::SENTENCE`; ignored, with the reason, where there is no QEMU or guest.
pub(crate) fn trials(module: &'static str, tests: Tests) -> impl Iterator<Item = Trial> {
    let env = Arc::new(Env::find());
    tests.iter().map(move |&(name, test)| {
        let env = env.clone();
        Trial::ignorable_test(format!("real::{module}::{name}"), move || match &*env {
            Ok(env) => Ok(run(env, test)),
            Err(missing) => Ok(Completion::ignored_with(missing)),
        })
    })
}

/// Two threads, as a small daemon has them.
fn run(env: &Env, test: Test) -> Completion {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime
        .expect("a runtime can be made")
        .block_on(async { test(Rig::new(env)).await })
}
