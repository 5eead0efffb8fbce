//! A run in virtual time: a trace arrives at a policy in front of a fleet of engines.
//!
//! Every engine takes one step after the other. A step's results exist when its time has passed; the engine begins its next
//! step before anybody can react to them, so that what is sent then waits for the step after it, as it would behind a
//! real network. The scheduler hears of a first token, an end and a change of the cache when the step ends; of the
//! engine's own gauges, and of the progress of what runs there, once a second.
//!
//! A crash breaks every connection to the engine: a request whose first token has come is failed, since its client holds
//! part of an answer; any other is sent again, by the scheduler as it sees fit, for a rival by its own choice among the
//! engines that are up, at once.
//!
//! Invariants: each row gets exactly one end; time never goes back; equal arguments give equal results.
//!
//! Not here: what the figures mean (`cell`), where requests go (`forebay-scheduler`, `rivals`).

mod node;
mod scheduler;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use forebay_scheduler::{Action, End, Event, Failure, KvEvent, Refusal, RequestId, Tick, WorkerId};

pub(crate) use self::node::Node;
use self::scheduler::Scheduler;
use crate::rivals::{Ask, Router, Setup};
use crate::rng::Rng;
use crate::{Cell, Emission, Entry, Fault, FaultKind, Policy, Settings, Trace, What};

/// How often an engine's gauges are read: the gateway's pace for a worker with traffic.
const POLL: Duration = Duration::from_secs(1);
/// Output tokens between two reports of a request's progress.
const PROGRESS_TOKENS: u32 = 32;
/// A run in which nothing happened for so long will not end by itself: no engine is left, and none returns.
const STALLED: Duration = Duration::from_secs(3600);

/// What a run gives back.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its figures.
    pub cell: Cell,
    /// All that happened, in order.
    pub log: Vec<Entry>,
    /// Prefill speed of each engine in tokens/s as the scheduler measured it; of a rival nothing.
    pub rates: Vec<Option<f64>>,
}

/// Lets `trace` arrive at `policy` under `settings`. Equal arguments give equal outcomes.
#[must_use]
pub fn run(trace: &Trace, settings: &Settings, policy: Policy, seed: u64) -> Outcome {
    let mut run = Run::new(trace, settings, policy, seed);
    run.go_on_to_the_end();
    let (decisions, rates) = match &mut run.gateway {
        Gateway::Scheduler(scheduler) => (std::mem::take(&mut scheduler.decisions), scheduler.rates(run.now)),
        Gateway::Rival(..) => (Vec::new(), Vec::new()),
    };
    let cell = Cell::of(&run.log, trace, settings, (policy.name(), seed), &decisions);
    Outcome { cell, log: run.log, rates }
}

/// What is due at some time; of what is due at one time, the first variant comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    StepEnds { worker: u32, life: u32 },
    FaultBegins(usize),
    FaultEnds(usize),
    Poll(u32),
    Arrival(u32),
}

enum Gateway {
    Scheduler(Box<Scheduler>),
    Rival(Box<dyn Router>, Rng),
}

struct Run<'a> {
    trace: &'a Trace,
    settings: &'a Settings,
    arrivals: Vec<Duration>,
    nodes: Vec<Node>,
    gateway: Gateway,
    due: BinaryHeap<Reverse<(Tick, Due)>>,
    now: Tick,
    log: Vec<Entry>,
    /// Rows without an end.
    open: usize,
    /// When anything but a poll or a timer happened last.
    alive: Tick,
    /// The worker to which each row was bound last.
    bound: Vec<Option<u32>>,
    /// Engines that got requests since steps were begun last.
    touched: Vec<u32>,
    /// Requests that a rival could give to nobody, since no engine was up.
    stranded: VecDeque<u32>,
}

impl<'a> Run<'a> {
    fn new(trace: &'a Trace, settings: &'a Settings, policy: Policy, seed: u64) -> Self {
        let gateway = match policy.rival {
            None => Gateway::Scheduler(Box::new(Scheduler::new(trace, settings, seed))),
            Some(make) => Gateway::Rival(make(&setup(trace, settings)), Rng::new(seed, 2)),
        };
        let node = |worker| Node::new(worker, settings.engine.clone(), settings.speed(worker));
        let mut run = Self {
            trace,
            settings,
            arrivals: trace.arrivals(settings.rate, settings.jitter, seed),
            nodes: (0..settings.workers.max(1)).map(node).collect(),
            gateway,
            due: BinaryHeap::new(),
            now: Tick::ZERO,
            log: Vec::with_capacity(trace.rows.len() * 5),
            open: trace.rows.len(),
            alive: Tick::ZERO,
            bound: vec![None; trace.rows.len()],
            touched: Vec::new(),
            stranded: VecDeque::new(),
        };
        let mut phases = Rng::new(seed, 3);
        for worker in 0..settings.workers {
            run.due_after(POLL.mul_f64(phases.unit()), Due::Poll(worker));
        }
        for (number, fault) in settings.faults.iter().enumerate() {
            run.due_after(fault.at, Due::FaultBegins(number));
        }
        run.next_arrival(0);
        run.act();
        run
    }

    fn go_on_to_the_end(&mut self) {
        while self.open > 0 && self.now.since(self.alive) < STALLED {
            let deadline = match &self.gateway {
                Gateway::Scheduler(scheduler) => scheduler.next_deadline(),
                Gateway::Rival(..) => None,
            };
            let next = self.due.peek().map(|Reverse((at, _))| *at);
            match (next, deadline) {
                (next, Some(deadline)) if next.is_none_or(|at| deadline < at) => {
                    self.now = self.now.max(deadline);
                    if let Gateway::Scheduler(scheduler) = &mut self.gateway {
                        scheduler.tick(self.now);
                    }
                }
                (Some(at), _) => {
                    self.now = at;
                    if let Some(Reverse((_, due))) = self.due.pop() {
                        self.happen(due);
                    }
                }
                (None, _) => return,
            }
            self.act();
            self.begin_steps();
        }
        for number in self.unfinished() {
            self.note(number, What::Failed);
        }
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::StepEnds { worker, life } => self.step_ends(worker, life),
            Due::FaultBegins(number) => self.fault_begins(number),
            Due::FaultEnds(number) => self.fault_ends(number),
            Due::Poll(worker) => self.poll(worker),
            Due::Arrival(number) => self.arrive(number),
        }
    }

    fn due_after(&mut self, wait: Duration, due: Due) {
        self.due.push(Reverse((self.now.after(wait), due)));
    }

    fn note(&mut self, request: u32, what: What) {
        self.log.push(Entry { at: self.now, request, what });
        self.alive = self.now;
        if what.is_end() {
            self.open = self.open.saturating_sub(1);
        }
    }

    fn next_arrival(&mut self, number: u32) {
        if let Some(at) = self.arrivals.get(number as usize) {
            self.due.push(Reverse((Tick::ZERO.after(*at), Due::Arrival(number))));
        }
    }

    fn arrive(&mut self, number: u32) {
        self.next_arrival(number + 1);
        let Some(row) = self.trace.rows.get(number as usize) else { return };
        self.note(number, What::Arrived);
        let tokens = u64::from(row.prompt_tokens.max(1)) + u64::from(row.output_tokens);
        let engine = &self.settings.engine;
        if tokens.div_ceil(u64::from(engine.block_tokens.max(1))) > u64::from(engine.kv_blocks) {
            return self.note(number, What::Refused);
        }
        match &mut self.gateway {
            Gateway::Scheduler(scheduler) => {
                scheduler.arrived(self.now, number, row);
                if let Some(worker) = scheduler.placed(number) {
                    self.place(number, worker);
                }
            }
            Gateway::Rival(..) => self.route(number),
        }
    }

    /// Notes that a request is bound to a worker, unless it was before.
    fn place(&mut self, number: u32, worker: u32) {
        if let Some(bound) = self.bound.get_mut(number as usize)
            && bound.replace(worker) != Some(worker)
        {
            self.note(number, What::Placed { worker });
        }
    }

    /// Lets the rival choose, and sends.
    fn route(&mut self, number: u32) {
        let Gateway::Rival(router, rng) = &mut self.gateway else { return };
        let Some(row) = self.trace.rows.get(number as usize) else { return };
        let up: Vec<&Node> = self.nodes.iter().filter(|node| node.is_up()).collect();
        let chosen = router.route(&Ask::new(self.now, number, row, self.trace.block_tokens), &up, rng);
        match up.get(chosen).map(|node| node.number()) {
            Some(worker) => self.send(number, worker),
            None => self.stranded.push_back(number),
        }
    }

    fn send(&mut self, number: u32, worker: u32) {
        let Some(row) = self.trace.rows.get(number as usize) else { return };
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        if node.is_up() {
            node.submit(self.now, number, row);
            self.touched.push(worker);
            self.place(number, worker);
            self.note(number, What::Sent { worker });
        } else {
            self.tell(Event::AttemptFailed { request: RequestId(u64::from(number)), failure: Failure::Connect });
        }
    }

    fn tell(&mut self, event: Event) {
        if let Gateway::Scheduler(scheduler) = &mut self.gateway {
            scheduler.tell(self.now, event);
        }
    }

    /// Performs what the scheduler asks for, until it asks for nothing.
    fn act(&mut self) {
        loop {
            let Gateway::Scheduler(scheduler) = &mut self.gateway else { return };
            let Some(action) = scheduler.next_action() else { return };
            match action {
                Action::Send { request, worker, .. } => self.send(row_number(request), worker.0),
                Action::Refuse { request, reason, .. } => self.note(row_number(request), refusal(reason)),
                Action::Probe { worker } => {
                    let healthy = self.nodes.get(worker.0 as usize).is_some_and(Node::is_up);
                    self.tell(Event::Probed { worker, healthy });
                }
                Action::Health { .. }
                | Action::Wake { .. }
                | Action::Sleep { .. }
                | Action::LoadAdapter { .. }
                | Action::UnloadAdapter { .. } => {}
            }
        }
    }

    /// Lets engines that got requests and did nothing begin.
    fn begin_steps(&mut self) {
        for worker in std::mem::take(&mut self.touched) {
            let Some(node) = self.nodes.get_mut(worker as usize) else { continue };
            if let Some(until) = node.begin(self.now) {
                self.due.push(Reverse((until, Due::StepEnds { worker, life: node.life() })));
            }
        }
    }

    fn step_ends(&mut self, worker: u32, life: u32) {
        let Some(node) = self.nodes.get_mut(worker as usize).filter(|node| node.life() == life) else { return };
        let Some(step) = node.end() else { return };
        self.alive = self.now;
        if let Some(until) = node.begin(self.now) {
            self.due.push(Reverse((until, Due::StepEnds { worker, life })));
        }
        if let Gateway::Scheduler(scheduler) = &mut self.gateway {
            scheduler.cache_changed(self.now, worker, &step.events);
        }
        for id in step.preempted {
            self.note(u32::try_from(id.0).unwrap_or(u32::MAX), What::Preempted { worker });
        }
        for emission in step.emitted {
            self.emitted(worker, &emission);
        }
    }

    fn emitted(&mut self, worker: u32, emission: &Emission) {
        let number = u32::try_from(emission.id.0).unwrap_or(u32::MAX);
        let request = RequestId(emission.id.0);
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        let Some(held) = node.held_mut(number) else { return };
        held.generated += emission.tokens;
        let (cached_tokens, output_tokens) = (emission.first_cached_tokens, held.generated);
        if let Some(cached_tokens) = cached_tokens {
            (held.started, held.cached_tokens) = (true, cached_tokens);
            self.note(number, What::FirstToken { worker, cached_tokens });
            if !self.settings.whole_answers {
                self.tell(Event::FirstToken { request });
            }
        }
        if emission.finished {
            self.finished(worker, number, output_tokens);
        }
    }

    fn finished(&mut self, worker: u32, number: u32, output_tokens: u32) {
        let Some(row) = self.trace.rows.get(number as usize) else { return };
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        let cached_tokens = node.cached_tokens(number);
        node.forget(number, row);
        self.note(number, What::Finished { worker, cached_tokens, output_tokens });
        let (prompt_tokens, cached_tokens) = (row.prompt_tokens, Some(cached_tokens));
        if self.settings.whole_answers {
            self.tell(Event::FirstToken { request: RequestId(u64::from(number)) });
        }
        let end = End::Finished { prompt_tokens, cached_tokens, output_tokens };
        self.tell(Event::Ended { request: RequestId(u64::from(number)), end });
    }

    fn poll(&mut self, worker: u32) {
        self.due_after(POLL, Due::Poll(worker));
        let Gateway::Scheduler(scheduler) = &mut self.gateway else { return };
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        if !node.is_up() {
            return scheduler.tell(self.now, Event::LoadLost { worker: WorkerId(worker) });
        }
        scheduler.polled(self.now, worker, &node.load());
        for (number, held) in node.held() {
            if held.generated - held.told >= PROGRESS_TOKENS {
                held.told = held.generated;
                let request = RequestId(u64::from(number));
                scheduler.tell(self.now, Event::Progress { request, output_tokens: held.generated });
            }
        }
    }

    fn fault_begins(&mut self, index: usize) {
        let Some(Fault { worker, kind, lasts, .. }) = self.settings.faults.get(index).cloned() else { return };
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        if let Some(lasts) = lasts {
            self.due.push(Reverse((self.now.after(lasts), Due::FaultEnds(index))));
        }
        match kind {
            FaultKind::Slow(factor) => node.slowdown = factor.max(0.01),
            FaultKind::Crash => {
                for (number, started) in node.crash() {
                    self.broken(number, started);
                }
            }
        }
    }

    /// The connection over which a request was to be answered broke.
    fn broken(&mut self, number: u32, started: bool) {
        let request = RequestId(u64::from(number));
        match (started, &self.gateway) {
            (true, _) => {
                self.note(number, What::Failed);
                self.tell(Event::Ended { request, end: End::Failed(Failure::Reset) });
            }
            (false, Gateway::Scheduler(_)) => self.tell(Event::AttemptFailed { request, failure: Failure::Reset }),
            (false, Gateway::Rival(..)) => self.route(number),
        }
    }

    fn fault_ends(&mut self, index: usize) {
        let Some(Fault { worker, kind, .. }) = self.settings.faults.get(index).cloned() else { return };
        let Some(node) = self.nodes.get_mut(worker as usize) else { return };
        match kind {
            FaultKind::Slow(_) => node.slowdown = 1.0,
            FaultKind::Crash => {
                node.restart();
                self.tell(Event::Kv { worker: WorkerId(worker), change: KvEvent::Cleared });
                for number in std::mem::take(&mut self.stranded) {
                    self.route(number);
                }
            }
        }
    }

    fn unfinished(&self) -> Vec<u32> {
        let mut open = vec![true; self.trace.rows.len()];
        for entry in self.log.iter().filter(|entry| entry.what.is_end()) {
            if let Some(open) = open.get_mut(entry.request as usize) {
                *open = false;
            }
        }
        (0_u32..).zip(open).filter_map(|(number, open)| open.then_some(number)).collect()
    }
}

fn setup(trace: &Trace, settings: &Settings) -> Setup {
    let mut rows = trace.rows.iter();
    let mut common: &[u64] = rows.next().map_or(&[], |row| &row.blocks);
    for row in rows {
        let shared = common.iter().zip(&*row.blocks).take_while(|(a, b)| a == b).count();
        common = common.get(..shared).unwrap_or_default();
    }
    Setup { workers: settings.workers as usize, block_tokens: trace.block_tokens, common_blocks: common.len() }
}

fn row_number(request: RequestId) -> u32 {
    u32::try_from(request.0).unwrap_or(u32::MAX)
}

fn refusal(reason: Refusal) -> What {
    match reason {
        Refusal::QueueFull => What::Shed,
        Refusal::TimedOut | Refusal::DeadlineInfeasible | Refusal::DeadlineTooShort | Refusal::DeadlinePassed => {
            What::TimedOut
        }
        Refusal::TooLarge => What::Refused,
        Refusal::NoWorker
        | Refusal::AdapterUnavailable
        | Refusal::Busy { .. }
        | Refusal::AttemptsExhausted { .. }
        | Refusal::PoolUnknown => What::Failed,
    }
}
