//! Models that take turns in the memory of GPUs: who is woken, and who makes room.
//!
//! What is asked of a worker that sleeps waits in its lane; it is woken once for all of that, when its model fits
//! beside those that are awake. Where it does not, others that may sleep make room. Such as had nothing to do for as
//! long as a turn (to sleep and to wake) takes, or less when many wait, go first, those longest unused before others.
//! Else such as were awake for their residency get nothing more, finish what they have and sleep, once what is cold was
//! gathered for a sixth of that: a turn of a busy model costs all who wait for it. Whoever waits longest is next. So
//! under load models take turns of a residency each.
//!
//! What fits is known twice. By account: what the workers of a GPU take when awake is at most what it has. And by what the
//! GPU said since something last changed there: so much is free; memory that a process of nobody's takes prevents a wake.
//! A worker that does not say what it takes is taken to need all of its GPUs.
//!
//! Invariants: nobody is told to wake, or to sleep, that was told already; nobody sleeps with requests sent to it; by
//! account, what we wake fits.
//! Not here: what a wake costs a request (`worker::sleep`).

use std::time::Duration;

use smallvec::SmallVec;

use super::Core;
use crate::config::Config;
use crate::time::duration;
use crate::worker::sleep::Sleep;
use crate::worker::{Slot, Worker};
use crate::{Action, GpuId, HealthState, SleepState, Tick, WorkerId};

/// What stands between a worker that sleeps and the memory that it needs.
#[derive(Debug, PartialEq)]
enum Room {
    Here,
    /// It is there once these, and those that are leaving already, sleep. The seconds that takes.
    Behind(Slots, f64),
    /// Nobody may make it before; then it takes the seconds.
    Later(Tick, f64),
    /// Nobody can make it: what is not ours takes the memory.
    Taken,
}

type Slots = SmallVec<[Slot; 4]>;

/// What waits for a worker that sleeps.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    since: Tick,
    requests: u32,
}

impl Core {
    /// An engine says whether it sleeps.
    pub(super) fn sleep_seen(&mut self, id: WorkerId, asleep: bool) {
        self.tell_sleep(id, |sleep, now, config| sleep.seen(now, asleep, config));
    }

    /// A worker did what it was told, or could not.
    pub(super) fn sleep_done(&mut self, id: WorkerId, worked: bool) {
        self.tell_sleep(id, |sleep, now, config| sleep.done(now, worked, config));
    }

    /// `tell` answers whether the worker's state changed.
    fn tell_sleep(&mut self, id: WorkerId, tell: impl FnOnce(&mut Sleep, Tick, &Config) -> bool) {
        let Some(slot) = self.workers.slot(id) else { return };
        let worker = self.workers.get_mut(slot).filter(|worker| worker.spec.sleep.is_some());
        if worker.is_some_and(|worker| tell(&mut worker.sleep, self.now, &self.config)) {
            self.sleep_changed(slot);
        }
    }

    /// Others may find room now, or none any more.
    fn sleep_changed(&mut self, slot: Slot) {
        let Some(worker) = self.workers.get(slot) else { return };
        if worker.sleep.state() == SleepState::Asleep
            && let Some(pool) = self.pools.get_mut(&worker.pool)
        {
            pool.index.forget(slot); // an engine that sleeps drops its KV cache
        }
        let (now, gpus) = (self.now, worker.spec.gpus.clone());
        for id in &gpus {
            if let Some(gpu) = self.gpus.get_mut(id) {
                gpu.memory_changed = Some(now);
            }
        }
        self.touch(slot);
        self.neighbours(&gpus).into_iter().filter(|other| *other != slot).for_each(|other| self.touch(other));
    }

    /// Every worker on these GPUs.
    fn neighbours(&self, gpus: &[GpuId]) -> Slots {
        let mut slots: Slots = gpus.iter().filter_map(|id| self.gpus.get(id)).flat_map(|gpu| gpu.workers()).collect();
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// Looks whether a worker that can sleep is to be told something.
    pub(super) fn doze(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let (now, config) = (self.now, &self.config);
        let Some(worker) = self.workers.get_mut(slot) else { return };
        if worker.spec.sleep.is_none() {
            return;
        }
        let was_wanted = worker.sleep.wanted.is_some();
        worker.sleep.want(now, !worker.lane.is_empty());
        let given_up = was_wanted && worker.sleep.wanted.is_none();
        let (id, has_work) = (worker.id, !worker.sent.is_empty());
        match worker.sleep.state() {
            SleepState::Awake => {}
            SleepState::Waking | SleepState::FallingAsleep => {
                if worker.sleep.gives_up(config).is_some_and(|at| at <= now) {
                    self.sleep_done(id, false);
                }
            }
            SleepState::Leaving if !self.makes_room(slot) => self.turn(slot, SleepState::Awake),
            SleepState::Leaving if has_work => {}
            SleepState::Leaving => {
                out.push(Action::Sleep { worker: id });
                self.turn(slot, SleepState::FallingAsleep);
            }
            // who is leaving for it need not
            SleepState::Asleep if given_up => self.sleep_changed(slot),
            SleepState::Asleep => self.rouse(slot, out),
        }
    }

    fn turn(&mut self, slot: Slot, to: SleepState) {
        if let Some(worker) = self.workers.get_mut(slot) {
            worker.sleep.turn(self.now, to);
        }
        self.touch(slot);
    }

    /// Wakes a worker that sleeps and is wanted, or sees to it that others make room.
    fn rouse(&mut self, slot: Slot, out: &mut Vec<Action>) {
        let room = self.room(slot);
        let (now, config) = (self.now, &self.config);
        let Some(worker) = self.workers.get_mut(slot) else { return };
        worker.sleep.room = match &room {
            Room::Here => (Tick::ZERO, 0.0),
            Room::Behind(_, seconds) => (Tick::ZERO, *seconds),
            Room::Later(at, seconds) => (*at, *seconds),
            Room::Taken => (now.after(config.memory_lease), 0.0),
        };
        let wanted = worker.sleep.wanted.filter(|_| worker.serves() && worker.sleep.retry <= now);
        let Some(wanted) = wanted else { return };
        let (id, gpus) = (worker.id, worker.spec.gpus.clone());
        if room == Room::Taken {
            // nor does it keep others from what they could have meanwhile
            worker.sleep.retry = now.after(config.rescore_every);
            return;
        }
        let before = |other: &Slot| {
            let other = self.workers.get(*other).filter(|other| other.sleep.state() == SleepState::Asleep);
            let other = other.filter(|other| other.sleep.retry <= now && other.serves());
            other.is_some_and(|other| other.sleep.wanted.is_some_and(|at| (at, other.id) < (wanted, id)))
        };
        if self.neighbours(&gpus).iter().any(before) {
            return;
        }
        match room {
            Room::Here => {
                out.push(Action::Wake { worker: id });
                self.turn(slot, SleepState::Waking);
                self.sleep_changed(slot);
            }
            Room::Behind(others, _) => others.into_iter().for_each(|other| self.turn(other, SleepState::Leaving)),
            Room::Later(..) | Room::Taken => {}
        }
    }

    /// Whether somebody still wants the room that a worker makes.
    fn makes_room(&self, slot: Slot) -> bool {
        let Some(worker) = self.workers.get(slot) else { return false };
        self.neighbours(&worker.spec.gpus)
            .iter()
            .filter_map(|other| self.workers.get(*other))
            .any(|other| other.sleep.state() == SleepState::Asleep && other.sleep.wanted.is_some() && other.serves())
    }

    /// How a worker that sleeps could come to the memory it needs, on each of its GPUs.
    fn room(&self, slot: Slot) -> Room {
        let Some(worker) = self.workers.get(slot) else { return Room::Here };
        let since = worker.sleep.wanted.unwrap_or(self.now);
        let wanted = Wanted { since, requests: worker.lane.requests() };
        let mut leave = Slots::new();
        let (mut full, mut later, mut seconds): (bool, Option<Tick>, f64) = (false, None, 0.0);
        for gpu in worker.spec.gpus.iter().filter_map(|id| self.gpus.get(id)) {
            let capacity = gpu.memory_bytes().or_else(|| self.configured_bytes(gpu.workers()));
            let need = bytes(worker, capacity);
            let holds = |other: &&Worker| other.sleep.holds_memory() && other.health.state() != HealthState::Down;
            let others = gpu.workers().filter(|other| *other != slot);
            let holders: SmallVec<[(Slot, &Worker); 8]> =
                others.filter_map(|other| Some((other, self.workers.get(other).filter(holds)?))).collect();
            let all = holders.iter().fold(need, |sum, (_, other)| sum.saturating_add(bytes(other, capacity)));
            let over = all.saturating_sub(capacity.unwrap_or(1));
            let free = worker.spec.memory_bytes.and_then(|_| gpu.free_bytes(self.now, &self.config));
            // A reading from before something changed there says nothing; the next is near.
            if free.is_some() && gpu.read_before_change() {
                later = later.max(Some(self.now.after(self.config.rescore_every)));
                continue;
            }
            let mut lacks = over.max(free.map_or(0, |free| need.saturating_sub(free)));
            if lacks == 0 {
                continue;
            }
            full = true;
            let mut going: SmallVec<[(Slot, &Worker); 8]> =
                holders.into_iter().filter(|(_, other)| other.spec.sleep.is_some()).collect();
            going.sort_by_key(|(at, other)| self.leaves_first(*at, other, (wanted, leave.contains(at))));
            for (at, other) in going {
                if lacks == 0 {
                    break;
                }
                let ready = self.may_leave(other, wanted);
                if ready > self.now {
                    later = later.max(Some(ready));
                } else if !leave.contains(&at) {
                    leave.push(at);
                }
                seconds = seconds.max(other.sleep.sleep_seconds(&self.config));
                lacks = lacks.saturating_sub(bytes(other, capacity));
            }
            if lacks > 0 {
                return Room::Taken;
            }
        }
        leave.retain(|other| self.workers.get(*other).is_some_and(|other| !other.sleep.is_going()));
        match later {
            Some(at) => Room::Later(at, seconds),
            None if full => Room::Behind(leave, seconds),
            None => Room::Here,
        }
    }

    /// Memory of each GPU of these workers as configuration has it.
    fn configured_bytes(&self, workers: impl Iterator<Item = Slot>) -> Option<u64> {
        workers.filter_map(|slot| self.workers.get(slot)?.spec.gpu_bytes).max()
    }

    /// In which order workers make room.
    fn leaves_first(
        &self,
        at: Slot,
        worker: &Worker,
        (wanted, chosen): (Wanted, bool),
    ) -> (bool, bool, bool, Tick, Slot) {
        let rests = self.rests_from(worker, wanted).is_some_and(|from| from <= self.now);
        let last = if rests { worker.sleep.used } else { worker.sleep.since() };
        let gone = chosen || worker.sleep.is_going();
        (!gone, self.may_leave(worker, wanted) > self.now, !rests, last, at)
    }

    /// From when on a worker may be put to sleep for one that is wanted since then.
    fn may_leave(&self, worker: &Worker, wanted: Wanted) -> Tick {
        if worker.sleep.is_going() {
            return Tick::ZERO;
        }
        let residency = worker.spec.sleep.map_or(Duration::ZERO, |sleep| sleep.residency);
        let awake = match worker.sleep.state() {
            SleepState::Waking => self.now.after(duration(worker.sleep.wake_seconds(&self.config).max(1e-3))),
            _ => worker.sleep.since(),
        };
        let busy = awake.after(residency).max(wanted.since.after(residency / 6));
        self.rests_from(worker, wanted).map_or(busy, |rests| rests.min(busy)).max(worker.sleep.retry)
    }

    /// When a worker that has nothing to do counts as one that rests: the sooner, the more wait for its room.
    fn rests_from(&self, worker: &Worker, wanted: Wanted) -> Option<Tick> {
        let idle = worker.sent.is_empty() && worker.lane.is_empty() && worker.sleep.state() == SleepState::Awake;
        let turn = worker.sleep.wake_seconds(&self.config) + worker.sleep.sleep_seconds(&self.config);
        let residency = worker.spec.sleep.map_or(Duration::ZERO, |sleep| sleep.residency);
        let rest = duration(turn).min(residency) / (1 + wanted.requests);
        idle.then(|| worker.sleep.used.after(rest))
    }
}

/// Memory that a worker takes of each of its GPUs while it is awake; all where it does not say and may sleep. Where nobody
/// knows what a GPU has, one of those that may sleep takes it whole.
fn bytes(worker: &Worker, capacity: Option<u64>) -> u64 {
    match (capacity, worker.spec.memory_bytes, worker.spec.sleep) {
        (None, _, sleep) => u64::from(sleep.is_some()),
        (Some(_), Some(bytes), _) => bytes,
        (Some(capacity), None, Some(_)) => capacity,
        (Some(_), None, None) => 0,
    }
}
