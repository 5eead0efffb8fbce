//! The GPUs under the workers: what their readings mean for those who run there.
//!
//! Utilization says that some kernel ran, not whose. What we had there explains its part: in the rest of the time, the
//! rest of the utilization is foreign. One sample says little, since it may fall on our own work or beside it; means do,
//! the more the less we have there. While our own work fills nearly all of the time nothing can be told, and what was
//! known holds for a lease. Free memory is flat on engines that take it all at their start; what counts is how much was
//! taken since it was at its least.
//!
//! Invariants: a GPU is known as long as some worker names it; `busy` are those of its workers that something was sent to.
//! Not here: what a slower or shared GPU costs a request (`placement::terms`).

use std::collections::BTreeSet;

use smallvec::SmallVec;

use super::Core;
use crate::config::Config;
use crate::worker::Slot;
use crate::worker::beneath::Beneath;
use crate::{Action, GpuId, GpuReport, HealthState, Tick};

/// Least time that one reading of the utilization is about: it is sampled over up to a second.
const PERIOD_MIN_SECONDS: f64 = 0.5;
/// Share of the time with work of ours above which utilization says nothing of others.
const KNOWABLE: f64 = 0.8;
/// Foreign load below this is noise, and below this and our own share where it is told apart from ours.
const FOREIGN_MIN: f64 = 0.1;
/// Weight that past samples keep at each reading.
const KEEP: f64 = 0.75;
/// The least that a throttled GPU is taken to do.
const DERATE_MIN: f64 = 0.05;

#[derive(Debug, Default)]
pub(super) struct Gpu {
    workers: BTreeSet<Slot>,
    /// Of these, such that have work.
    busy: BTreeSet<Slot>,
    /// Moment and contents of the last reading.
    read: Option<(Tick, Reading)>,
    /// Our own part in the time since the utilization was read last.
    ours: Ours,
    /// Means of the utilization and of our own share of the time, and the weight of the readings in them.
    used: f64,
    own: f64,
    readings: f64,
    /// What of the utilization is not ours, and when something was known of that last.
    unexplained: Option<(Tick, f64)>,
    memory_least: f64,
    /// Bytes of its memory, once it said so.
    memory_bytes: Option<u64>,
    /// When a model came into it or left it last.
    pub(super) memory_changed: Option<Tick>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    derate: f64,
    memory: Option<f64>,
    /// Of its memory.
    free_bytes: Option<u64>,
    /// Mean share of processes that are none of ours.
    foreign: Option<f64>,
}

/// How much of a period something of ours was there.
#[derive(Debug, Default)]
struct Ours {
    from: Option<Tick>,
    /// Until when it is counted.
    at: Tick,
    seconds: f64,
    /// Share of the period before.
    before: f64,
}

impl Ours {
    fn pass(&mut self, now: Tick, busy: bool) {
        if busy {
            self.seconds += now.seconds_since(self.at);
        }
        self.at = now;
    }

    /// Ends the period; our share of it, or of the one before if that is more: a sample may reach back. None for a period
    /// that is too short or had no beginning.
    fn period(&mut self, now: Tick) -> Option<f64> {
        let Some(from) = self.from else {
            *self = Self { from: Some(now), at: now, seconds: 0.0, before: 1.0 };
            return None;
        };
        let length = now.seconds_since(from);
        if length < PERIOD_MIN_SECONDS {
            return None;
        }
        let share = (self.seconds / length).min(1.0);
        let before = self.before;
        *self = Self { from: Some(now), at: now, seconds: 0.0, before: share };
        Some(share.max(before))
    }
}

impl Gpu {
    fn observe(&mut self, now: Tick, report: &GpuReport, config: &Config) {
        let share = |value: Option<f64>| value.filter(|value| value.is_finite()).map(|value| value.clamp(0.0, 1.0));
        let derate = if report.derate.is_finite() { report.derate.clamp(DERATE_MIN, 1.0) } else { 1.0 };
        let memory = share(report.memory).map(|used| {
            self.memory_least = if self.read.is_some() { self.memory_least.min(used) } else { used };
            ((used - self.memory_least) / (1.0 - self.memory_least).max(1e-6)).clamp(0.0, 1.0)
        });
        let measured = share(report.foreign).map(|foreign| {
            let before = self.read.and_then(|(_, reading)| reading.foreign).unwrap_or(foreign);
            (before + foreign) / 2.0
        });
        self.memory_bytes = report.memory_bytes.or(self.memory_bytes);
        let free = |bytes: u64, used: f64| (bytes as f64 * (1.0 - used)) as u64;
        let free_bytes = report.memory_bytes.zip(share(report.memory)).map(|(bytes, used)| free(bytes, used));
        self.read = Some((now, Reading { derate, memory, free_bytes, foreign: measured }));
        self.ours.pass(now, !self.busy.is_empty());
        let ours = self.ours.period(now);
        let unexplained = share(report.utilization).zip(ours).and_then(|(used, ours)| self.unexplained(used, ours));
        let last = self.unexplained.filter(|(at, _)| now.since(*at) < config.foreign_lease);
        self.unexplained = unexplained.map(|share| (now, share)).or(last);
    }

    /// What our own part of the time leaves of the utilization for others; none where it leaves too little time.
    fn unexplained(&mut self, used: f64, ours: f64) -> Option<f64> {
        self.readings = self.readings * KEEP + 1.0;
        self.used += (used - self.used) / self.readings;
        self.own += (ours - self.own) / self.readings;
        if self.own > KNOWABLE {
            return None;
        }
        let foreign = (self.used - self.own) / (1.0 - self.own);
        Some(if foreign < FOREIGN_MIN + self.own { 0.0 } else { foreign })
    }

    /// Adds to `beneath` what this GPU takes, if it spoke of late.
    fn weigh_on(&self, now: Tick, beneath: &mut Beneath, config: &Config) {
        let Some((at, reading)) = self.read.filter(|(at, _)| now.since(*at) < config.gpu_lease) else { return };
        beneath.until = beneath.until.max(at.after(config.gpu_lease));
        beneath.derate = beneath.derate.min(reading.derate);
        let more = |a: Option<f64>, b: Option<f64>| [a, b].into_iter().flatten().reduce(f64::max);
        let foreign = reading.foreign.map(|share| if share < FOREIGN_MIN { 0.0 } else { share });
        beneath.foreign = more(beneath.foreign, foreign);
        beneath.unexplained = beneath.unexplained.max(self.unexplained.map_or(0.0, |(_, share)| share));
        beneath.memory = more(beneath.memory, reading.memory);
        beneath.free_bytes = [beneath.free_bytes, reading.free_bytes].into_iter().flatten().min();
    }
}

impl Gpu {
    /// Who runs there.
    pub(super) fn workers(&self) -> impl Iterator<Item = Slot> {
        self.workers.iter().copied()
    }

    /// All of its memory, as far as it said so.
    pub(super) fn memory_bytes(&self) -> Option<u64> {
        self.memory_bytes
    }

    /// What of its memory nobody has, if it spoke of late.
    pub(super) fn free_bytes(&self, now: Tick, config: &Config) -> Option<u64> {
        self.read.filter(|(at, _)| now.since(*at) < config.gpu_lease).and_then(|(_, reading)| reading.free_bytes)
    }

    /// Whether it spoke last before a model came or left.
    pub(super) fn read_before_change(&self) -> bool {
        self.read.zip(self.memory_changed).is_some_and(|((at, _), changed)| at <= changed)
    }

    /// Whether it knows the worker, and whether that has work.
    pub(super) fn knows(&self, slot: Slot, has_work: bool) -> bool {
        self.workers.contains(&slot) && self.busy.contains(&slot) == has_work
    }
}

impl Core {
    pub(super) fn gpu(&mut self, id: GpuId, report: &GpuReport, out: &mut Vec<Action>) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        gpu.observe(self.now, report, &self.config);
        let workers: SmallVec<[Slot; 4]> = gpu.workers.iter().copied().collect();
        for slot in workers {
            self.weigh(slot);
            let Some(worker) = self.workers.get_mut(slot) else { continue };
            let before = worker.health.state();
            if report.fault {
                worker.beneath.fault = true;
                worker.health.fault(self.now, &self.config);
            } else if before == HealthState::Up {
                worker.beneath.fault = false;
            }
            self.touch(slot);
            self.health_changed(slot, before, out);
        }
    }

    /// A worker runs on other GPUs than `before`.
    pub(super) fn gpus_changed(&mut self, slot: Slot, before: &[GpuId]) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        if worker.spec.gpus == before {
            return;
        }
        worker.beneath = Beneath::default();
        let now = worker.spec.gpus.clone();
        self.gpus_left(slot, before);
        for id in now {
            self.gpus.entry(id).or_default().workers.insert(slot);
        }
        self.weigh(slot);
        self.occupy(slot);
    }

    pub(super) fn gpus_left(&mut self, slot: Slot, gpus: &[GpuId]) {
        for id in gpus {
            self.occupied(slot, *id, false);
            if let Some(gpu) = self.gpus.get_mut(id) {
                gpu.workers.remove(&slot);
                if gpu.workers.is_empty() {
                    self.gpus.remove(id);
                }
            }
        }
    }

    /// Tells a worker's GPUs when it begins or ceases to have work.
    pub(super) fn occupy(&mut self, slot: Slot) {
        let Some(worker) = self.workers.get_mut(slot) else { return };
        let has_work = !worker.sent.is_empty();
        if worker.spec.gpus.is_empty() || std::mem::replace(&mut worker.beneath.occupies, has_work) == has_work {
            return;
        }
        let gpus: SmallVec<[GpuId; 8]> = worker.spec.gpus.iter().copied().collect();
        for id in gpus {
            self.occupied(slot, id, has_work);
        }
    }

    fn occupied(&mut self, slot: Slot, id: GpuId, has_work: bool) {
        let Some(gpu) = self.gpus.get_mut(&id) else { return };
        gpu.ours.pass(self.now, !gpu.busy.is_empty());
        let changed = if has_work { gpu.busy.insert(slot) } else { gpu.busy.remove(&slot) };
        if changed {
            let others: SmallVec<[Slot; 4]> = gpu.workers.iter().copied().filter(|other| *other != slot).collect();
            for other in others {
                self.weigh(other);
            }
        }
    }

    /// Sums up for a worker what its GPUs say.
    fn weigh(&mut self, slot: Slot) {
        let Some(worker) = self.workers.get(slot) else { return };
        let Beneath { fault, occupies, .. } = worker.beneath;
        let mut beneath = Beneath { fault, occupies, ..Beneath::default() };
        let mut neighbours: BTreeSet<Result<u64, Slot>> = BTreeSet::new();
        for gpu in worker.spec.gpus.iter().filter_map(|id| self.gpus.get(id)) {
            gpu.weigh_on(self.now, &mut beneath, &self.config);
            let others = gpu.busy.iter().filter(|other| **other != slot);
            let servers = others.filter_map(|other| Some(self.workers.get(*other)?.spec.server.ok_or(*other)));
            neighbours.extend(servers.filter(|server| worker.spec.server.is_none_or(|own| *server != Ok(own))));
        }
        beneath.neighbours = neighbours.len();
        if worker.beneath != beneath {
            if let Some(worker) = self.workers.get_mut(slot) {
                worker.beneath = beneath;
            }
            self.touch(slot);
        }
    }
}
