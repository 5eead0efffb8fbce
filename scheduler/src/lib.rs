//! Pure scheduling of LLM requests over engines: `(now, event) -> actions`.
//!
//! [`Core`] is a state machine. It owns no thread, lock, channel, clock or source of chance; time and seed are
//! arguments, and the same inputs give the same outputs. The shell around it turns what happens into [`Event`]s, passes
//! them in one at a time, performs the [`Action`]s, and calls [`Core::tick`] no later than [`Core::next_deadline`].
//!
//! A decision binds early and sends late: on arrival a request is bound to the worker with the best score and counts
//! there at once; it is sent when that worker has room, and moves to another lane when waiting costs more than the cache
//! it would lose. Queues nest lane (worker), class, tenant, aged order; tenant counters and class shares belong to the pool.
//!
//! ```text
//! event ─ core ┬ admission   refuse, place, park, shed
//!              ├ attempt     send, first token, failure, end
//!              ├ pairs       one worker for the prompt, one for the output
//!              ├ fleet       workers come, go, fall ill; caches and loads change
//!              ├ gpus        what is beneath them slows, fails, or is shared
//!              ├ sleep       models take turns in the memory of GPUs
//!              ├ siblings    a long prefix that several have is computed once
//!              ├ adapters    workers are given the LoRA adapters that are asked for
//!              └ settle      fill windows, steal, re-score, timers
//!         pool ─ lane, shares, fairness, prefix, outputs      placement ─ candidates, terms, policy
//!         worker ─ backlog, rate, step, kv, load, health, latency, beneath, sleep, adapters
//! ```
//!
//! Beside it, [`BatchFormer`] says which requests leave together as one call, before the core sees that call.
//!
//! What it does not do: it knows no engine, wire or byte of a body; it does not stop what was sent (a deadline after the
//! send is the shell's); it decides where inside a pool, never which model.

mod action;
mod batch_former;
mod config;
mod core;
mod event;
mod explain;
mod fairness;
mod ids;
mod lane;
mod leg;
mod outputs;
mod placement;
mod pool;
mod prefix;
mod rng;
mod shares;
mod time;
mod timers;
mod view;
mod worker;

pub use action::{Action, Refusal};
pub use batch_former::{BatchFormer, LotLimits, Member};
pub use config::{Breaker, Config};
pub use core::Core;
pub use core::check::Broken;
pub use event::{Class, End, Event, Failure, GpuReport, KvEvent, LoadReport, Policy, PoolLimits, Request};
pub use event::{SleepSpec, WorkerSpec};
pub use explain::{Candidate, Cause, Decision, LeftOut, Unfit};
pub use ids::{AdapterId, GpuId, PoolId, RequestId, RouteId, TenantId, WorkerId};
pub use leg::{Leg, Role};
pub use placement::term_names;
pub use time::Tick;
pub use view::{PoolView, ScaleView, WorkerView};
pub use worker::adapters::{Adapter, AdapterChange, AdapterEnd, AdapterState};
pub use worker::health::HealthState;
pub use worker::sleep::SleepState;
