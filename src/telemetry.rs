//! What operators see: metrics, logs and traces.
//!
//! The names of metrics stand in [`metrics`], and those of what is told of each model, worker and GPU in [`model`],
//! [`worker`] and [`gpu`]: such series are gone with what they tell of. No other room touches the `metrics` macros. Handles
//! are made when configuration is applied, so that a request only increments what is already there, and every label comes
//! from a closed set: nothing a client sends mints a series.

pub mod gpu;
pub mod logs;
pub mod metrics;
pub mod model;
mod series;
pub mod traces;
pub mod worker;

pub use gpu::GpuMetrics;
pub use metrics::Registry;
pub use model::ModelMetrics;
pub use traces::{Trace, Traces};
pub use worker::WorkerMetrics;
