//! What became of a command whose answer never came, found out by a question that changes nothing.
//!
//! QEMU runs the in-band commands of a monitor one by one, so whatever answers the question has
//! done with the command before it. What is asked, and what the answer means, is pure and
//! stands beside each command; asking is all that is done here.

use crate::{
    command::Command,
    error::{Effect, Error},
    qmp::{Deadline, Qmp},
};

mod table;

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "it happened, it did not, or nobody knows"
)]
pub enum Settled {
    /// What it asks for is so. Sending it again would be wrong or useless.
    Done,
    /// What it asks for is not so, and it will not come any more. It may be sent again.
    NotDone,
    /// The question was not answered, or its answer can mean either.
    Unknown,
}

/// A command whose unknown outcome can be found out.
///
/// The answer tells of the guest, not of the command: `Done` is also said of a device that was
/// there before. Name things once, and it tells of the command.
pub trait Settle: Command {
    /// The question, a command that changes nothing.
    type Question: Command;

    /// The question for this one; `None` if it names nothing that could be asked for.
    fn question(&self) -> Option<Self::Question>;

    /// What the answer means for it.
    fn judge(&self, answer: Result<<Self::Question as Command>::Reply, Error>) -> Settled;
}

/// How a command ended that was asked about when its answer did not come.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome<T> {
    /// QEMU answered.
    Replied(T),
    /// QEMU did not answer in time, but it is done.
    Done,
}

impl dyn Qmp + '_ {
    /// Finds out what became of a command whose [`effect`](Error::effect) is unknown.
    ///
    /// Also on another connection to the same QEMU, as after a reconnect.
    ///
    /// ```
    /// use monitor_qmp::{Deadline, Effect, Error, Qmp, Settled, command::DeviceAdd};
    ///
    /// async fn plug(qmp: &dyn Qmp, soon: Deadline, later: Deadline) -> Result<(), Error> {
    ///     let add = DeviceAdd::new("virtio-rng-pci").with("id", "rng0");
    ///     match qmp.execute(&add, soon).await {
    ///         Err(error) if error.effect() == Effect::Unknown => {
    ///             match qmp.settle(&add, later).await {
    ///                 Settled::Done => Ok(()),
    ///                 Settled::NotDone => qmp.execute(&add, later).await.map(drop),
    ///                 Settled::Unknown => Err(error),
    ///             }
    ///         }
    ///         outcome => outcome.map(drop),
    ///     }
    /// }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the question changes nothing.
    pub async fn settle<C: Settle>(&self, command: &C, deadline: Deadline) -> Settled {
        match command.question() {
            Some(question) => command.judge(self.execute(question, deadline).await),
            None => Settled::Unknown,
        }
    }

    /// Sends a command once and, if its answer does not come by `deadline`, asks until `patience`
    /// what became of it. Never sends it twice.
    ///
    /// # Errors
    ///
    /// As `execute`: with [`Effect::Unknown`] only if asking did not
    /// tell either; if asking told that it was not done, with
    /// [`Effect::None`].
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`].
    pub async fn execute_settled<C: Settle>(
        &self,
        command: &C,
        deadline: Deadline,
        patience: Deadline,
    ) -> Result<Outcome<C::Reply>, Error> {
        let error = match self.execute(command, deadline).await {
            Ok(reply) => return Ok(Outcome::Replied(reply)),
            Err(error) if error.effect() != Effect::Unknown => return Err(error),
            Err(error) => error,
        };
        match self.settle(command, patience).await {
            Settled::Done => Ok(Outcome::Done),
            Settled::NotDone => Err(error.without_effect()),
            Settled::Unknown => Err(error),
        }
    }
}
