//! Whether a worker's model is in the memory of its GPUs, and how long it takes to bring it there.
//!
//! An engine that sleeps is well: requests are bound to it, and wait in its lane until it is awake. How long that takes is
//! measured, and part of the score.
//!
//! Not here: who is woken and who makes room (`core::sleep`).

use std::time::Duration;

use crate::Tick;
use crate::config::Config;

/// Weight of the latest wake, or of the latest going to sleep, in what is expected of the next.
const LATEST: f64 = 0.5;

/// Where a worker that can sleep is between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SleepState {
    /// Its model is in memory.
    Awake,
    /// Gets nothing more and finishes what it has: another needs the room.
    Leaving,
    /// Was told to sleep.
    FallingAsleep,
    /// Its model is not in the memory of its GPUs.
    Asleep,
    /// Was told to wake.
    Waking,
}

#[derive(Debug)]
pub(crate) struct Sleep {
    state: SleepState,
    since: Tick,
    /// Since when something waits for it to be awake.
    pub(crate) wanted: Option<Tick>,
    /// Nothing is asked of it before: a wake failed, or found no memory.
    pub(crate) retry: Tick,
    /// How long it is left alone when it fails next.
    retry_next: Duration,
    /// When it was last told to change and did.
    changed: Option<Tick>,
    /// When it was sent something last, or gave something back.
    pub(crate) used: Tick,
    /// When others may begin to make room for it, and the seconds that takes them.
    pub(crate) room: (Tick, f64),
    wake_seconds: Option<f64>,
    sleep_seconds: Option<f64>,
    /// Times that it was woken.
    pub(crate) wakes: u64,
}

impl Sleep {
    pub(crate) fn new(now: Tick, config: &Config) -> Self {
        Self {
            state: SleepState::Awake,
            since: now,
            wanted: None,
            retry: Tick::ZERO,
            retry_next: config.wake_retry,
            changed: None,
            used: now,
            room: (Tick::ZERO, 0.0),
            wake_seconds: None,
            sleep_seconds: None,
            wakes: 0,
        }
    }

    pub(crate) fn state(&self) -> SleepState {
        self.state
    }

    /// Since when it is in its state.
    pub(crate) fn since(&self) -> Tick {
        self.since
    }

    /// Whether it takes memory, or soon will.
    pub(crate) fn holds_memory(&self) -> bool {
        self.state != SleepState::Asleep
    }

    /// Whether that memory is about to be free.
    pub(crate) fn is_going(&self) -> bool {
        matches!(self.state, SleepState::Leaving | SleepState::FallingAsleep)
    }

    pub(crate) fn turn(&mut self, now: Tick, to: SleepState) {
        // whoever was to leave and need not has been awake all the time
        use SleepState::{Awake, Leaving};
        let stays = matches!((self.state, to), (Awake | Leaving, Awake | Leaving));
        if self.state != to && !stays {
            self.since = now;
        }
        self.state = to;
    }

    /// Notes whether something waits for it.
    pub(crate) fn want(&mut self, now: Tick, wanted: bool) {
        self.wanted = (wanted && self.state != SleepState::Awake).then(|| self.wanted.unwrap_or(now));
    }

    /// It did what it was told, or could not. Whether it was told anything.
    pub(crate) fn done(&mut self, now: Tick, worked: bool, config: &Config) -> bool {
        let (to, from) = match self.state {
            SleepState::Waking => (SleepState::Awake, SleepState::Asleep),
            SleepState::FallingAsleep => (SleepState::Asleep, SleepState::Awake),
            SleepState::Awake | SleepState::Leaving | SleepState::Asleep => return false,
        };
        if worked {
            let took = now.seconds_since(self.since);
            let seconds = if to == SleepState::Awake { &mut self.wake_seconds } else { &mut self.sleep_seconds };
            *seconds = Some(seconds.map_or(took, |mean| mean + (took - mean) * LATEST));
            self.wakes += u64::from(to == SleepState::Awake);
            (self.changed, self.used, self.retry_next) = (Some(now), now, config.wake_retry);
        } else {
            self.retry = now.after(self.retry_next);
            self.retry_next = (self.retry_next * 2).min(config.wake_retry_max);
        }
        self.turn(now, if worked { to } else { from });
        true
    }

    /// Its engine says whether it sleeps, unasked. What was read while it changed at our word, or just before, is old.
    /// Whether that is news.
    pub(crate) fn seen(&mut self, now: Tick, asleep: bool, config: &Config) -> bool {
        let told = matches!(self.state, SleepState::Waking | SleepState::FallingAsleep);
        let old = self.changed.is_some_and(|at| now.since(at) < config.sleep_settles);
        let news = asleep != (self.state == SleepState::Asleep);
        if told || old || !news {
            return false;
        }
        self.turn(now, if asleep { SleepState::Asleep } else { SleepState::Awake });
        true
    }

    /// When an answer to what it was told is given up.
    pub(crate) fn gives_up(&self, config: &Config) -> Option<Tick> {
        let told = matches!(self.state, SleepState::Waking | SleepState::FallingAsleep);
        told.then(|| self.since.after(config.wake_max))
    }

    pub(crate) fn wake_seconds(&self, config: &Config) -> f64 {
        self.wake_seconds.unwrap_or(config.wake_assumed.as_secs_f64())
    }

    pub(crate) fn sleep_seconds(&self, config: &Config) -> f64 {
        self.sleep_seconds.unwrap_or(config.sleep_assumed.as_secs_f64())
    }

    /// Seconds until it can be sent something.
    pub(crate) fn wait_seconds(&self, now: Tick, config: &Config) -> f64 {
        let wake = self.wake_seconds(config);
        let passed = now.seconds_since(self.since);
        match self.state {
            SleepState::Awake => 0.0,
            SleepState::Waking => (wake - passed).max(0.0),
            SleepState::Leaving | SleepState::FallingAsleep => self.sleep_seconds(config) + wake,
            SleepState::Asleep => {
                let (at, seconds) = self.room;
                wake + seconds + at.max(self.retry).seconds_since(now)
            }
        }
    }
}
