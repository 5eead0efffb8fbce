//! Prompts that one server computes and another goes on from: `kv_transfer_params` of vLLM's NixlConnector in pull mode.
//!
//! A server for prompts keeps the blocks of one until they were fetched or its lease ends; one that decodes fetches them
//! before it begins, from the address that it is given. Here that address is the server's own port. What is written wrong
//! is refused, also what vLLM would pass over, since whoever wrote it meant something else.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use super::{
    error::Failure,
    fields::Fields,
    request::{Common, chained},
    stream::{DONE, event},
};
use crate::{
    control::KV_PATH,
    server::{Answer, Service},
};

/// Prompts that are kept at a time.
const KEPT_MAX: usize = 65_536;
/// The longest wait for another server.
const FETCH_LIMIT: Duration = Duration::from_secs(5);
/// What that may say at most.
const FETCH_BYTES_MAX: u64 = 16 << 20;

/// What a server was started for, as `kv_role` says it to vLLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PairRole {
    /// Whole requests: there is no connector.
    #[default]
    None,
    Prefill,
    Decode,
}

/// The prompts that a server keeps for others, and what became of them.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// The server's own.
    pub(crate) port: u16,
    kept: Mutex<HashMap<String, (Instant, Vec<u64>)>>,
    given: AtomicU64,
    fetched: AtomicU64,
}

impl Pairs {
    pub(crate) fn new(port: u16) -> Self {
        Self { port, kept: Mutex::default(), given: AtomicU64::new(0), fetched: AtomicU64::new(0) }
    }

    /// Gives a prompt's blocks away, as JSON.
    pub(crate) fn give(&self, request: &str) -> Option<Value> {
        let (until, blocks) = self.kept.lock().remove(request)?;
        if until <= Instant::now() {
            return None;
        }
        self.given.fetch_add(1, Ordering::Relaxed);
        Some(json!(blocks))
    }

    pub(crate) fn describe(&self) -> Value {
        let now = Instant::now();
        let kept = self.kept.lock().values().filter(|(until, _)| *until > now).count();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({"kept": kept, "given": read(&self.given), "fetched": read(&self.fetched)})
    }

    fn keep(&self, request: &str, until: Instant, blocks: Vec<u64>) {
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT_MAX {
            kept.retain(|_, (until, _)| *until > Instant::now());
        }
        kept.insert(request.to_owned(), (until, blocks));
    }
}

/// A request's part of the work.
pub(super) enum Part {
    Whole,
    /// Compute the prompt and keep it.
    Keep,
    /// Go on from one that was kept there, under this name.
    Fetch {
        address: String,
        request: String,
    },
}

impl Part {
    /// Of the request whose answer has this id.
    pub(super) fn read(
        service: &Service,
        fields: &Fields<'_>,
        common: &Common,
        answer_id: &str,
    ) -> Result<Self, Failure> {
        let Some(params) = fields.object("kv_transfer_params")? else { return Ok(Self::Whole) };
        let flag = |name: &str| params.get(name).and_then(Value::as_bool);
        match (service.options.pair_role, flag("do_remote_decode"), flag("do_remote_prefill")) {
            (PairRole::None, ..) => Ok(Self::Whole),
            (PairRole::Prefill, Some(true), Some(false)) => {
                let empty = ["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"];
                let whole = empty.iter().all(|name| params.get(*name) == Some(&Value::Null));
                if !whole || common.stream || !common.is_one_token() {
                    return Err(wrong("a prompt alone is one token, not streamed, of nobody's blocks"));
                }
                Ok(Self::Keep)
            }
            (PairRole::Decode, Some(false), Some(true)) => Self::fetches(params, answer_id),
            _ => Err(wrong("this server was not started for that part")),
        }
    }

    fn fetches(params: &Map<String, Value>, answer_id: &str) -> Result<Self, Failure> {
        let text = |name: &str| params.get(name).and_then(Value::as_str);
        let number = |name: &str| params.get(name).and_then(Value::as_u64);
        let complete = params.get("remote_block_ids").is_some_and(Value::is_array)
            && text("remote_engine_id").is_some()
            && number("tp_size").is_some()
            && number("remote_num_tokens").is_some();
        let (Some(host), Some(port), Some(request), true) =
            (text("remote_host"), number("remote_port"), text("remote_request_id"), complete)
        else {
            return Err(wrong("what the other server gave is not complete"));
        };
        if request != answer_id {
            return Err(wrong("the other server knows the request by another name"));
        }
        Ok(Self::Fetch { address: format!("{host}:{port}"), request: request.to_owned() })
    }

    /// Fetches what is to be fetched into the cache.
    pub(super) async fn fetch(&self, service: &Service, prompt: &[u32], common: &Common) -> Result<(), Failure> {
        let Self::Fetch { address, request } = self else { return Ok(()) };
        let fetched = tokio::time::timeout(FETCH_LIMIT, ask(address, request)).await.ok().flatten();
        let own = chained(service, prompt, common.cache_salt.as_deref(), None);
        // blocks of another prompt would be read as if they were this one's
        let blocks = fetched.filter(|blocks| own.starts_with(blocks)).ok_or_else(Failure::load_failed)?;
        service.driver.fill(&blocks);
        service.pairs.fetched.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// What the answer says of the cache.
    pub(super) fn given(&self, service: &Service, prompt: &[u32], common: &Common, answer_id: &str) -> Value {
        if !matches!(self, Self::Keep) {
            return Value::Null;
        }
        let blocks = chained(service, prompt, common.cache_salt.as_deref(), None);
        let ids: Vec<usize> = (1..=blocks.len()).collect();
        service.pairs.keep(answer_id, Instant::now() + service.options.kv_lease, blocks);
        json!({
            "do_remote_prefill": true,
            "do_remote_decode": false,
            "remote_block_ids": [ids],
            "remote_engine_id": format!("simulated-{}", service.pairs.port),
            "remote_request_id": answer_id,
            "remote_host": "127.0.0.1",
            "remote_port": service.pairs.port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": prompt.len(),
            "remote_blocks_expiry_time": null,
            "remote_registration_generation": 0,
            "transfer_mode": "pull",
        })
    }
}

/// A failure once the answer may have begun: a stream has its status by then.
pub(super) fn failed(failure: Failure, common: &Common) -> Result<Answer, Failure> {
    if !common.stream {
        return Err(failure);
    }
    let events: Vec<Bytes> = vec![event(failure.body()), DONE];
    Ok(Answer::Events(Box::pin(stream::iter(events))))
}

fn wrong(message: &str) -> Failure {
    Failure::plain(StatusCode::BAD_REQUEST, &format!("kv_transfer_params: {message}."))
}

/// The blocks of a prompt, from the server that keeps them.
async fn ask(address: &str, request: &str) -> Option<Vec<u64>> {
    let mut socket = TcpStream::connect(address).await.ok()?;
    let head = format!("POST {KV_PATH}{request} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await.ok()?;
    let mut answer = String::new();
    socket.take(FETCH_BYTES_MAX).read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str(body).ok().filter(|_| head.starts_with("HTTP/1.1 200"))
}
