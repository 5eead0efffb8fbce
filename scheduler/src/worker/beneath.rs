//! What the GPUs under a worker take from its speed.
//!
//! Of several GPUs the slowest and the busiest count, since an engine that spans them waits for each. All of it is a
//! lease: readings that stop coming say nothing, and mean a GPU that is well and its own.
//!
//! Not here: what a GPU's readings mean (`core::gpus`).

use crate::Tick;

/// Others never count as leaving less than this of a GPU's time.
const SHARE_MIN: f64 = 0.05;

/// What an engine says of its own load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reports {
    /// Nothing that can be gone by.
    Nothing,
    /// That it has no more than what we sent.
    OnlyOurs,
    /// That it has requests which came past us.
    Foreign,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Beneath {
    /// Until when the readings hold.
    pub(crate) until: Tick,
    /// Share of the usual speed.
    pub(crate) derate: f64,
    /// Share of the GPUs' time that processes take which are no worker's, where that is measured.
    pub(crate) foreign: Option<f64>,
    /// Share that is in use beyond what we sent there, by processes of whomever.
    pub(crate) unexplained: f64,
    /// Share of the memory taken that was free at its emptiest.
    pub(crate) memory: Option<f64>,
    /// Bytes of memory that nobody has on the fullest of them.
    pub(crate) free_bytes: Option<u64>,
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
            foreign: None,
            unexplained: 0.0,
            memory: None,
            free_bytes: None,
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

    /// Whether nothing speaks of others: the usual case, and cheap to see.
    pub(crate) fn is_alone(&self, now: Tick) -> bool {
        self.neighbours == 0
            && (now >= self.until || (self.unexplained == 0.0 && self.foreign.is_none_or(|share| share == 0.0)))
    }

    /// Share of the GPUs' time that others leave. What came to the engine past us uses them too: an engine that reports
    /// its load (`reports`) tells that better.
    pub(crate) fn share(&self, now: Tick, reports: Reports) -> f64 {
        let foreign = match (reports, self.foreign) {
            _ if now >= self.until => 0.0,
            (Reports::Nothing, measured) => measured.unwrap_or(0.0).max(self.unexplained),
            (_, Some(measured)) => measured,
            (Reports::OnlyOurs, None) => self.unexplained,
            (Reports::Foreign, None) => 0.0,
        };
        ((1.0 - foreign) / (1.0 + self.neighbours as f64)).max(SHARE_MIN)
    }

    pub(crate) fn memory(&self, now: Tick) -> Option<f64> {
        self.memory.filter(|_| now < self.until)
    }

    pub(crate) fn free_bytes(&self, now: Tick) -> Option<u64> {
        self.free_bytes.filter(|_| now < self.until)
    }
}
