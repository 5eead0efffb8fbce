//! Models that take turns in the memory of one GPU, in virtual time: each row of a trace asks for the model of its tenant's
//! number, each model has an engine of its own that sleeps or is awake.
//!
//! The scheduler decides who wakes, or a rival that wakes in turn: whatever is asked for and sleeps wakes as soon as it may,
//! and the next in turn makes room for it. Either finishes what it has before it sleeps.
//!
//! Engines that are awake together do not slow each other here, under either.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use forebay_scheduler::{
    Action, Class, Config, Core, End, Event, GpuId, PoolId, PoolLimits, Request, RequestId, RouteId, SleepSpec,
    TenantId, Tick, WorkerId, WorkerSpec,
};

use crate::{Engine, EngineConfig, Row, Sequence, SequenceId, Step, Trace};

const GPU: GpuId = GpuId(0);

/// The models and their GPU.
#[derive(Debug, Clone)]
pub struct Turns {
    /// Memory of each model, in any unit.
    pub sizes: Vec<u64>,
    /// Memory of the GPU.
    pub memory: u64,
    /// Time to wake.
    pub wake: Duration,
    /// Time to fall asleep.
    pub sleep: Duration,
    /// Least time awake, for the scheduler.
    pub residency: Duration,
    /// Each model's engine.
    pub engine: EngineConfig,
    /// Tunables of the scheduler.
    pub scheduler: Config,
}

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waker {
    /// The scheduler.
    Forebay,
    /// See the module.
    RoundRobin,
}

/// What became of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Turned {
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that were not.
    pub lost: usize,
    /// Times that a model was woken.
    pub wakes: u64,
    /// The most memory that was in use at once.
    pub memory_max: u64,
    /// Seconds from each answered request's arrival to its first token, shortest first.
    pub waits: Vec<f64>,
}

impl Turned {
    /// Mean seconds to the first token.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.waits.iter().sum::<f64>() / self.waits.len().max(1) as f64
    }
}

/// Lets `trace` arrive. Equal arguments give equal results.
#[must_use]
pub fn take_turns(trace: &Trace, turns: &Turns, waker: Waker, seed: u64) -> Turned {
    let mut run = Run::new(trace, turns, waker, seed);
    run.go_on_to_the_end();
    let mut turned = run.turned;
    turned.lost = trace.rows.len() - turned.answered;
    turned.waits.sort_by(f64::total_cmp);
    turned
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    StepEnds(usize),
    Awake(usize),
    Asleep(usize),
    Arrival(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Awake,
    FallingAsleep,
    Asleep,
    Waking,
}

struct Model {
    engine: Engine,
    step: Option<Step>,
    state: State,
    /// Requests sent and not ended.
    sent: usize,
}

/// The rival's own state.
#[derive(Default)]
struct InTurn {
    /// What waits for each model.
    waits: Vec<VecDeque<usize>>,
    /// Who makes room next.
    next: usize,
    /// Who is to sleep once it has nothing more.
    leaving: Option<usize>,
}

enum Decides {
    Core(Box<Core>),
    InTurn(InTurn),
}

struct Run<'a> {
    trace: &'a Trace,
    turns: &'a Turns,
    models: Vec<Model>,
    decides: Decides,
    due: BinaryHeap<Reverse<(Tick, Due)>>,
    now: Tick,
    turned: Turned,
    arrived: Vec<Tick>,
}

impl<'a> Run<'a> {
    fn new(trace: &'a Trace, turns: &'a Turns, waker: Waker, seed: u64) -> Self {
        let model =
            |_: &u64| Model { engine: Engine::new(turns.engine.clone()), step: None, state: State::Asleep, sent: 0 };
        let decides = match waker {
            Waker::Forebay => Decides::Core(Box::new(Core::new(turns.scheduler.clone(), seed))),
            Waker::RoundRobin => {
                Decides::InTurn(InTurn { waits: vec![VecDeque::new(); turns.sizes.len()], ..InTurn::default() })
            }
        };
        let mut run = Self {
            trace,
            turns,
            models: turns.sizes.iter().map(model).collect(),
            decides,
            due: BinaryHeap::new(),
            now: Tick::ZERO,
            turned: Turned::default(),
            arrived: vec![Tick::ZERO; trace.rows.len()],
        };
        for (number, size) in (0_u32..).zip(&turns.sizes) {
            run.join(number, *size);
        }
        for (number, row) in trace.rows.iter().enumerate() {
            run.due.push(Reverse((Tick::ZERO.after(row.at), Due::Arrival(number))));
        }
        run
    }

    fn join(&mut self, number: u32, size: u64) {
        let (worker, pool) = (WorkerId(number), PoolId(number));
        let spec = WorkerSpec {
            kv_tokens: Some(u64::from(self.turns.engine.kv_blocks) * u64::from(self.turns.engine.block_tokens)),
            gpus: vec![GPU],
            memory_bytes: Some(size),
            gpu_bytes: Some(self.turns.memory),
            sleep: Some(SleepSpec { residency: self.turns.residency }),
            ..WorkerSpec::default()
        };
        self.tell(Event::PoolJoined { pool, limits: PoolLimits::default() });
        self.tell(Event::WorkerJoined { worker, pool, spec });
        self.tell(Event::SleepSeen { worker, asleep: true });
        self.tell(Event::Probed { worker, healthy: true });
    }

    fn go_on_to_the_end(&mut self) {
        loop {
            let next = self.due.peek().map(|Reverse((at, _))| *at);
            let deadline = match &self.decides {
                Decides::Core(core) if self.turned.answered < self.trace.rows.len() => core.next_deadline(),
                Decides::Core(_) | Decides::InTurn(_) => None,
            };
            match (next, deadline) {
                (next, Some(deadline)) if next.is_none_or(|at| deadline < at) => {
                    if deadline.since(self.now) > Duration::from_secs(3600) {
                        return; // nothing more will come of itself
                    }
                    self.now = self.now.max(deadline);
                    let mut actions = Vec::new();
                    if let Decides::Core(core) = &mut self.decides {
                        core.tick(self.now, &mut actions);
                    }
                    self.act(actions);
                }
                (Some(at), _) => {
                    self.now = at;
                    if let Some(Reverse((_, due))) = self.due.pop() {
                        self.happen(due);
                    }
                }
                (None, _) => return,
            }
        }
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Arrival(number) => self.arrive(number),
            Due::StepEnds(model) => self.step_ends(model),
            Due::Awake(model) => self.turned_to(model, State::Awake),
            Due::Asleep(model) => self.turned_to(model, State::Asleep),
        }
        self.rotate();
    }

    fn turned_to(&mut self, model: usize, state: State) {
        if let Some(model) = self.models.get_mut(model) {
            model.state = state;
        }
        self.tell(Event::SleepDone { worker: WorkerId(number(model)), worked: true });
    }

    fn arrive(&mut self, at: usize) {
        let (Some(row), Some(arrived)) = (self.trace.rows.get(at), self.arrived.get_mut(at)) else { return };
        *arrived = self.now;
        let model = row.tenant;
        match &mut self.decides {
            Decides::Core(_) => self.tell(Event::Arrived(request(at, row))),
            Decides::InTurn(turn) => {
                if let Some(waits) = turn.waits.get_mut(model as usize) {
                    waits.push_back(at);
                }
            }
        }
    }

    fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        if let Decides::Core(core) = &mut self.decides {
            core.handle(self.now, event, &mut actions);
        }
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { request, worker, .. } => self.send(at(request), worker.0 as usize),
                Action::Wake { worker } => self.wake(worker.0 as usize),
                Action::Sleep { worker } => self.sleep(worker.0 as usize),
                Action::Refuse { .. }
                | Action::Probe { .. }
                | Action::Health { .. }
                | Action::LoadAdapter { .. }
                | Action::UnloadAdapter { .. } => {}
            }
        }
    }

    fn wake(&mut self, at: usize) {
        let Some(model) = self.models.get_mut(at) else { return };
        model.state = State::Waking;
        self.turned.wakes += 1;
        self.turned.memory_max = self.turned.memory_max.max(self.used());
        self.due.push(Reverse((self.now.after(self.turns.wake), Due::Awake(at))));
    }

    fn sleep(&mut self, at: usize) {
        let Some(model) = self.models.get_mut(at) else { return };
        model.state = State::FallingAsleep;
        model.engine.clear_cache();
        self.due.push(Reverse((self.now.after(self.turns.sleep), Due::Asleep(at))));
    }

    fn used(&self) -> u64 {
        let models = self.models.iter().zip(&self.turns.sizes);
        models.filter(|(model, _)| model.state != State::Asleep).map(|(_, size)| size).sum()
    }

    fn send(&mut self, number: usize, to: usize) {
        let (Some(row), Some(model)) = (self.trace.rows.get(number), self.models.get_mut(to)) else { return };
        let sequence = Sequence {
            id: SequenceId(number as u64),
            blocks: row.blocks.to_vec(),
            prompt_tokens: row.prompt_tokens,
            output_tokens: row.output_tokens,
        };
        // What is sent to an engine that sleeps is lost.
        if model.state == State::Awake && model.engine.submit(sequence).is_ok() {
            model.sent += 1;
            self.begin_step(to);
        }
    }

    fn begin_step(&mut self, at: usize) {
        let Some(model) = self.models.get_mut(at).filter(|model| model.step.is_none()) else { return };
        if let Some(step) = model.engine.step() {
            self.due.push(Reverse((self.now.after(step.duration), Due::StepEnds(at))));
            model.step = Some(step);
        }
    }

    fn step_ends(&mut self, at: usize) {
        let Some(step) = self.models.get_mut(at).and_then(|model| model.step.take()) else { return };
        for emission in step.emitted {
            let number = usize::try_from(emission.id.0).unwrap_or(usize::MAX);
            let request = RequestId(emission.id.0);
            let (Some(row), Some(arrived)) = (self.trace.rows.get(number), self.arrived.get(number)) else { continue };
            if emission.first_cached_tokens.is_some() {
                self.turned.waits.push(self.now.seconds_since(*arrived));
                self.tell(Event::FirstToken { request });
            }
            if emission.finished {
                self.turned.answered += 1;
                if let Some(model) = self.models.get_mut(at) {
                    model.sent -= 1;
                }
                let (prompt_tokens, output_tokens) = (row.prompt_tokens, row.output_tokens);
                let end = End::Finished { prompt_tokens, cached_tokens: emission.first_cached_tokens, output_tokens };
                self.tell(Event::Ended { request, end });
            }
        }
        self.begin_step(at);
    }

    /// What the rival does now.
    fn rotate(&mut self) {
        let Decides::InTurn(turn) = &mut self.decides else { return };
        let mut send = Vec::new();
        for (at, (waits, model)) in turn.waits.iter_mut().zip(&self.models).enumerate() {
            if model.state == State::Awake && turn.leaving != Some(at) {
                send.extend(waits.drain(..).map(|number| (number, at)));
            }
        }
        let leaving = turn.leaving;
        // Whoever waits longest is next here, too.
        let asleep = |at: &usize| self.models.get(*at).is_some_and(|model| model.state == State::Asleep);
        let cold = turn.waits.iter().enumerate().filter_map(|(at, waits)| Some((*waits.front()?, at)));
        let cold = cold.filter(|(_, at)| asleep(at)).min().map(|(_, at)| at);
        send.into_iter().for_each(|(number, to)| self.send(number, to));
        let turning = self.models.iter().any(|model| matches!(model.state, State::FallingAsleep | State::Waking));
        match (leaving, cold) {
            (Some(at), _) if self.models.get(at).is_some_and(|model| model.sent == 0) => {
                self.sleep(at);
                self.leaves(None);
            }
            (None, Some(at)) if !turning => {
                let size = self.turns.sizes.get(at).copied().unwrap_or_default();
                if self.used() + size <= self.turns.memory {
                    self.wake(at);
                } else {
                    let next = self.next_awake();
                    self.leaves(next);
                    self.rotate();
                }
            }
            _ => {}
        }
    }

    fn leaves(&mut self, who: Option<usize>) {
        if let Decides::InTurn(turn) = &mut self.decides {
            turn.leaving = who;
            turn.next = who.map_or(turn.next, |at| at + 1);
        }
    }

    fn next_awake(&self) -> Option<usize> {
        let Decides::InTurn(turn) = &self.decides else { return None };
        let count = self.models.len().max(1);
        let mut all = (0..count).map(|step| (turn.next + step) % count);
        all.find(|at| self.models.get(*at).is_some_and(|model| model.state == State::Awake))
    }
}

fn number(model: usize) -> u32 {
    u32::try_from(model).unwrap_or(u32::MAX)
}

fn at(request: RequestId) -> usize {
    usize::try_from(request.0).unwrap_or(usize::MAX)
}

fn request(number: usize, row: &Row) -> Request {
    Request {
        id: RequestId(number as u64),
        pool: PoolId(row.tenant),
        tenant: TenantId(0),
        class: Class::Default,
        deadline: None,
        prompt_tokens: row.prompt_tokens,
        blocks: Arc::clone(&row.blocks),
        route: RouteId(0),
        max_output: None,
        sequences: 1,
        body_bytes: 0,
        streamed: true,
        adapter: None,
        beside: None,
    }
}
