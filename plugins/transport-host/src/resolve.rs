//! From an address as the user wrote it to the attempts that are made: names become numbers, and
//! time is shared out.
//!
//! Must not know what an attempt does. No attempt outlives its deadline, whatever the transport
//! makes of it.

use std::future::Future;
use std::net::SocketAddr;

use tokio::time::{Instant, timeout_at};

use crate::{Deadline, Error, ErrorKind, Transport};

/// Tries `attempt` on the address, or on each one that it resolves to, until one works or
/// `deadline` comes.
pub(crate) async fn each_address<T, F>(
    transport: &dyn Transport,
    address: &str,
    deadline: Deadline,
    attempt: impl Fn(String, Deadline) -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let is_final = !transport.resolves_names() || address.parse::<SocketAddr>().is_ok();
    if is_final {
        return within(
            deadline,
            "the transport",
            attempt(address.to_owned(), deadline),
        )
        .await;
    }
    let addresses = within(deadline, "the resolver", resolve(address)).await?;
    try_in_turn(&addresses, deadline, attempt).await
}

/// Gives each address an equal share of the time that is left, so that one that drops packets
/// leaves some to the next.
async fn try_in_turn<T, F>(
    addresses: &[SocketAddr],
    deadline: Deadline,
    attempt: impl Fn(String, Deadline) -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut last = Error::new(ErrorKind::Unresolved);
    for (numeric, untried) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = Instant::now() + left / u32::try_from(untried).unwrap_or(u32::MAX);
        match within(share, "the transport", attempt(numeric.to_string(), share)).await {
            Ok(done) => return Ok(done),
            Err(error) => last = error.at(numeric),
        }
    }
    Err(last)
}

async fn within<T>(
    deadline: Deadline,
    whom: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let started = Instant::now();
    timeout_at(deadline, work).await.unwrap_or_else(|_elapsed| {
        Err(Error::new(ErrorKind::TimedOut {
            waited: started.elapsed(),
            steps: 0,
            last: whom.to_owned(),
        }))
    })
}

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, Error> {
    let is_host_port = address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !is_host_port {
        return Err(Error::new(ErrorKind::BadAddress {
            text: "expected HOST:PORT, or [IPV6]:PORT".to_owned(),
        }));
    }
    let found = tokio::net::lookup_host(address).await;
    let mut addresses: Vec<_> = found
        .map_err(|error| Error::new(ErrorKind::Unresolved).because(error))?
        .collect();
    addresses.dedup();
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;

    fn addresses(count: u8) -> Vec<SocketAddr> {
        (1..=count)
            .map(|last| SocketAddr::from(([192, 0, 2, last], 9)))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn silent_addresses_share_the_time_and_the_last_one_is_named() {
        let began = Instant::now();
        let tried = Mutex::new(Vec::new());
        let addresses = addresses(3);
        let outcome = try_in_turn(
            &addresses,
            began + Duration::from_secs(30),
            |address, share| {
                tried.lock().unwrap().push((address, share - began));
                std::future::pending::<Result<(), Error>>()
            },
        );
        let error = outcome.await.unwrap_err().during("dial", "tcp:somewhere:9");
        let expected = [(1, 10), (2, 20), (3, 30)]
            .map(|(last, at)| (format!("192.0.2.{last}:9"), Duration::from_secs(at)));
        assert_eq!(*tried.lock().unwrap(), expected);
        assert_eq!(
            error.to_string(),
            "cannot dial tcp:somewhere:9 at 192.0.2.3:9: deadline came after 10s, waiting for the transport"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_one_address_does_not_use_goes_to_the_others() {
        let began = Instant::now();
        let addresses = addresses(2);
        let share = try_in_turn(
            &addresses,
            began + Duration::from_secs(8),
            |address, share| async move {
                if address.starts_with("192.0.2.1:") {
                    Err(Error::new(ErrorKind::Unresolved))
                } else {
                    Ok(share)
                }
            },
        );
        assert_eq!(share.await.unwrap() - began, Duration::from_secs(8));
    }
}
