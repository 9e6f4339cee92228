//! How a test of the suite is written down and run: a sentence, an async function, and what it needs of the machine.

use std::pin::Pin;
use std::sync::Arc;

use libtest_mimic::{Completion, Trial};
use tokio::runtime::Builder;

use crate::rig::{Env, Rig};

/// A test on a rig of its own.
pub(crate) type Test = fn(Rig) -> Pin<Box<dyn Future<Output = ()> + Send>>;
/// The tests of a module, by name.
pub(crate) type Tests = &'static [(&'static str, Test)];

/// Writes the table of a module's tests: the functions' names are the sentences.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: $crate::harness::Tests =
            &[$((stringify!($name), |rig| Box::pin($name(rig)))),*];
    };
}
pub(crate) use tests;

/// A module's tests, named `real::MODULE::SENTENCE`; ignored, with the reason, where there is no QEMU or guest.
pub(crate) fn trials(module: &'static str, tests: Tests) -> impl Iterator<Item = Trial> {
    let env = Arc::new(Env::find());
    tests.iter().map(move |&(name, test)| {
        let env = env.clone();
        Trial::ignorable_test(format!("real::{module}::{name}"), move || match &*env {
            Ok(env) => {
                run(env, test);
                Ok(Completion::Completed)
            }
            Err(missing) => Ok(Completion::ignored_with(missing)),
        })
    })
}

/// Two threads, as a small daemon has them.
fn run(env: &Env, test: Test) {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime
        .expect("a runtime can be made")
        .block_on(async { test(Rig::new(env)).await });
}
