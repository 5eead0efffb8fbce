//! What operators see: metrics, logs and traces.
//!
//! The one table of metric names is [`metrics`], and what is told of workers [`worker`]; no other room touches the
//! `metrics` macros. Handles are made when configuration is applied, so that a request only increments what is already
//! registered, and every label comes from a closed set: nothing a client sends mints a series.

pub mod logs;
pub mod metrics;
pub mod traces;
pub mod worker;

pub use metrics::{GpuMetrics, ModelMetrics, Registry};
pub use traces::{Trace, Traces};
pub use worker::WorkerMetrics;
