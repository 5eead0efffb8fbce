//! What a worker's engine says of its load, asked for at the pace at which it can have changed.
//!
//! At one [`Pace`] while requests are under way and at a slower one otherwise, with jitter, so that the polls of many
//! workers and gateways do not fall together. What was sent since the last poll is the scheduler's own to add.
//!
//! Invariants: at most one poll of a worker at a time; [`Signal::Lost`] comes once when an engine stops to tell, and
//! again only after it told something in between.
//!
//! What its prefix cache holds comes another way and at the engine's pace: [`kv_events`]. What the GPUs beneath say comes
//! from their machine: [`gpu`].
//!
//! Not here: whether the worker can be reached ([`probe`](crate::engines::probe)): a poll that fails means that the load
//! is unknown, not that the worker is down. Under 20 streams a llama.cpp server with its default number of threads left
//! `/metrics` unanswered for 36 s while it worked well.

pub mod gpu;
pub mod kv_events;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use crate::{
    engines::{self, Engine, Load},
    transport::Channel,
};

/// Part of a period by which it is shortened or lengthened at random.
const JITTER: f64 = 0.1;

/// How often to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between polls of a worker in use, and between looks whether it came into use.
    pub busy: Duration,
    /// Between polls of a worker that is not in use.
    pub idle: Duration,
}

impl Default for Pace {
    /// Every second: vLLM's gauges move once a step (some 10 ms), and its text costs the engine a few milliseconds of
    /// Python to write. Every five seconds where nothing of ours is under way, which also sees foreign load come.
    fn default() -> Self {
        Self { busy: Duration::from_secs(1), idle: Duration::from_secs(5) }
    }
}

/// A fact about a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Signal {
    /// What its engine says of itself now.
    Load(Load),
    /// It no longer says anything that can be read; what it said before is out of date.
    Lost,
}

/// Tells a worker's [`Signals`] that requests go there. To be called for each; costs one store.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<AtomicBool>);

impl Traffic {
    /// A request was sent, or is still under way.
    pub fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// The stream of one worker's signals.
pub struct Signals {
    channel: Channel,
    engine: &'static dyn Engine,
    rank: Option<u32>,
    traffic: Traffic,
    pace: Pace,
    next_look: Instant,
    poll_by: Instant,
    told: Told,
}

/// What the receiver was told last.
#[derive(PartialEq)]
enum Told {
    Nothing,
    Lost,
    Quiet,
    Busy,
}

impl Signals {
    /// The signals of the engine behind `channel`; `None` for an engine that publishes no load.
    #[must_use]
    pub fn new(channel: Channel, engine: &'static dyn Engine, traffic: Traffic, pace: Pace) -> Option<Self> {
        if engine.load_paths().is_empty() {
            return None;
        }
        let now = Instant::now();
        Some(Self { channel, engine, rank: None, traffic, pace, next_look: now, poll_by: now, told: Told::Nothing })
    }

    /// Those of one data-parallel rank alone.
    #[must_use]
    pub fn of_rank(self, rank: Option<u32>) -> Self {
        Self { rank, ..self }
    }

    /// Waits for the next signal; the first comes at once. Cancel-safe: a poll that is cut short is begun again by the
    /// next call.
    pub async fn next(&mut self) -> Signal {
        loop {
            sleep_until(self.next_look).await;
            let now = Instant::now();
            let used = self.traffic.take() || self.told == Told::Busy;
            if !used && now < self.poll_by {
                self.next_look = self.poll_by.min(now + jittered(self.pace.busy));
                continue;
            }
            // Should the poll be cut short, the next one is due at once.
            self.poll_by = now;
            let load = self.poll().await;
            let now = Instant::now();
            self.next_look = now + jittered(self.pace.busy);
            self.poll_by = now + jittered(self.pace.idle);
            match load {
                Some(load) => {
                    self.told = if load.running > 0 || load.waiting > 0 { Told::Busy } else { Told::Quiet };
                    return Signal::Load(load);
                }
                None if self.told == Told::Lost => {}
                None => {
                    self.told = Told::Lost;
                    return Signal::Lost;
                }
            }
        }
    }

    async fn poll(&self) -> Option<Load> {
        engines::load(&self.channel, self.engine, self.rank).await.unwrap_or_else(|error| {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(endpoint = %self.channel.endpoint(), error, "the engine's metrics cannot be read");
            None
        })
    }
}

fn jittered(period: Duration) -> Duration {
    period.mul_f64(1.0 + rand::random_range(-JITTER..JITTER))
}
