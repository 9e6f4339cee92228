//! Which transport a target is for, and the two things done with one: dial and listen.
//!
//! Must not know how a transport came in or how it works.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::resolve::each_address;
use crate::{Builder, Deadline, Error, ErrorKind, Listener, Stream, Transport};

/// All transports of a daemon, by scheme. Cheap to clone, and never changes once built.
#[derive(Clone)]
pub struct Transports {
    by_name: Arc<BTreeMap<String, Entry>>,
}

pub(crate) struct Entry {
    pub(crate) transport: Arc<dyn Transport>,
    /// Where it came from, for people.
    pub(crate) origin: String,
}

impl Transports {
    pub(crate) fn new(by_name: BTreeMap<String, Entry>) -> Self {
        Self {
            by_name: Arc::new(by_name),
        }
    }

    /// Starts with none.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The schemes, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Connects to `target`, such as `unix:/run/qmp.sock`, `tcp:host:4444` or `vsock:3:9`.
    ///
    /// A host name is tried address by address; each gets an equal share of the time that is left.
    ///
    /// # Errors
    ///
    /// - [`ErrorKind::BadTarget`], [`ErrorKind::UnknownScheme`], [`ErrorKind::BadAddress`],
    ///   [`ErrorKind::Unresolved`]: nothing was tried.
    /// - [`ErrorKind::Failed`]: nobody there; the source has the system's reason. Of several
    ///   addresses, the last one's.
    /// - [`ErrorKind::TimedOut`]: `deadline` came first.
    /// - [`ErrorKind::Panicked`], [`ErrorKind::Breach`]: the plugin is faulty; other operations go
    ///   on.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. Dropping the future gives the attempt up and leaves no thread and no descriptor
    /// behind; only a name that the system's resolver is looking up goes on there until that ends.
    pub async fn dial(&self, target: &str, deadline: Deadline) -> Result<Stream, Error> {
        let dialed = async {
            let (transport, address) = self.find(target)?;
            let fd = each_address(
                transport,
                address,
                deadline,
                |address, deadline| async move { transport.dial(&address, deadline).await },
            );
            Stream::adopt(fd.await?)
        };
        dialed.await.map_err(|error| error.during("dial", target))
    }

    /// Listens on `target`; when this returns, peers can connect.
    ///
    /// # Errors
    ///
    /// As [`dial`](Self::dial), and [`ErrorKind::Unsupported`] from a transport that only dials.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. Dropping the future unbinds.
    pub async fn listen(&self, target: &str, deadline: Deadline) -> Result<Listener, Error> {
        let bound = async {
            let (transport, address) = self.find(target)?;
            let listening = each_address(
                transport,
                address,
                deadline,
                |address, deadline| async move { transport.listen(&address, deadline).await },
            );
            Ok(Listener::new(transport.name(), listening.await?))
        };
        bound
            .await
            .map_err(|error: Error| error.during("listen on", target))
    }

    fn find<'a>(&self, target: &'a str) -> Result<(&dyn Transport, &'a str), Error> {
        let (scheme, address) = split(target)?;
        let entry = self.by_name.get(scheme).ok_or_else(|| {
            let known = self.names().map(str::to_owned).collect();
            Error::new(ErrorKind::UnknownScheme {
                scheme: scheme.to_owned(),
                known,
            })
        })?;
        Ok((&*entry.transport, address))
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.by_name
                    .iter()
                    .map(|(name, entry)| (name, &entry.origin)),
            )
            .finish()
    }
}

fn split(target: &str) -> Result<(&str, &str), Error> {
    match target.split_once(':') {
        Some((scheme, address))
            if !scheme.is_empty() && !address.is_empty() && !address.contains('\0') =>
        {
            Ok((scheme, address))
        }
        _ => Err(Error::new(ErrorKind::BadTarget)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use std::time::Duration;

    use async_trait::async_trait;
    use tokio::time::Instant;

    use super::*;

    /// Hands over what it was given, and remembers which addresses it was asked for.
    struct Fake {
        resolves: bool,
        asked: Mutex<Vec<String>>,
        ready: Mutex<Option<OwnedFd>>,
    }

    #[async_trait]
    impl Transport for Fake {
        fn name(&self) -> &str {
            "fake"
        }

        fn resolves_names(&self) -> bool {
            self.resolves
        }

        async fn dial(&self, address: &str, _deadline: Deadline) -> Result<OwnedFd, Error> {
            self.asked.lock().unwrap().push(address.to_owned());
            let ready = self.ready.lock().unwrap().take();
            match ready {
                Some(fd) => Ok(fd),
                None => std::future::pending().await,
            }
        }
    }

    fn fake(resolves: bool, fd: Option<OwnedFd>) -> Arc<Fake> {
        Arc::new(Fake {
            resolves,
            asked: Mutex::default(),
            ready: Mutex::new(fd),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_transport_of_this_process_is_bound_by_the_same_rules() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let transport = fake(false, Some(ours.into()));
        let transports = Transports::builder()
            .register(transport.clone())
            .build()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        transports.dial("fake:any:thing", deadline).await.unwrap();
        let late = transports.dial("fake:x", deadline).await.unwrap_err();
        assert!(matches!(late.kind(), ErrorKind::TimedOut { .. }), "{late}");
        assert_eq!(Instant::now(), deadline);
        assert_eq!(*transport.asked.lock().unwrap(), ["any:thing", "x"]);
        let error = transports.listen("fake:x", deadline).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }));
    }

    #[tokio::test]
    async fn what_is_no_connected_stream_is_refused_from_this_process_too() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let transports = Transports::builder()
            .register(fake(false, Some(file.into())))
            .build()
            .unwrap();
        let error = transports
            .dial("fake:x", Instant::now() + Duration::from_secs(30))
            .await
            .unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Breach { clause: "6.1", .. }),
            "{error}"
        );
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let transports = Transports::builder()
            .register(fake(false, Some(listening.into())))
            .build()
            .unwrap();
        let error = transports
            .dial("fake:x", Instant::now() + Duration::from_secs(30))
            .await
            .unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Breach { clause: "6.1", .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_transport_that_asks_for_it_gets_numeric_addresses() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let transport = fake(true, Some(ours.into()));
        let transports = Transports::builder()
            .register(transport.clone())
            .build()
            .unwrap();
        transports
            .dial("fake:[::1]:80", Instant::now() + Duration::from_secs(30))
            .await
            .unwrap();
        assert_eq!(*transport.asked.lock().unwrap(), ["[::1]:80"]);
    }
}
