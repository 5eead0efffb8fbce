//! A Kubernetes API server as far as lists and watches go, behind TLS, from a table that a test changes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// The namespace of the kubeconfig's context.
pub(crate) const NAMESPACE: &str = "models";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices";
pub(crate) const PODS: &str = "/api/v1/namespaces/models/pods";

/// What was asked since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) lists: usize,
    pub(crate) watches: usize,
    /// Answered with 401, 403 or 410, or not at all.
    pub(crate) refused: usize,
}

/// How the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// It closes each connection without an answer.
    Away,
    /// Every request is forbidden.
    Forbids,
}

struct State {
    version: u64,
    /// The oldest version that is remembered.
    oldest: u64,
    /// By collection and name.
    objects: BTreeMap<(String, String), Value>,
    /// Version, kind, collection, object.
    events: Vec<(u64, &'static str, String, Value)>,
    token: String,
    mood: Mood,
    /// Watches that began before the last of these end: cut off, or with a word.
    cuts: usize,
    expiries: usize,
    asked: Asked,
}

pub(crate) struct ApiServer {
    shared: Arc<(Mutex<State>, Condvar)>,
    directory: tempfile::TempDir,
}

impl ApiServer {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let state = State {
            version: 100,
            oldest: 0,
            objects: BTreeMap::new(),
            events: Vec::new(),
            token: "first".to_owned(),
            mood: Mood::Well,
            cuts: 0,
            expiries: 0,
            asked: Asked::default(),
        };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let serving = Arc::clone(&shared);
        let identity = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let authority = pem(identity.cert.der());
        let tls = Arc::new(tls(&identity));
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let (shared, tls) = (Arc::clone(&serving), Arc::clone(&tls));
                std::thread::spawn(move || {
                    let connection = ServerConnection::new(tls).expect("a connection");
                    let mut stream = StreamOwned::new(connection, socket);
                    while serve(&shared, &mut stream).is_some() {}
                });
            }
        });
        let server = Self { shared, directory: tempfile::tempdir().expect("a directory") };
        std::fs::write(server.file("ca.pem"), authority).expect("written");
        server.write_token("first");
        server.write_kubeconfig(address);
        server
    }

    /// For `KUBECONFIG`.
    pub(crate) fn kubeconfig(&self) -> String {
        self.file("kubeconfig").to_str().expect("UTF-8").to_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_kubeconfig(&self, address: SocketAddr) {
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": format!("https://{address}"), "certificate-authority": self.file("ca.pem")}}],
            "users": [{"name": "it", "user": {"tokenFile": self.file("token")}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": NAMESPACE}}],
        });
        std::fs::write(self.file("kubeconfig"), text.to_string()).expect("written");
    }

    fn write_token(&self, token: &str) {
        std::fs::write(self.file("token"), token).expect("written");
    }

    /// The token that is asked for from now on; the old one is refused with 401.
    pub(crate) fn rotate(&self, token: &str) {
        self.write_token(token);
        self.change(|state| state.token = token.to_owned());
    }

    /// Adds or changes an object.
    pub(crate) fn put(&self, collection: &str, name: &str, mut object: Value) {
        self.change(|state| {
            state.version += 1;
            object["metadata"]["name"] = name.into();
            object["metadata"]["namespace"] = NAMESPACE.into();
            object["metadata"]["resourceVersion"] = state.version.to_string().into();
            let key = (collection.to_owned(), name.to_owned());
            let kind = if state.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
            state.events.push((state.version, kind, collection.to_owned(), object));
        });
    }

    pub(crate) fn remove(&self, collection: &str, name: &str) {
        self.change(|state| {
            state.version += 1;
            let mut object = state.objects.remove(&(collection.to_owned(), name.to_owned())).expect("it is there");
            object["metadata"]["resourceVersion"] = state.version.to_string().into();
            state.events.push((state.version, "DELETED", collection.to_owned(), object));
        });
    }

    /// Tells those who watch up to where they know everything.
    pub(crate) fn bookmark(&self, collection: &str, kind: &str) {
        self.change(|state| {
            state.version += 1;
            let mark =
                json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()}});
            state.events.push((state.version, "BOOKMARK", collection.to_owned(), mark));
        });
    }

    /// Breaks all watches off.
    pub(crate) fn cut(&self) {
        self.change(|state| state.cuts += 1);
    }

    /// Forgets the past; who watches is told so.
    pub(crate) fn expire(&self) {
        self.change(|state| {
            state.expiries += 1;
            state.oldest = state.version;
        });
    }

    /// Forgets the past without a word.
    pub(crate) fn forget(&self) {
        self.change(|state| state.oldest = state.version);
    }

    /// Breaks all watches off and is like this from now on.
    pub(crate) fn be(&self, mood: Mood) {
        self.change(|state| {
            state.cuts += 1;
            state.mood = mood;
        });
    }

    pub(crate) fn asked(&self) -> Asked {
        self.shared.0.lock().expect("no panic").asked
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.0.lock().expect("no panic"));
        self.shared.1.notify_all();
    }
}

fn pem(certificate: &[u8]) -> String {
    let text = STANDARD.encode(certificate);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

fn tls(identity: &rcgen::CertifiedKey<rcgen::KeyPair>) -> ServerConfig {
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(identity.signing_key.serialize_der()).into();
    ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![identity.cert.der().clone()], key)
        .expect("a certificate and its key")
}

/// Answers one request; `None` when the connection is over.
fn serve(shared: &(Mutex<State>, Condvar), socket: &mut (impl Read + Write)) -> Option<()> {
    let head = head(socket)?;
    let target = head.lines().next()?.split(' ').nth(1)?;
    let (collection, query) = target.split_once('?')?;
    let query: BTreeMap<&str, String> =
        query.split('&').filter_map(|pair| pair.split_once('=').map(|(key, value)| (key, decoded(value)))).collect();
    let token = head.lines().find_map(|line| line.strip_prefix("authorization: Bearer ")).unwrap_or_default();
    let mut state = shared.0.lock().expect("no panic");
    let refused = match state.mood {
        Mood::Away => None,
        _ if token.trim() != state.token => Some((401, "Unauthorized")),
        Mood::Forbids => Some((403, "Forbidden")),
        Mood::Well => Some((0, "")),
    };
    let watch = query.get("watch").is_some_and(|watch| watch == "true");
    let from = || query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok());
    let refused = match refused {
        Some((0, _)) if watch && from()? < state.oldest => Some((410, "Expired")),
        refused => refused,
    };
    match refused {
        Some((0, _)) => {}
        refused => {
            state.asked.refused += 1;
            let (code, reason) = refused?;
            let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                "message": format!("the test says {reason}")});
            return answer(socket, &format!("{code} {reason}"), &body.to_string());
        }
    }
    let selector = query.get("labelSelector").cloned().unwrap_or_default();
    if watch {
        state.asked.watches += 1;
        assert_eq!(query.get("allowWatchBookmarks").map(String::as_str), Some("true"), "{target}");
        let (from, seen) = (from()?, (state.cuts, state.expiries));
        drop(state);
        return follow(shared, socket, collection, &selector, from, seen);
    }
    state.asked.lists += 1;
    let items: Vec<&Value> = state
        .objects
        .iter()
        .filter(|((of, _), object)| of == collection && selects(&selector, object))
        .map(|(_, object)| object)
        .collect();
    let body = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()}, "items": items});
    drop(state);
    answer(socket, "200 OK", &body.to_string())
}

/// Sends events until the watch is ended.
fn follow(
    shared: &(Mutex<State>, Condvar),
    socket: &mut impl Write,
    collection: &str,
    selector: &str,
    mut from: u64,
    seen: (usize, usize),
) -> Option<()> {
    let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head).and_then(|()| socket.flush()).ok()?;
    let mut chunk = |event: Value| {
        let line = format!("{event}\n");
        // In two pieces, as networks cut them.
        let (head, tail) = line.split_at(line.len() / 2);
        for piece in [head, tail] {
            let chunk = format!("{:x}\r\n{piece}\r\n", piece.len());
            socket.write_all(chunk.as_bytes()).and_then(|()| socket.flush()).ok()?;
        }
        Some(())
    };
    let mut state = shared.0.lock().expect("no panic");
    loop {
        if state.cuts != seen.0 {
            return None;
        }
        let fresh: Vec<_> = state
            .events
            .iter()
            .filter(|(version, kind, of, object)| {
                *version > from && of == collection && (*kind == "BOOKMARK" || selects(selector, object))
            })
            .map(|(version, kind, _, object)| (*version, json!({"type": kind, "object": object})))
            .collect();
        if state.expiries != seen.1 {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                "reason": "Expired", "message": "too old resource version"});
            chunk(json!({"type": "ERROR", "object": status}))?;
            return None;
        }
        if fresh.is_empty() {
            state = shared.1.wait_timeout(state, Duration::from_secs(60)).expect("no panic").0;
            continue;
        }
        drop(state);
        for (version, event) in fresh {
            from = version;
            chunk(event)?;
        }
        state = shared.0.lock().expect("no panic");
    }
}

fn head(socket: &mut impl Read) -> Option<String> {
    let mut head = String::new();
    let mut reader = BufReader::with_capacity(1, socket.take(65536));
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

fn answer(socket: &mut impl Write, status: &str, body: &str) -> Option<()> {
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all(format!("{head}{body}").as_bytes()).and_then(|()| socket.flush()).ok()
}

/// Whether an object has all labels of `a=b,c=d`.
fn selects(selector: &str, object: &Value) -> bool {
    let labels = &object["metadata"]["labels"];
    selector.split(',').all(|pair| pair.split_once('=').is_some_and(|(key, value)| labels[key] == value))
}

fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at(2);
        bytes.push(u8::from_str_radix(code, 16).expect("a percent code"));
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).expect("UTF-8")
}
