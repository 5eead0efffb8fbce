//! Ways to fail, and which requests they hit.
//!
//! A [`Fault`] names what goes wrong and when. Each has its own counter of the requests that it could have hit, so that
//! `every` and `first` count as a reader expects. Several may hit one request; of two that exclude each other, such as
//! two statuses, the first in the list wins.
//!
//! Not here: carrying a fault out (`body` for what happens to bytes, `server` for refused connections).

use std::{str::FromStr, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::wire::runs_model;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FaultKind {
    /// An answer with this status in place of the real one.
    Status {
        code: u16,
        /// Body to send; the default is the engine's own error shape.
        #[serde(default)]
        body: Option<String>,
        /// Value of a `Retry-After` header, in seconds.
        #[serde(default)]
        retry_after: Option<u32>,
    },
    /// The answer begins this much later.
    Delay { ms: u64 },
    /// No byte is ever sent; the connection stays open.
    Hang {},
    /// Silence after so many events of a stream, or after half of a whole answer.
    Stall {
        #[serde(default)]
        after: u32,
    },
    /// The connection ends after so many events of a stream, or after half of a whole answer.
    Cut {
        #[serde(default)]
        after: u32,
        /// End it with a TCP reset.
        #[serde(default)]
        reset: bool,
    },
    /// Bytes that are no event after so many events of a stream, or in place of a whole answer.
    Garbage {
        #[serde(default)]
        after: u32,
    },
    /// The engine lets go of the request, as vLLM does to shut down or sleep: after so many events of a stream the next
    /// one ends it for the reason `abort`, as a whole answer says it; nothing more is said, and all is well otherwise.
    Abort {
        #[serde(default)]
        after: u32,
    },
    /// The engine's own way to die: an error event and a clean end of the stream, or status 500 for a whole answer.
    Error {
        #[serde(default)]
        after: u32,
    },
}

/// What goes wrong, and when.
///
/// As text: `kind:key=value,…`, such as `status:code=503,every=2` or `delay:ms=2000,path=/health`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub kind: FaultKind,
    /// Hits only requests for this path; by default those that run the model.
    #[serde(default)]
    pub path: Option<String>,
    /// Hits each so-manieth request, the first one included.
    #[serde(default = "one")]
    pub every: u64,
    /// Hits only among the first so many requests.
    #[serde(default)]
    pub first: Option<u64>,
    /// Hits a request that `every` and `first` let through with this probability, drawn from the seed.
    #[serde(default = "certain")]
    pub probability: f64,
}

/// A text that is no fault.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not a fault")]
pub struct FaultError {
    text: String,
    #[source]
    source: serde_json::Error,
}

impl From<FaultKind> for Fault {
    /// A fault that hits every request that runs the model.
    fn from(kind: FaultKind) -> Self {
        Self { kind, path: None, every: one(), first: None, probability: certain() }
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        use serde_json::{Map, Value, json};
        let (kind, pairs) = text.split_once(':').unwrap_or((text, ""));
        let mut of_kind = Map::new();
        let mut fault = Map::new();
        for pair in pairs.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "true"));
            let place = match key {
                "path" | "every" | "first" | "probability" => &mut fault,
                _ => &mut of_kind,
            };
            let parsed = serde_json::from_str(value).ok().filter(|v: &Value| v.is_number() || v.is_boolean());
            place.insert(key.to_owned(), parsed.unwrap_or_else(|| value.into()));
        }
        fault.insert("kind".to_owned(), json!({ kind: of_kind }));
        serde_json::from_value(Value::Object(fault)).map_err(|source| FaultError { text: text.to_owned(), source })
    }
}

fn one() -> u64 {
    1
}

fn certain() -> f64 {
    1.0
}

/// The faults in force.
#[derive(Debug)]
pub(crate) struct Faults {
    seed: u64,
    list: Mutex<Vec<(Fault, u64)>>,
}

/// What is to go wrong with one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) delay: Duration,
    pub(crate) hang: bool,
    pub(crate) status: Option<Status>,
    pub(crate) mid: Option<Mid>,
}

/// An answer in place of the real one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Status {
    pub(crate) code: u16,
    pub(crate) body: Option<String>,
    pub(crate) retry_after: Option<u32>,
}

/// Something that happens to an answer under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mid {
    pub(crate) after: u32,
    pub(crate) kind: MidKind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum MidKind {
    Stall,
    Cut { reset: bool },
    Garbage,
    Abort,
    Error,
}

impl Faults {
    pub(crate) fn new(seed: u64, list: Vec<Fault>) -> Self {
        let faults = Self { seed, list: Mutex::default() };
        faults.set(list);
        faults
    }

    /// Replaces all faults; counting begins anew.
    pub(crate) fn set(&self, list: Vec<Fault>) {
        *self.list.lock() = list.into_iter().map(|fault| (fault, 0)).collect();
    }

    pub(crate) fn get(&self) -> Vec<Fault> {
        self.list.lock().iter().map(|(fault, _)| fault.clone()).collect()
    }

    /// Counts a request for `path` and says what is to happen to it.
    pub(crate) fn plan(&self, path: &str) -> Plan {
        let mut plan = Plan::default();
        for (at, (fault, count)) in self.list.lock().iter_mut().enumerate() {
            let applies = match &fault.path {
                Some(wanted) => wanted == path,
                None => runs_model(path),
            };
            if applies {
                let number = *count;
                *count += 1;
                if fault.hits(number, self.seed.wrapping_add(at as u64)) {
                    plan.add(&fault.kind);
                }
            }
        }
        plan
    }
}

impl Fault {
    fn hits(&self, number: u64, seed: u64) -> bool {
        let draw = (xxh3_64_with_seed(&number.to_le_bytes(), seed) >> 11) as f64 / (1u64 << 53) as f64;
        number.is_multiple_of(self.every.max(1))
            && self.first.is_none_or(|first| number < first)
            && draw < self.probability
    }
}

impl Plan {
    fn add(&mut self, kind: &FaultKind) {
        let mid = |after, kind| Some(Mid { after, kind });
        let mid = match kind {
            FaultKind::Status { code, body, retry_after } => {
                let status = || Status { code: *code, body: body.clone(), retry_after: *retry_after };
                self.status.get_or_insert_with(status);
                None
            }
            FaultKind::Delay { ms } => {
                self.delay += Duration::from_millis(*ms);
                None
            }
            FaultKind::Hang {} => {
                self.hang = true;
                None
            }
            FaultKind::Stall { after } => mid(*after, MidKind::Stall),
            FaultKind::Cut { after, reset } => mid(*after, MidKind::Cut { reset: *reset }),
            FaultKind::Garbage { after } => mid(*after, MidKind::Garbage),
            FaultKind::Abort { after } => mid(*after, MidKind::Abort),
            FaultKind::Error { after } => mid(*after, MidKind::Error),
        };
        self.mid = self.mid.or(mid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(fault: &str) -> Vec<u64> {
        let faults = Faults::new(1, vec![fault.parse().unwrap()]);
        (0..12).filter(|_| faults.plan("/v1/completions") != Plan::default()).collect()
    }

    #[test]
    fn text_and_json_name_the_same_faults() {
        let cases = [
            ("hang", r#"{"kind":{"hang":{}}}"#),
            ("status:code=429,retry_after=3", r#"{"kind":{"status":{"code":429,"retry_after":3}}}"#),
            ("cut:after=2,reset,every=3", r#"{"kind":{"cut":{"after":2,"reset":true}},"every":3}"#),
            ("delay:ms=5,path=/health,first=2", r#"{"kind":{"delay":{"ms":5}},"path":"/health","first":2}"#),
            ("status:code=503,body=no", r#"{"kind":{"status":{"code":503,"body":"no"}}}"#),
        ];
        for (text, json) in cases {
            assert_eq!(text.parse::<Fault>().unwrap(), serde_json::from_str(json).unwrap(), "{text}");
        }
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in ["", "explode", "status", "status:code=many", "stall:before=1", "hang:every=-1"] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_and_first_count_from_the_first_request() {
        assert_eq!(hits("hang"), (0..12).collect::<Vec<_>>());
        assert_eq!(hits("hang:every=5"), [0, 5, 10]);
        assert_eq!(hits("hang:first=2"), [0, 1]);
        assert_eq!(hits("hang:every=3,first=4"), [0, 3]);
        assert_eq!(hits("hang:probability=0"), [0u64; 0]);
        let some = hits("hang:probability=0.5");
        assert!(!some.is_empty() && some.len() < 12 && some == hits("hang:probability=0.5"));
    }

    #[test]
    fn only_the_named_path_is_hit() {
        let faults = Faults::new(0, vec!["delay:ms=7,path=/health".parse().unwrap()]);
        assert_eq!(faults.plan("/v1/completions"), Plan::default());
        assert_eq!(faults.plan("/health").delay, Duration::from_millis(7));
        let faults = Faults::new(0, vec!["hang".parse().unwrap()]);
        assert_eq!(faults.plan("/health"), Plan::default());
    }

    #[test]
    fn faults_combine_and_the_first_of_a_kind_wins() {
        let list = ["delay:ms=1", "delay:ms=2", "stall:after=4", "cut", "status:code=500", "status:code=503"];
        let plan = Faults::new(0, list.iter().map(|text| text.parse().unwrap()).collect()).plan("/v1/embeddings");
        assert_eq!(plan.delay, Duration::from_millis(3));
        assert_eq!(plan.mid, Some(Mid { after: 4, kind: MidKind::Stall }));
        assert_eq!(plan.status.unwrap().code, 500);
    }
}
