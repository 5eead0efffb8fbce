//! `[[model]]`, `[[model.worker]]` and `[[model.fallback]]`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::num::NonZeroU32;
use std::time::Duration;

use forebay_backends::engines::{self, Api};
use forebay_backends::signals::kv_events::KvSource;
use forebay_backends::transport::zmtp;
use forebay_scheduler::{Policy, Role};
use url::Url;

use super::log::{At, Log};
use super::mistake::quoted;
use super::tree::{Found, Raw, Refusal, Section};
use super::{
    Fallback, GpuName, MicroBatch, Model, Name, Node, Reader, Trouble, Worker, adapter, defaults, discover, node,
    secret, tokenizer,
};

/// The engine that is spoken to in gRPC.
const GRPC_ENGINE: &str = "triton";

/// Names that stand already, and where.
#[derive(Default)]
pub(super) struct Taken(BTreeMap<String, At>);

/// What only one model may have.
#[derive(Default)]
struct Owned {
    /// Names and aliases.
    names: Taken,
    /// Where `default` stands.
    default: Option<At>,
}

impl Owned {
    fn take_default(&mut self, log: &Log<'_>, found: &Found<bool>) {
        match &self.default {
            _ if !found.value => {}
            Some(first) => {
                let remedy = format!("must stand at one model only: {} is it already", log.mention(first));
                log.refuse(&found.at, "true", remedy);
            }
            None => self.default = Some(found.at.clone()),
        }
    }
}

impl Taken {
    /// Whether the name was free. `rule` is what a second owner of it breaks.
    pub(super) fn take(&mut self, log: &Log<'_>, name: &str, at: &At, rule: &str) -> bool {
        match self.0.entry(name.to_owned()) {
            Entry::Occupied(first) => {
                let remedy = format!("{rule}: {} has it already", log.mention(first.get()));
                log.refuse(at, quoted(name), remedy);
                false
            }
            Entry::Vacant(place) => {
                place.insert(at.clone());
                true
            }
        }
    }
}

/// Every model that could be read; what could not is in the log.
pub(super) fn read_all(root: &mut Section<'_>, reader: &Reader, nodes: &[Node], body_bytes_max: usize) -> Vec<Model> {
    let (mut owned, mut worker_names) = (Owned::default(), Taken::default());
    let mut targets = Vec::new();
    let log = root.log;
    let sections = root.tables("model", "model").into_iter();
    let models = sections
        .filter_map(|section| {
            read(section, (reader, nodes), body_bytes_max, &mut owned, &mut worker_names, &mut targets)
        })
        .collect();
    let names = &owned.names.0;
    for target in targets.iter().filter(|target| !names.contains_key(target.value.as_str())) {
        let known: Vec<&str> = names.keys().map(String::as_str).collect();
        let remedy = format!("must be a model of this file: {}", known.join(", "));
        log.refuse_absence(&target.at, quoted(&target.value), remedy);
    }
    models
}

fn read(
    mut section: Section<'_>,
    (reader, nodes): (&Reader, &[Node]),
    body_bytes_max: usize,
    owned: &mut Owned,
    worker_names: &mut Taken,
    targets: &mut Vec<Found<Name>>,
) -> Option<Model> {
    let log = section.log;
    let own_name = section.required("name", "write the name that clients ask for", model_name);
    let aliases = section.list("aliases", name);
    for name in own_name.iter().chain(&aliases) {
        owned.names.take(log, &name.value, &name.at, "must be unique among names and aliases");
    }
    let default = section.read("default", |raw| raw.boolean());
    default.iter().for_each(|found| owned.take_default(log, found));
    let tokenizer = section.read("tokenizer", |raw| tokenizer::directory(raw.text()?, &reader.environment));
    let max_model_len = section.optional_count("max_model_len", u32::MAX, "to take what the workers report");
    let policy = section.read("policy", policy);
    // A body that may be read must fit into an empty queue.
    let queue_bytes = (body_bytes_max as u64)..=defaults::QUEUE_BYTES_LIMIT;
    let queue_bytes_default = defaults::QUEUE_BYTES_MAX.max(body_bytes_max);
    let queue_bytes_max = section.bytes("queue_bytes_max", queue_bytes, queue_bytes_default);
    let queue_requests_max =
        section.count("queue_requests_max", defaults::QUEUE_REQUESTS_LIMIT, defaults::QUEUE_REQUESTS_MAX);
    let queue_tokens = 1..=defaults::QUEUE_TOKENS_LIMIT;
    let queue_tokens_max = section.whole("queue_tokens_max", queue_tokens, defaults::QUEUE_TOKENS_MAX);
    let queue_wait_max = section.seconds("queue_seconds_max", 1, defaults::QUEUE_WAIT_MAX);
    let worker_grace = section.seconds("worker_grace_seconds", 0, defaults::WORKER_GRACE);
    let attempts_max = section.count("attempts_max", defaults::ATTEMPTS_LIMIT, defaults::ATTEMPTS_MAX);
    let first_byte_timeout = section.seconds("first_byte_seconds", 1, defaults::FIRST_BYTE_TIMEOUT);
    let first_token_timeout = section.read("first_token_seconds", |raw| {
        raw.whole(&(1..=defaults::SECONDS_MAX), "to wait as long as first_byte_seconds says").map(Duration::from_secs)
    });
    let hedge_after = section.optional_count("hedge_after_ms", defaults::HEDGE_AFTER_LIMIT, "to never ask twice");
    let idle_timeout = section.seconds("idle_seconds", 1, defaults::IDLE_TIMEOUT);
    let split_tokens_min = section.count("split_tokens_min", u32::MAX, defaults::SPLIT_TOKENS_MIN);
    let class_shares = class_shares(&mut section);
    let own_names: Vec<&Name> = own_name.iter().chain(&aliases).map(|found| &found.value).collect();
    let fallbacks = fallbacks(&mut section, &own_names, targets);
    let coalesce = section.boolean("coalesce", false);
    let continue_streams = section.boolean("continue_streams", false);
    let micro_batch = micro_batch(&mut section);
    let adapters = adapter::read_all(&mut section, &mut owned.names);
    let adapters_max =
        section.optional_count("adapters_max", defaults::ADAPTERS_LIMIT, "to take what the workers' engines say");
    let discover = discover::read_all(&mut section, reader);
    let workers = workers(&mut section, (reader, nodes), worker_names);
    section.finish(&["overflow"]);
    Some(Model {
        name: own_name?.value,
        aliases: aliases.into_iter().map(|found| found.value).collect(),
        is_default: default.is_some_and(|found| found.value),
        tokenizer: tokenizer.map(|found| found.value),
        policy: policy.map(|found| found.value).unwrap_or_default(),
        max_model_len,
        queue_requests_max,
        queue_tokens_max,
        queue_bytes_max,
        queue_wait_max,
        worker_grace,
        class_shares,
        attempts_max,
        first_byte_timeout,
        first_token_timeout: first_token_timeout.map(|found| found.value),
        hedge_after: hedge_after.map(|after| Duration::from_millis(after.get().into())),
        idle_timeout,
        split_tokens_min,
        fallbacks,
        micro_batch,
        coalesce,
        adapters,
        adapters_max,
        continue_streams,
        workers,
        discover,
    })
}

/// Those of a model with these names; what they lead to goes to `targets`, to be looked for once all models are known.
fn fallbacks(model: &mut Section<'_>, own_names: &[&Name], targets: &mut Vec<Found<Name>>) -> Vec<Fallback> {
    let log = model.log;
    let mut seen: BTreeMap<Name, At> = BTreeMap::new();
    let mut fallbacks = Vec::new();
    for mut section in model.tables("fallback", "model.fallback") {
        let to = section.required("to", "write the name of the model that is to answer", name);
        let on: Vec<Trouble> = section.list("on", trouble).into_iter().map(|found| found.value).collect();
        if section.is_empty_list("on") {
            log.refuse(&section.at("on"), "nothing", format!("must name {}", troubles()));
        }
        section.finish(&[]);
        let Some(to) = to else { continue };
        if own_names.contains(&&to.value) {
            log.refuse(&to.at, quoted(&to.value), "must be another model: this one leads back to itself");
        } else if let Some(first) = seen.get(&to.value) {
            let remedy = format!("must stand once in a model: {} leads there, too", log.mention(first));
            log.refuse(&to.at, quoted(&to.value), remedy);
        } else {
            seen.insert(to.value.clone(), to.at.clone());
            let usual = || Trouble::ALL.map(|(_, trouble)| trouble).into_iter();
            let on = if on.is_empty() { usual().filter(|on| *on != Trouble::ContentFilter).collect() } else { on };
            fallbacks.push(Fallback { to: to.value.clone(), on });
            targets.push(to);
        }
    }
    fallbacks
}

fn trouble(raw: &Raw<'_>) -> Result<Trouble, Refusal> {
    let text = raw.text()?;
    let known = Trouble::ALL.iter().find(|(name, _)| *name == text);
    known.map(|(_, trouble)| *trouble).ok_or_else(|| Refusal::new(format!("must be {}", troubles())))
}

fn troubles() -> String {
    format!("one of {} (omit `on` for all but content_filter)", Trouble::ALL.map(|(name, _)| name).join(", "))
}

/// `[model.classes]`: what each class is sure of.
fn class_shares(model: &mut Section<'_>) -> [f64; 3] {
    let Some(mut section) = model.optional_table("classes", "model.classes") else { return defaults::CLASS_SHARES };
    let [interactive, default, batch] = defaults::CLASS_SHARES;
    let shares =
        [section.share("interactive", interactive), section.share("default", default), section.share("batch", batch)];
    let sum: f64 = shares.iter().sum();
    if sum > 1.0 {
        let remedy = "the shares of the classes must be at most 1 together";
        section.log.refuse_absence(&section.here(), format!("{sum}"), remedy);
    }
    section.finish(&[]);
    shares
}

/// `[model.micro_batch]`.
fn micro_batch(model: &mut Section<'_>) -> Option<MicroBatch> {
    let default = MicroBatch::default();
    let Some(mut section) = model.optional_table("micro_batch", "model.micro_batch") else { return Some(default) };
    let tokens = 0..=defaults::MICRO_BATCH_TOKENS_LIMIT;
    let max_tokens = section.whole("max_tokens", tokens, default.max_tokens.get().into());
    let max_delay = section.milliseconds("max_delay_ms", defaults::MICRO_BATCH_DELAY_LIMIT, default.max_delay);
    section.finish(&[]);
    let max_tokens = u32::try_from(max_tokens).ok().and_then(NonZeroU32::new)?;
    Some(MicroBatch { max_tokens, max_delay })
}

fn workers(model: &mut Section<'_>, given: (&Reader, &[Node]), names: &mut Taken) -> Vec<Worker> {
    let log = model.log;
    let sections = model.tables("worker", "model.worker");
    if sections.is_empty() && !model.holds("discover") {
        log.refuse_absence(
            &model.at("worker"),
            "missing",
            "add a `[[model.worker]]` with its `url` below the model, or a `[[model.discover]]`",
        );
    }
    let mut workers = Vec::new();
    // One address may serve a model of ours under two names of its own, but not twice under the same.
    let mut seen: BTreeMap<(Url, Option<Name>), At> = BTreeMap::new();
    for Found { value: worker, at } in sections.into_iter().filter_map(|section| worker(section, given, names)) {
        match seen.entry((worker.url.clone(), worker.model.clone())) {
            Entry::Occupied(first) => {
                let remedy = format!("must stand once in a model: {} is the same", log.mention(first.get()));
                log.refuse(&at, quoted(worker.url.as_str()), remedy);
            }
            Entry::Vacant(place) => {
                place.insert(at);
            }
        }
        workers.push(worker);
    }
    let has = |role| workers.iter().any(|worker: &Worker| worker.role == role);
    if has(Role::Prefill) && !has(Role::Decode) && !model.holds("discover") {
        let remedy =
            "add a worker with `role = \"decode\"`, which goes on from the prompts that those for prefill compute";
        log.refuse_absence(&model.at("worker"), "no role decode", remedy);
    }
    workers
}

/// The worker and the place of its URL.
pub(super) fn worker(
    mut section: Section<'_>,
    (reader, nodes): (&Reader, &[Node]),
    names: &mut Taken,
) -> Option<Found<Worker>> {
    let log = section.log;
    let own_name = section.read("name", name);
    let url = section.required("url", "write the worker's address, as in url = \"http://gpu-a:8000\"", address);
    let engine = section.read("engine", |raw| engine(raw, &reader.engines));
    if let (Some(url), Some(engine)) = (&url, &engine)
        && url.value.grpc
        && engine.value != GRPC_ENGINE
    {
        let remedy = format!("must be {GRPC_ENGINE} where the address is grpc://: others are spoken to in HTTP");
        log.refuse(&engine.at, quoted(engine.value), remedy);
    }
    let model = section.read("model", name);
    let role = section.read("role", role).map(|found| found.value).unwrap_or_default();
    let api_key = section.read("api_key", |raw| secret::read(raw, &reader.environment));
    let http2 = section.boolean("http2", false);
    let kv_events = section.read("kv_events", zmq_address);
    let kv_events_replay = section.read("kv_events_replay", zmq_address);
    if let (None, Some(replay)) = (&kv_events, &kv_events_replay) {
        log.refuse_absence(&replay.at, quoted(&replay.value.to_string()), "needs `kv_events` beside it");
    }
    let replay = kv_events_replay.map(|found| found.value);
    let gpus = section.list("gpus", |raw| node::gpu(raw, nodes));
    let metrics_port = section.optional_count("metrics_port", u16::MAX.into(), "for the engine's default");
    let token_ids = section.boolean("token_ids", false);
    for (at, again) in gpus.iter().enumerate() {
        if let Some(first) = gpus.iter().take(at).find(|first| first.value == again.value) {
            let remedy = format!("must name each GPU once: {} is the same", log.mention(&first.at));
            log.refuse(&again.at, quoted(&format!("{}/{}", again.value.node, again.value.gpu)), remedy);
        }
    }
    let memory = "to have it taken for all that a GPU has, if it may sleep";
    let memory_gib = section.optional_count("memory_gib", defaults::MEMORY_GIB_LIMIT, memory);
    let of_gpu = |gpu: &Found<GpuName>| nodes.iter().find(|node| node.name == gpu.value.node);
    let smallest = gpus.iter().filter_map(of_gpu).filter_map(|node| Some((node.gpu_memory_gib?, &node.name))).min();
    if let (Some(takes), Some((has, node))) = (memory_gib, smallest)
        && takes > has
    {
        let remedy = format!("must be at most {has}, the `gpu_memory_gib` of node {node}");
        log.refuse(&section.at("memory_gib"), takes.to_string(), remedy);
    }
    let sleep = section.read("sleep", |raw| raw.boolean()).map(|found| found.value);
    let awake_min = section.seconds("awake_seconds_min", 0, defaults::AWAKE_MIN);
    if section.holds("awake_seconds_min") && !sleep.unwrap_or(section.holds("sleep")) {
        let at = section.at("awake_seconds_min");
        log.refuse_absence(&at, "without effect", "needs `sleep = true` beside it");
    }
    let sleep = sleep.unwrap_or(false);
    if sleep && (!section.holds("gpus") || section.is_empty_list("gpus")) {
        let remedy = "needs `gpus` beside it: who may be awake together is decided by the GPUs they share";
        log.refuse_absence(&section.at("sleep"), "true", remedy);
    }
    if sleep && role != Role::Both {
        let remedy = "cannot stand beside a `role`: whoever goes on must be awake when the prompt is computed";
        log.refuse_absence(&section.at("sleep"), "true", remedy);
    }
    let data_parallel = section.count("data_parallel", defaults::DATA_PARALLEL_LIMIT, NonZeroU32::MIN);
    if data_parallel > NonZeroU32::MIN && (sleep || kv_events.is_some()) {
        let remedy =
            "cannot stand beside `sleep`, nor beside `kv_events`: each rank has its own, which it is asked for";
        log.refuse_absence(&section.at("data_parallel"), data_parallel.to_string(), remedy);
    }
    if let Some(engine) = engine.as_ref().and_then(|named| engines::by_name(named.value)) {
        let beyond = [
            ("token_ids", token_ids && !engine.takes_ids(Api::Completions)),
            ("data_parallel", data_parallel > NonZeroU32::MIN && engine.rank_header().is_none()),
            ("sleep", sleep && engine.dormant().is_none()),
            ("role", role != Role::Both && !engine.hands_over()),
        ];
        for (key, _) in beyond.into_iter().filter(|(_, beyond)| *beyond) {
            log.refuse(&section.at(key), format!("beyond what {} can", engine.name()), "omit the key for this engine");
        }
    }
    section.finish(&[]);
    let url = url?;
    let named = match own_name {
        Some(found) => found,
        None => Found { value: url.value.name, at: url.at.clone() },
    };
    let worker = Worker {
        name: named.value,
        url: url.value.url,
        role,
        engine: engine.map(|found| found.value),
        model: model.map(|found| found.value),
        api_key: api_key.map(|found| found.value),
        http2: http2 || url.value.grpc,
        kv_events: kv_events.map(|found| KvSource { events: found.value, replay }),
        gpus: gpus.into_iter().map(|found| found.value).collect(),
        metrics_port: metrics_port.and_then(|port| u16::try_from(port.get()).ok()),
        token_ids,
        data_parallel,
        memory_gib,
        sleep,
        awake_min,
    };
    let rule = "must be unique among the names of workers, which are host:port where `name` is omitted";
    let rule_of_ranks = "must be unique among the names of workers, each rank being one of its own";
    if names.take(log, &worker.name, &named.at, rule) {
        let mut ranks = worker.ranks().filter(Option::is_some).map(|rank| worker.rank_name(rank));
        ranks.all(|name| names.take(log, &name, &named.at, rule_of_ranks));
    }
    Some(Found { value: worker, at: url.at })
}

pub(super) fn name(raw: &Raw<'_>) -> Result<Name, Refusal> {
    Name::new(raw.text()?).map_err(|bad| Refusal::new(bad.to_string()))
}

/// What the metrics call the models that are asked for and that nobody configured.
const UNKNOWN: &str = "other";

pub(super) fn model_name(raw: &Raw<'_>) -> Result<Name, Refusal> {
    match name(raw)? {
        name if &*name == UNKNOWN => Err(Refusal::new(format!(
            "must be another name: as `{UNKNOWN}` the metrics tell of the names that nobody configured"
        ))),
        name if name.contains('*') => Err(Refusal::new("must be a whole name: write what holds a `*` among `aliases`")),
        name if name
            .rsplit_once('@')
            .is_some_and(|(base, version)| base.is_empty() || matches!(version, "" | "latest")) =>
        {
            let remedy =
                "must have a name before its last `@`, and behind it a version (`latest` means the newest of them)";
            Err(Refusal::new(remedy))
        }
        name => Ok(name),
    }
}

fn policy(raw: &Raw<'_>) -> Result<Policy, Refusal> {
    let text = raw.text()?;
    let known = Policy::NAMES.iter().find(|(name, _)| *name == text);
    known.map(|(_, policy)| *policy).ok_or_else(|| {
        let names = Policy::NAMES.map(|(name, _)| name).join(", ");
        Refusal::new(format!("must be one of {names} (omit the key for forebay)"))
    })
}

fn role(raw: &Raw<'_>) -> Result<Role, Refusal> {
    let text = raw.text()?;
    let known = Role::NAMES.iter().find(|(name, _)| *name == text);
    known.map(|(_, role)| *role).ok_or_else(|| {
        let names = Role::NAMES.map(|(name, _)| name).join(", ");
        Refusal::new(format!("must be one of {names} (omit the key for both)"))
    })
}

pub(super) fn engine(raw: &Raw<'_>, known: &[&'static str]) -> Result<&'static str, Refusal> {
    let text = raw.text()?;
    let engine = known.iter().find(|engine| **engine == text).copied();
    engine
        .ok_or_else(|| Refusal::new(format!("must be one of {} (omit the key to have it detected)", known.join(", "))))
}

/// An address to send to, and the name of a worker there that is given none.
struct Address {
    url: Url,
    name: Name,
    /// Written as `grpc`.
    grpc: bool,
}

/// Whatever might hold a secret is not shown.
fn address(raw: &Raw<'_>) -> Result<Address, Refusal> {
    let text = raw.text()?;
    let refuse = |remedy: &str| {
        let shown = if text.contains(['@', '?', '#']) { "(redacted)".to_owned() } else { quoted(text) };
        Err(Refusal::showing(shown, remedy))
    };
    let plain = text.strip_prefix("grpc://").map(|rest| format!("http://{rest}"));
    let behind_tls = || text.strip_prefix("grpcs://").map(|rest| format!("https://{rest}"));
    let grpc = plain.or_else(behind_tls);
    let Ok(mut url) = Url::parse(grpc.as_deref().unwrap_or(text)) else { return refuse(URL_FORM) };
    if !matches!(url.scheme(), "http" | "https") || url.port() == Some(0) {
        return refuse(URL_FORM);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("must not hold a user or a password: give an `api_key` to the worker");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return refuse("must end before `?` or `#`");
    }
    let path = url.path().trim_end_matches('/').to_owned();
    if path.ends_with("/v1") {
        return refuse("must not end in /v1: write the address in front of it");
    }
    url.set_path(&path);
    let (host, port) = (url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default());
    match Name::new(&format!("{host}:{port}")) {
        Ok(name) => Ok(Address { url, name, grpc: grpc.is_some() }),
        Err(_) => refuse("must name a host of less than 250 characters"),
    }
}

fn zmq_address(raw: &Raw<'_>) -> Result<zmtp::Address, Refusal> {
    let form = "must be the address of the worker's ZeroMQ socket as seen from here, as in tcp://gpu-a:5557";
    let url = Url::parse(raw.text()?).ok();
    url.and_then(|url| zmtp::Address::new(&url, None)).ok_or_else(|| Refusal::new(form))
}

const URL_FORM: &str =
    "must begin with http://, https://, grpc:// or grpcs:// and name a host, as in http://gpu-a:8000";
