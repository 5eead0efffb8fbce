//! Virtual-time model of an inference engine.
//!
//! [`Engine`] decides what one engine step does and how long it takes: continuous batching with chunked prefill, paged
//! KV memory with prefix caching, preemption by recompute. It is pure: it holds no clock, thread, socket or random
//! source, so that the same calls give the same steps, and both a virtual-time run and a real server can be built on it.
//!
//! Not here: real time and wires (`forebay-simulated-engine`), or any decision of the gateway (`forebay-scheduler`).

mod engine;

pub use engine::{BlockEvent, Emission, Engine, EngineConfig, Load, Sequence, SequenceId, Step, TooLarge};
