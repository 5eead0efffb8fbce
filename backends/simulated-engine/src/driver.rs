//! Runs the engine model in real time.
//!
//! One task calls [`Engine::step`] and sleeps for the step's duration; requests put their sequences in and watch how many
//! tokens they have. The tokens themselves are known beforehand (`output`), so a watched count is all that has to travel,
//! and a slow reader costs no memory.
//!
//! Invariants: dropping a [`Run`] takes its unfinished sequences out of the engine at once; metrics see it in the same
//! moment.

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_simulator::{Engine, EngineConfig, Load, Sequence, SequenceId, Step};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::kv_events::{Content, Contents, Publisher};

/// How far a step may lag behind its time before the clock gives up catching up.
const LAG_MAX: Duration = Duration::from_millis(50);

/// Longest step that is waited for, in seconds; only a configuration that makes no sense has longer ones.
const STEP_SECONDS_MAX: f64 = 3600.0;

/// The engine, shared by all requests.
#[derive(Debug)]
pub(crate) struct Driver {
    state: Mutex<State>,
    wake: Notify,
    /// How many times faster than its model it runs.
    speed: Mutex<f64>,
    queued_max: Option<u32>,
    publisher: Option<Arc<Publisher>>,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    members: HashMap<SequenceId, Member>,
    /// What may be published; empty without a publisher.
    contents: Contents,
    next_id: u64,
    stats: Stats,
}

/// A sequence's place in its request.
#[derive(Debug)]
struct Member {
    progress: Arc<watch::Sender<Vec<Progress>>>,
    at: usize,
    end: End,
    since: Instant,
    last: Option<Instant>,
    content: Option<Arc<Content>>,
}

/// One sequence to run.
#[derive(Debug)]
pub(crate) struct Job {
    /// Prompt and output in blocks, see [`Sequence::blocks`].
    pub(crate) content: Content,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) end: End,
}

/// Why a sequence ends, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Stop,
    Length,
}

/// How far a sequence is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) finished: bool,
}

/// The refusal of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// More sequences are in the engine than `max_queued_requests` allows.
    Full,
    /// The KV memory is too small for it, whatever else runs.
    TooLarge,
}

/// What the metrics tell beyond the engine's own [`Load`].
#[derive(Clone, Debug)]
pub(crate) struct Stats {
    pub(crate) stopped: u64,
    pub(crate) length: u64,
    pub(crate) aborted: u64,
    pub(crate) rejected: u64,
    pub(crate) ttft_seconds: Histogram,
    pub(crate) itl_seconds: Histogram,
    pub(crate) e2e_seconds: Histogram,
}

/// Counts of values at most each bound.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    pub(crate) bounds: &'static [f64],
    /// One more than `bounds`; not cumulative.
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, value: Duration) {
        let value = value.as_secs_f64();
        self.sum += value;
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
    }
}

/// vLLM's bucket bounds.
const TTFT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const ITL_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const E2E_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

impl Driver {
    pub(crate) fn new(
        config: EngineConfig,
        speed: f64,
        queued_max: Option<u32>,
        publisher: Option<Arc<Publisher>>,
    ) -> Self {
        let stats = Stats {
            stopped: 0,
            length: 0,
            aborted: 0,
            rejected: 0,
            ttft_seconds: Histogram::new(TTFT_SECONDS),
            itl_seconds: Histogram::new(ITL_SECONDS),
            e2e_seconds: Histogram::new(E2E_SECONDS),
        };
        let state = State {
            engine: Engine::new(config),
            members: HashMap::new(),
            contents: Contents::default(),
            next_id: 0,
            stats,
        };
        Self { state: Mutex::new(state), wake: Notify::new(), speed: Mutex::new(speed), queued_max, publisher }
    }

    /// Puts the sequences of one request into the engine, all or none.
    pub(crate) fn start(self: &Arc<Self>, jobs: Vec<Job>) -> Result<Run, Refused> {
        let (sender, receiver) = watch::channel(vec![Progress::default(); jobs.len()]);
        let mut run = Run { driver: Arc::clone(self), ids: Vec::with_capacity(jobs.len()), progress: receiver };
        {
            let sender = Arc::new(sender);
            let mut state = self.state.lock();
            let load = state.engine.load();
            let queued = (load.running + load.waiting) as usize + jobs.len();
            if self.queued_max.is_some_and(|max| queued > max as usize) {
                state.stats.rejected += 1;
                drop(state);
                return Err(Refused::Full);
            }
            let refused = jobs.into_iter().enumerate().any(|(at, job)| {
                let id = SequenceId(state.next_id);
                state.next_id += 1;
                let Job { content, prompt_tokens, output_tokens, end } = job;
                let blocks = content.blocks.clone();
                if state.engine.submit(Sequence { id, blocks, prompt_tokens, output_tokens }).is_err() {
                    return true;
                }
                run.ids.push(id);
                let content = self.publisher.as_ref().map(|_| Arc::new(content));
                content.iter().for_each(|content| state.contents.enter(content));
                let progress = Arc::clone(&sender);
                state.members.insert(id, Member { progress, at, end, since: Instant::now(), last: None, content });
                false
            });
            if refused {
                // The lock is released first, as dropping `run` takes out what was put in.
                drop(state);
                return Err(Refused::TooLarge);
            }
        }
        self.wake.notify_one();
        Ok(run)
    }

    /// Gauges, counters and histograms of one moment.
    pub(crate) fn load(&self) -> (Load, Stats) {
        let state = self.state.lock();
        (state.engine.load(), state.stats.clone())
    }

    /// What takes so many milliseconds in the timing model, at the speed of now.
    pub(crate) fn time_of(&self, ms: f64) -> Duration {
        Duration::from_secs_f64((ms / 1000.0 / *self.speed.lock()).clamp(0.0, STEP_SECONDS_MAX))
    }

    pub(crate) fn set_speed(&self, speed: f64) {
        *self.speed.lock() = speed;
    }

    /// Steps the engine for ever; ends only by being dropped.
    pub(crate) async fn drive(self: Arc<Self>) {
        let mut due = Instant::now();
        loop {
            let step = self.state.lock().engine.step();
            let Some(step) = step else {
                self.wake.notified().await;
                due = Instant::now();
                continue;
            };
            // Steps follow each other without drift, unless the machine is too slow for them.
            let seconds = (step.duration.as_secs_f64() / *self.speed.lock()).min(STEP_SECONDS_MAX);
            due += Duration::from_secs_f64(seconds);
            let now = Instant::now();
            if due > now {
                tokio::time::sleep_until(due).await;
            } else {
                due = due.max(now.checked_sub(LAG_MAX).unwrap_or(now));
                tokio::task::yield_now().await;
            }
            let mut state = self.state.lock();
            if let Some(publisher) = &self.publisher {
                publisher.step(&step.events, &state.contents);
            }
            state.deliver(&step);
        }
    }

    /// Puts blocks that another engine computed into the prefix cache, as far as there is room.
    pub(crate) fn fill(&self, blocks: &[u64]) {
        self.state.lock().engine.fill_cache(blocks);
    }

    /// Empties the prefix cache and lets `then` publish that before anything else happens. Refused, as by vLLM, while
    /// sequences hold blocks.
    pub(crate) fn clear_cache(&self, then: impl FnOnce(&Publisher)) -> bool {
        let mut state = self.state.lock();
        let cleared = state.engine.clear_cache();
        self.publisher().filter(|_| cleared).map(then);
        cleared
    }

    pub(crate) fn publisher(&self) -> Option<&Publisher> {
        self.publisher.as_deref()
    }
}

impl State {
    fn deliver(&mut self, step: &Step) {
        let now = Instant::now();
        for emission in &step.emitted {
            // Absent when the client left during the step.
            let Some(member) = self.members.get_mut(&emission.id) else { continue };
            if emission.tokens > 0 {
                match member.last.replace(now) {
                    Some(last) => self.stats.itl_seconds.observe(now - last),
                    None => self.stats.ttft_seconds.observe(now - member.since),
                }
            }
            member.progress.send_modify(|all| {
                let Some(progress) = all.get_mut(member.at) else { return };
                progress.tokens += emission.tokens;
                progress.finished = emission.finished;
                if let Some(cached) = emission.first_cached_tokens {
                    progress.cached_tokens = cached;
                }
            });
            if emission.finished {
                self.stats.e2e_seconds.observe(now - member.since);
                match member.end {
                    End::Stop => self.stats.stopped += 1,
                    End::Length => self.stats.length += 1,
                }
                self.leave(emission.id);
            }
        }
    }

    /// Forgets a sequence; returns whether it was there.
    fn leave(&mut self, id: SequenceId) -> bool {
        let member = self.members.remove(&id);
        if let Some(content) = member.as_ref().and_then(|member| member.content.as_ref()) {
            self.contents.leave(content);
        }
        member.is_some()
    }
}

/// The sequences of one request inside the engine; dropping it aborts those that are not finished.
#[derive(Debug)]
pub(crate) struct Run {
    driver: Arc<Driver>,
    ids: Vec<SequenceId>,
    progress: watch::Receiver<Vec<Progress>>,
}

impl Run {
    /// Waits for news since the last call and gives the state of all sequences, in the order of their jobs. `None` when
    /// nothing more will come.
    pub(crate) async fn next(&mut self) -> Option<Vec<Progress>> {
        self.progress.changed().await.ok()?;
        Some(self.progress.borrow_and_update().clone())
    }

    /// Waits until all sequences are finished.
    pub(crate) async fn finished(&mut self) -> Vec<Progress> {
        match self.progress.wait_for(|all| all.iter().all(|progress| progress.finished)).await {
            Ok(all) => all.clone(),
            Err(_) => Vec::new(),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let mut state = self.driver.state.lock();
        for id in &self.ids {
            if state.leave(*id) && state.engine.abort(*id) {
                state.stats.aborted += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_follows_the_engine_model() {
        // A prefill of a second and ten steps of 50 ms, at ten times the speed.
        let timing = EngineConfig {
            prefill_tokens_per_s: 100.0,
            step_ms: 50.0,
            step_ms_per_seq: 0.0,
            ..EngineConfig::default()
        };
        let driver = Arc::new(Driver::new(timing, 10.0, None, None));
        TaskTracker::new().spawn(Arc::clone(&driver).drive());
        let job = Job { content: Content::default(), prompt_tokens: 100, output_tokens: 10, end: End::Length };
        let begin = Instant::now();
        let mut run = driver.start(vec![job]).unwrap();
        assert_eq!(run.next().await.unwrap()[0].tokens, 1);
        let first = begin.elapsed();
        assert!(run.finished().await[0].finished);
        // A timer ends at a whole millisecond.
        let millis = |time: Duration, expect: u64| (expect..=expect + 1).contains(&(time.as_millis() as u64));
        assert!(millis(first, 105) && millis(begin.elapsed(), 150), "{first:?}, {:?}", begin.elapsed());
    }
}
