//! Workers that joined by call, and those that drain by call.
//!
//! Who joined is kept in a file of the data directory: the calls themselves, which are read again by the rules of the
//! configuration at each start and reload. One that they do not allow any more is left out, and kept. That a worker
//! drains is known to this process alone.
//!
//! Invariants: what was said to have joined is on the disk, and what was said to leave is not.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

use super::lists::Enlisted;
use crate::admin::wire::Join;
use crate::config::{Config, Node, Reader, Worker};

/// In the data directory.
const FILE: &str = "workers.json";
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Workers that may join by call; more belong on a list.
pub(super) const JOINED_MAX: usize = 1024;

pub(super) struct Joined {
    path: PathBuf,
    reader: Reader,
    calls: Vec<Call>,
    /// Names of those that get nothing new, one for each rank.
    draining: BTreeSet<String>,
}

struct Call {
    said: Join,
    /// Its worker, where the rules allow it.
    worker: Option<Worker>,
    /// It is among the workers: its model is there, and nobody else has its name or its address.
    serves: bool,
    /// It is no longer kept: it stays until it has nothing to do.
    leaving: bool,
}

impl Joined {
    /// Those that are kept in this data directory; `reader` reads what they say.
    pub(super) fn load(data_dir: &Path, reader: Reader) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        let wrong = || format!("`{}` does not hold the workers that joined: mend or remove it", path.display());
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => text.extend_from_slice(b"[]"),
            read => _ = read.with_context(wrong)?,
        }
        let said: Vec<Join> = serde_json::from_slice(&text).with_context(wrong)?;
        let calls = said.into_iter().map(|said| Call { said, worker: None, serves: false, leaving: false }).collect();
        Ok(Self { path, reader, calls, draining: BTreeSet::new() })
    }

    /// Reads again what was said; rules and secrets may have changed.
    pub(super) fn read(&mut self, config: &Config) {
        for call in &mut self.calls {
            if !config.models.iter().any(|model| model.name.as_str() == call.said.model) {
                tracing::warn!(model = call.said.model, "a worker that joined by call has no model");
            }
            call.worker = match self.reader.worker(&call.said.worker, &config.nodes) {
                Ok(worker) => Some(worker),
                Err(mistakes) => {
                    tracing::warn!(model = call.said.model, mistakes, "a worker that joined by call is left out");
                    None
                }
            };
        }
    }

    /// The worker that these keys make.
    pub(super) fn check(&self, keys: &Map<String, Value>, nodes: &[Node]) -> Result<Worker, String> {
        self.reader.worker(keys, nodes)
    }

    pub(super) fn is_full(&self) -> bool {
        self.calls.len() >= JOINED_MAX
    }

    /// Takes in a worker of a model; on the disk before it returns.
    pub(super) async fn join(&mut self, mut said: Join, worker: Worker) -> std::io::Result<()> {
        // One that the rules leave out some day still has its name.
        said.worker.insert("name".to_owned(), worker.name.as_str().into());
        self.calls.push(Call { said, worker: Some(worker), serves: false, leaving: false });
        self.keep().await.inspect_err(|_| _ = self.calls.pop())
    }

    /// Whether a worker of this name joined.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.calls.iter().any(|call| call.is(name))
    }

    pub(super) fn is_leaving(&self, name: &str) -> bool {
        self.calls.iter().any(|call| call.leaving && call.is(name))
    }

    /// The ranks of the worker of this name that joined; none where it does not serve.
    pub(super) fn ranks(&self, name: &str) -> Vec<String> {
        let serving = self.calls.iter().filter(|call| call.serves && call.is(name));
        serving.flat_map(Call::ranks).collect()
    }

    /// Takes a worker out of the file. One that serves is here until it is [forgotten](Self::forget).
    pub(super) async fn leave(&mut self, name: &str) -> std::io::Result<()> {
        let mark = |calls: &mut Vec<Call>, leaving| {
            calls.iter_mut().filter(|call| call.is(name)).for_each(|call| call.leaving = leaving);
        };
        mark(&mut self.calls, true);
        self.keep().await.inspect_err(|_| mark(&mut self.calls, false))
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.calls.retain(|call| !(call.leaving && call.is(name)));
    }

    /// Whether these ranks drain from now on.
    pub(super) fn set_draining(&mut self, ranks: &[String], draining: bool) {
        if draining {
            self.draining.extend(ranks.iter().cloned());
        } else {
            self.draining.retain(|name| !ranks.contains(name));
        }
    }

    /// Adds them to their models. Who leaves and does not serve has nothing to wait for: it is gone, and if another has
    /// its name now, that one does not drain.
    pub(super) fn complete(&mut self, config: &mut Config, enlisted: &mut Enlisted) {
        for call in &mut self.calls {
            let model = config.models.iter_mut().find(|model| model.name.as_str() == call.said.model);
            let serves = match (model, &call.worker) {
                (Some(model), Some(worker)) => enlisted.add(model, worker.clone()),
                _ => false,
            };
            let served = std::mem::replace(&mut call.serves, serves);
            if call.leaving && served && !serves {
                call.ranks().for_each(|rank| _ = self.draining.remove(&rank));
            }
        }
        self.calls.retain(|call| call.serves || !call.leaving);
    }

    /// Of the workers of `config`, those that drain. A name that is gone does not drain when it returns.
    pub(super) fn draining(&mut self, config: &Config) -> BTreeSet<String> {
        let workers = config.models.iter().flat_map(|model| &model.workers);
        let ranks = workers.flat_map(|worker| worker.ranks().map(|rank| worker.rank_name(rank)));
        self.draining = ranks.filter(|rank| self.draining.contains(rank)).collect();
        self.draining.clone()
    }

    async fn keep(&self) -> std::io::Result<()> {
        let kept: Vec<&Join> = self.calls.iter().filter(|call| !call.leaving).map(|call| &call.said).collect();
        let (path, text) = (self.path.clone(), serde_json::to_vec_pretty(&kept)?);
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(ErrorKind::FileTooLarge.into()); // it could not be read again
        }
        tokio::task::spawn_blocking(move || replace(&path, &text)).await?
    }
}

/// Written aside and renamed, so that a crash leaves the one or the other.
fn replace(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let aside = path.with_extension("json.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&aside, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

impl Call {
    fn ranks(&self) -> impl Iterator<Item = String> + '_ {
        self.worker.iter().flat_map(|worker| worker.ranks().map(|rank| worker.rank_name(rank)))
    }

    fn is(&self, name: &str) -> bool {
        match &self.worker {
            Some(worker) => worker.name.as_str() == name,
            None => self.said.worker.get("name").and_then(Value::as_str) == Some(name),
        }
    }
}
