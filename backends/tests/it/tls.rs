//! Workers behind TLS: trusted ones are reached, all others are not sent a byte of the request.

use std::sync::{Arc, LazyLock};

use forebay_backends::{
    Error,
    transport::{Channel, Endpoint, Timeouts, Transport},
};
use forebay_scheduler::Failure;
use rcgen::{CertifiedKey, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::support::{Server, post};

/// A certificate for `localhost` and 127.0.0.1 that is its own authority, made anew for each run.
static IDENTITY: LazyLock<CertifiedKey<KeyPair>> = LazyLock::new(|| {
    rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("a certificate")
});

fn certificate() -> CertificateDer<'static> {
    IDENTITY.cert.der().clone()
}

/// Speaks TLS as `localhost` and 127.0.0.1, and these protocols inside, the first one by preference.
pub(crate) fn acceptor(protocols: &[&[u8]]) -> TlsAcceptor {
    let key = PrivateKeyDer::try_from(IDENTITY.signing_key.serialize_der()).expect("a key");
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate()], key)
        .expect("a server configuration");
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// Answers each request `ok`; gives back its port.
async fn tls_server(tracker: &TaskTracker, address: &str) -> u16 {
    let acceptor = acceptor(&[b"http/1.1"]);
    let listener = TcpListener::bind((address, 0)).await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let spawn = tracker.clone();
    tracker.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            spawn.spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
                let mut request = Vec::new();
                while stream.read_buf(&mut request).await.is_ok_and(|read| read > 0) {
                    if request.ends_with(b"\r\n\r\nping") {
                        request.clear();
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                        stream.write_all(answer).await.expect("a client that listens");
                    }
                }
            });
        }
    });
    port
}

pub(crate) fn channel(url: &str, trusted: bool) -> Channel {
    let mut roots = RootCertStore::empty();
    if trusted {
        roots.add(certificate()).expect("an authority");
    }
    let endpoint = Endpoint::new(&url.parse().expect("a URL"), None).expect("an endpoint");
    Transport::with_roots(TaskTracker::new(), roots).channel(endpoint, Timeouts::default())
}

#[tokio::test]
async fn a_trusted_worker() {
    let tracker = TaskTracker::new();
    let port = tls_server(&tracker, "127.0.0.1").await;
    for host in ["localhost", "127.0.0.1"] {
        let channel = channel(&format!("https://{host}:{port}"), true);
        for _ in 0..3 {
            let answer = channel.send(post("ping")).await.expect("an answer");
            assert_eq!(answer.body.collect(2).await.expect("a body"), "ok");
        }
        assert_eq!(channel.idle_connections(), 1, "{host}");
    }
}

#[tokio::test]
async fn workers_that_are_not_trusted() {
    let tracker = TaskTracker::new();
    let port = tls_server(&tracker, "127.0.0.1").await;
    let elsewhere = tls_server(&tracker, "127.0.0.2").await;
    let plain = Server::start(|mut served| async move { served.send("HTTP/1.1 400 Bad Request\r\n\r\n").await }).await;
    for (why, channel) in [
        ("unknown authority", channel(&format!("https://localhost:{port}"), false)),
        ("other name", channel(&format!("https://127.0.0.2:{elsewhere}"), true)),
        ("no TLS", channel(&format!("https://{}", plain.address), true)),
    ] {
        let error = channel.send(post("ping")).await.err().expect(why);
        assert!(matches!(error, Error::Tls { .. }), "{why}: {error:?}");
        assert_eq!(error.failure(), Failure::Connect, "{why}");
    }
    // What speaks TLS is asked in the clear.
    let answer = channel(&format!("http://localhost:{port}"), true).send(post("ping")).await;
    assert!(matches!(answer.err(), Some(Error::Malformed { .. } | Error::Reset { .. })));
}

#[tokio::test]
async fn the_machines_own_authorities_do_not_vouch_for_the_test() {
    let tracker = TaskTracker::new();
    let port = tls_server(&tracker, "127.0.0.1").await;
    let url = format!("https://localhost:{port}").parse().expect("a URL");
    let endpoint = Endpoint::new(&url, None).expect("an endpoint");
    let channel = Transport::new(TaskTracker::new()).channel(endpoint, Timeouts::default());
    let error = channel.send(post("ping")).await.err().expect("not trusted");
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
}
