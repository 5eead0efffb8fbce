//! Whether a worker may be given requests: probes and the breaker.
//!
//! `Unknown` and `Down` are left by a healthy probe, and probes are asked for at growing intervals for as long as it
//! takes; `Open` is left by time, into `HalfOpen`, in which single requests try it out, or a probe where none comes for
//! long, as to a worker that was measured to be slow. So every negative mark ends by itself once its cause has ended.
//! Overload is no illness and is not seen here, but in a worker that says of nearly every request that it cannot serve
//! it.

use std::time::Duration;

use crate::config::{Breaker, Config};
use crate::{Failure, Tick};

/// A worker's standing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthState {
    /// Never heard of; a probe is on its way.
    Unknown,
    /// Serves.
    Up,
    /// Not there, or says that it cannot serve.
    Down,
    /// Answers probes but fails requests: left alone for a time.
    Open,
    /// On trial with one request at a time.
    HalfOpen,
}

#[derive(Debug)]
pub(crate) struct Health {
    state: State,
    /// How long `Open` will last next time.
    open_next: Duration,
    counts: Counts,
}

#[derive(Debug)]
enum State {
    Probing {
        unknown: bool,
        at: Tick,
        wait: Duration,
    },
    /// `returned`: when it came back from an illness, if it was ill.
    Up {
        returned: Option<Tick>,
    },
    Open {
        until: Tick,
    },
    /// `asks`: when a probe is to be asked for; `asked`: one was.
    HalfOpen {
        asks: Tick,
        asked: bool,
    },
}

#[derive(Debug, Default)]
struct Counts {
    failed: f64,
    /// It said that it cannot serve now.
    unavailable: f64,
    all: f64,
    at: Tick,
}

impl Health {
    /// Of a worker that just joined and is being probed.
    pub(crate) fn new(now: Tick, config: &Config) -> Self {
        Self { state: probing(now, config, true), open_next: config.breaker.open_first, counts: Counts::default() }
    }

    pub(crate) fn state(&self) -> HealthState {
        match self.state {
            State::Probing { unknown: true, .. } => HealthState::Unknown,
            State::Probing { unknown: false, .. } => HealthState::Down,
            State::Up { .. } => HealthState::Up,
            State::Open { .. } => HealthState::Open,
            State::HalfOpen { .. } => HealthState::HalfOpen,
        }
    }

    pub(crate) fn probed(&mut self, now: Tick, healthy: bool, config: &Config) {
        match (&self.state, healthy) {
            (State::Probing { unknown, .. }, true) => {
                self.state = State::Up { returned: (!unknown).then_some(now) };
                self.counts = Counts::default();
            }
            // what fails requests is not made whole by its answer to a probe
            (State::Up { .. } | State::Open { .. } | State::HalfOpen { .. }, true)
            | (State::Probing { unknown: false, .. }, false) => {}
            (_, false) => self.state = probing(now, config, false),
        }
    }

    /// A probe was answered well and no request is under way that tries it.
    pub(crate) fn untried(&mut self, now: Tick) {
        if let State::HalfOpen { asked: true, .. } = self.state {
            self.close(now);
        }
    }

    fn close(&mut self, now: Tick) {
        self.state = State::Up { returned: Some(now) };
        self.counts = Counts::default();
    }

    /// The worker is gone or cannot be trusted, whatever it was before.
    pub(crate) fn down(&mut self, now: Tick, config: &Config) {
        if self.state() != HealthState::Down {
            self.state = probing(now, config, false);
        }
    }

    /// An attempt worked.
    pub(crate) fn succeeded(&mut self, now: Tick, config: &Config) {
        self.counts.add(now, &config.breaker);
        if matches!(self.state, State::HalfOpen { .. }) {
            self.close(now);
        }
    }

    /// An attempt failed.
    pub(crate) fn failed(&mut self, now: Tick, failure: Failure, config: &Config) {
        match failure {
            Failure::Overloaded { .. } | Failure::NoAdapter | Failure::Unsupported => return,
            Failure::Connect => return self.down(now, config),
            Failure::Unavailable { .. } => {
                self.counts.add(now, &config.breaker);
                self.counts.unavailable += 1.0;
            }
            Failure::Reset
            | Failure::Timeout
            | Failure::Status5xx
            | Failure::Malformed
            | Failure::Denied
            | Failure::OtherModel => {
                self.counts.add(now, &config.breaker);
                self.counts.failed += 1.0;
            }
        }
        let trips = match self.state {
            State::Up { .. } => self.counts.trips(&config.breaker),
            State::HalfOpen { .. } => true,
            State::Probing { .. } | State::Open { .. } => false,
        };
        if trips {
            self.open(now, config);
        }
    }

    /// Leaves the worker alone for a time: twice as long as last time, unless it was well for long in between.
    pub(crate) fn open(&mut self, now: Tick, config: &Config) {
        let well = match self.state {
            State::Up { returned } => returned.is_none_or(|at| now.since(at) > config.breaker.open_max),
            State::Probing { .. } | State::Open { .. } | State::HalfOpen { .. } => false,
        };
        if well {
            self.open_next = config.breaker.open_first;
        }
        self.state = State::Open { until: now.after(self.open_next) };
        self.open_next = (self.open_next * 2).min(config.breaker.open_max);
    }

    /// What it runs on cannot be trusted: it is left alone, at least for [`Breaker::open_first`] since that was said
    /// last.
    pub(crate) fn fault(&mut self, now: Tick, config: &Config) {
        match &mut self.state {
            State::Open { until } => *until = (*until).max(now.after(config.breaker.open_first)),
            State::Up { .. } | State::HalfOpen { .. } => self.open(now, config),
            State::Probing { .. } => {}
        }
    }

    /// Share of the usual load that a worker should get that came back from an illness: from a quarter to all of it.
    pub(crate) fn ramp(&self, now: Tick, config: &Config) -> f64 {
        const FIRST: f64 = 0.25;
        match self.state {
            State::Up { returned: Some(at) } => {
                let passed = now.seconds_since(at) / config.slow_start.as_secs_f64().max(1e-3);
                (FIRST + (1.0 - FIRST) * passed).min(1.0)
            }
            _ => 1.0,
        }
    }

    /// 1 for a worker whose attempts all work, down to 0 for one that fails them all or gets none.
    pub(crate) fn score(&self, now: Tick, config: &Config) -> f64 {
        match self.state {
            State::Up { .. } | State::HalfOpen { .. } => 1.0 - self.counts.failure_share(now, &config.breaker),
            State::Probing { .. } | State::Open { .. } => 0.0,
        }
    }

    /// When [`Health::wake`] has something to do.
    pub(crate) fn next_wake(&self) -> Option<Tick> {
        match self.state {
            State::Probing { at, .. } | State::HalfOpen { asks: at, .. } => Some(at),
            State::Open { until } => Some(until),
            State::Up { .. } => None,
        }
    }

    /// Lets time pass; whether a probe is due.
    pub(crate) fn wake(&mut self, now: Tick, config: &Config) -> bool {
        match &mut self.state {
            State::Probing { at, wait, .. } if *at <= now => {
                *wait = (*wait * 2).min(config.probe_max);
                *at = now.after(*wait);
                true
            }
            State::Open { until } if *until <= now => {
                self.state = State::HalfOpen { asks: now.after(config.breaker.untried_max), asked: false };
                false
            }
            State::HalfOpen { asks, asked } if *asks <= now => {
                *asks = now.after(config.breaker.untried_max);
                *asked = true;
                true
            }
            _ => false,
        }
    }
}

fn probing(now: Tick, config: &Config, unknown: bool) -> State {
    State::Probing { unknown, at: now.after(config.probe_first), wait: config.probe_first }
}

impl Counts {
    /// One more attempt, of those that count.
    fn add(&mut self, now: Tick, breaker: &Breaker) {
        let keep = (-now.seconds_since(self.at) / breaker.half_life.as_secs_f64().max(1e-3)).exp2();
        self.failed *= keep;
        self.unavailable *= keep;
        self.all = self.all * keep + 1.0;
        self.at = self.at.max(now);
    }

    /// Failures among recent attempts, with one good attempt assumed.
    fn failure_share(&self, now: Tick, breaker: &Breaker) -> f64 {
        let keep = (-now.seconds_since(self.at) / breaker.half_life.as_secs_f64().max(1e-3)).exp2();
        self.failed * keep / (self.all * keep + 1.0)
    }

    fn trips(&self, breaker: &Breaker) -> bool {
        self.all >= breaker.volume_min
            && (self.failed >= self.all * breaker.failure_share
                || self.failed + self.unavailable >= self.all * breaker.unavailable_share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(config: &Config) -> Health {
        let mut health = Health::new(Tick(0), config);
        health.probed(Tick(0), true, config);
        health
    }

    #[test]
    fn probes_come_at_growing_intervals_until_one_is_answered() {
        let config = Config::default();
        let mut health = Health::new(Tick(0), &config);
        let mut waits = Vec::new();
        let mut now = Tick(0);
        for _ in 0..6 {
            let next = health.next_wake().unwrap();
            assert!(!health.wake(Tick(next.0 - 1), &config));
            assert!(health.wake(next, &config));
            waits.push(next.since(now).as_millis());
            now = next;
        }
        assert_eq!(waits, [500, 1000, 2000, 4000, 5000, 5000]);
        assert_eq!(health.state(), HealthState::Unknown);
        health.probed(now, false, &config);
        assert_eq!(health.state(), HealthState::Down);
        let due = health.next_wake();
        health.probed(now.after(Duration::from_millis(100)), false, &config);
        assert_eq!(health.next_wake(), due, "another bad answer does not put the next probe off");
        health.probed(now, true, &config);
        assert_eq!((health.state(), health.next_wake()), (HealthState::Up, None));
    }

    #[test]
    fn the_breaker_opens_on_a_rate_with_volume() {
        let config = Config::default();
        // (successes, failures, expected)
        for (good, bad, expect) in [
            (0, 4, HealthState::Up),
            (0, 5, HealthState::Open),
            (5, 4, HealthState::Up),
            (5, 5, HealthState::Open),
            (100, 20, HealthState::Up),
        ] {
            let mut health = up(&config);
            for _ in 0..good {
                health.succeeded(Tick(1), &config);
            }
            for _ in 0..bad {
                health.failed(Tick(1), Failure::Status5xx, &config);
            }
            assert_eq!(health.state(), expect, "{good} good, {bad} bad");
        }
    }

    #[test]
    fn old_failures_are_forgotten() {
        let config = Config::default();
        let mut health = up(&config);
        for i in 0..40 {
            health.failed(Tick(i * 60_000_000), Failure::Timeout, &config);
        }
        assert_eq!(health.state(), HealthState::Up, "one a minute is no volume");
    }

    #[test]
    fn overload_is_no_failure_and_a_refused_connection_is_down() {
        let config = Config::default();
        let mut health = up(&config);
        for _ in 0..100 {
            health.failed(Tick(1), Failure::Overloaded { retry_after: None }, &config);
        }
        assert_eq!(health.state(), HealthState::Up);
        health.failed(Tick(1), Failure::Connect, &config);
        assert_eq!(health.state(), HealthState::Down);
    }

    #[test]
    fn a_worker_that_only_says_that_it_cannot_serve_is_ill() {
        let config = Config::default();
        for (good, unavailable, expect) in [
            (0, 4, HealthState::Up),
            (0, 5, HealthState::Open),
            (1, 8, HealthState::Up),
            (1, 9, HealthState::Open),
            (20, 100, HealthState::Up),
        ] {
            let mut health = up(&config);
            for _ in 0..good {
                health.succeeded(Tick(1), &config);
            }
            for _ in 0..unavailable {
                health.failed(Tick(1), Failure::Unavailable { retry_after: None }, &config);
            }
            assert_eq!(health.state(), expect, "{good} good, {unavailable} unavailable");
        }
    }

    #[test]
    fn a_failed_trial_opens_for_longer_and_a_good_one_closes() {
        let config = Config::default();
        let mut health = up(&config);
        let mut now = Tick(1);
        for _ in 0..5 {
            health.failed(now, Failure::Reset, &config);
        }
        let mut waits = Vec::new();
        for _ in 0..6 {
            let until = health.next_wake().unwrap();
            waits.push(until.since(now).as_secs());
            now = until;
            assert!(!health.wake(now, &config), "a trial, no probe");
            assert_eq!(health.state(), HealthState::HalfOpen);
            health.probed(now, true, &config);
            assert_eq!(health.state(), HealthState::HalfOpen, "a probe does not close it");
            health.failed(now, Failure::Reset, &config);
        }
        assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
        now = health.next_wake().unwrap();
        health.wake(now, &config);
        health.succeeded(now, &config);
        assert_eq!(health.state(), HealthState::Up);
        health.failed(now, Failure::Reset, &config);
        assert_eq!(health.state(), HealthState::Up, "it starts with a clean slate");
    }
}
