//! What a run is given besides its trace and policy.

use std::time::Duration;

use forebay_scheduler::Config;

use crate::EngineConfig;

/// The fleet, the load and the yardstick of a run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Engines, numbered from 0; at least 1.
    pub workers: u32,
    /// The model of each engine; block size and KV memory in blocks of the trace.
    pub engine: EngineConfig,
    /// Speed of the engines against [`Settings::engine`], over and over; empty means 1 for all.
    pub speeds: Vec<f64>,
    /// Arrival times are divided by it.
    pub rate: f64,
    /// Over how much time arrivals that share a moment are spread; zero leaves them.
    pub jitter: Duration,
    /// Longest time to the first token that counts as good.
    pub slo_ttft: Duration,
    /// Whether the scheduler's queue keeps its default bounds and time-out. Otherwise nothing is shed and nothing times
    /// out. The rivals have no queue and never shed.
    pub shed: bool,
    /// Tunables of the scheduler.
    pub scheduler: Config,
    /// Weights of tenants against others; 1 for those who are not named. Only the scheduler knows tenants.
    pub tenant_weights: Vec<(u32, f64)>,
    /// Whether answers come whole, so that the scheduler hears of a first token only at the end.
    pub whole_answers: bool,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// A monotonic clock to time the scheduler's decisions with. Without one they are not timed, and equal runs give
    /// equal figures in full.
    pub stopwatch: Option<fn() -> Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 8,
            engine: EngineConfig::default(),
            speeds: Vec::new(),
            rate: 1.0,
            jitter: Duration::ZERO,
            slo_ttft: Duration::from_secs(2),
            shed: false,
            scheduler: Config::default(),
            tenant_weights: Vec::new(),
            whole_answers: false,
            faults: Vec::new(),
            stopwatch: None,
        }
    }
}

impl Settings {
    /// Speed of one engine against the model.
    #[must_use]
    pub fn speed(&self, worker: u32) -> f64 {
        let at = (worker as usize).checked_rem(self.speeds.len());
        at.and_then(|at| self.speeds.get(at)).copied().filter(|speed| *speed > 0.0).unwrap_or(1.0)
    }
}

/// Something that goes wrong with one engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// When, in the run's time.
    pub at: Duration,
    /// Which engine.
    pub worker: u32,
    /// What.
    pub kind: FaultKind,
    /// How long; none means for the rest of the run.
    pub lasts: Option<Duration>,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FaultKind {
    /// The process dies. Everybody's connection breaks: a request that had its first token has failed, another is sent
    /// again. The engine returns with an empty cache.
    Crash,
    /// Steps take this many times as long.
    Slow(f64),
}
