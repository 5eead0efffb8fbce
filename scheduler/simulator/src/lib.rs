//! Virtual time: a model of an inference engine, and runs of the real scheduler, or of its rivals, over many of them.
//!
//! [`Engine`] decides what one engine step does and how long it takes: continuous batching with chunked prefill, paged
//! KV memory with prefix caching, preemption by recompute. [`run`] lets a [`Trace`] arrive at a [`Policy`] in front of
//! some engines and gives back what happened ([`Entry`]) and the figures of it ([`Cell`]).
//!
//! All is pure: no clock, thread, file, socket or source of chance but the seed, so that equal arguments give equal
//! results, byte for byte. A policy never learns a request's output length before its end.
//!
//! Not here: files, JSON and pictures (the program that calls this); real time and wires (`forebay-simulated-engine`);
//! any decision of the gateway (`forebay-scheduler`).

mod cell;
mod engine;
mod log;
mod offered;
mod policy;
mod rivals;
mod rng;
mod run;
mod settings;
mod trace;
mod turns;

pub use cell::{Cell, Spread};
pub use engine::{BlockEvent, Emission, Engine, EngineConfig, Load, Sequence, SequenceId, Standing, Step, TooLarge};
pub use log::{Entry, What};
pub use offered::Offered;
pub use policy::Policy;
pub use run::{Outcome, run};
pub use settings::{Fault, FaultKind, Settings};
pub use trace::{Row, Trace};
pub use turns::{Turned, Turns, Waker, take_turns};
