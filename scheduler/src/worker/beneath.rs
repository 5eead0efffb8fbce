//! What the GPUs under a worker take from its speed.
//!
//! Of several GPUs the slowest and the busiest count, since an engine that spans them waits for each. All of it is a
//! lease: readings that stop coming say nothing, and mean a GPU that is well and its own.
//!
//! Not here: what a GPU's readings mean (`core::gpus`).

use crate::Tick;

/// Others never count as leaving less than this of a GPU's time.
const SHARE_MIN: f64 = 0.05;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Beneath {
    /// Until when the readings hold.
    pub(crate) until: Tick,
    /// Share of the usual speed.
    pub(crate) derate: f64,
    /// Share of the GPUs' time that processes take which are none of ours.
    pub(crate) foreign: f64,
    /// Share of the memory taken that was free at its emptiest.
    pub(crate) memory: Option<f64>,
    /// Other workers that have work on the same GPUs.
    pub(crate) neighbours: usize,
    /// A GPU's fault is why it gets nothing, or got nothing last.
    pub(crate) fault: bool,
    /// Its GPUs know that it has work.
    pub(crate) occupies: bool,
}

impl Default for Beneath {
    fn default() -> Self {
        Self {
            until: Tick::ZERO,
            derate: 1.0,
            foreign: 0.0,
            memory: None,
            neighbours: 0,
            fault: false,
            occupies: false,
        }
    }
}

impl Beneath {
    pub(crate) fn derate(&self, now: Tick) -> f64 {
        if now < self.until { self.derate } else { 1.0 }
    }

    /// Share of the GPUs' time that is left; `explained` when the foreign load is known otherwise.
    pub(crate) fn share(&self, now: Tick, explained: bool) -> f64 {
        let foreign = if now < self.until && !explained { self.foreign } else { 0.0 };
        ((1.0 - foreign) / (1.0 + self.neighbours as f64)).max(SHARE_MIN)
    }

    pub(crate) fn memory(&self, now: Tick) -> Option<f64> {
        self.memory.filter(|_| now < self.until)
    }
}
