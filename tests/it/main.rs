//! Wire tests: a real gateway process, real simulated-engine processes, raw sockets on both sides.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that finds something else than it expects fails"
)]

mod adapters;
mod admin;
mod agent;
mod architecture;
mod bytes;
mod cancel;
mod cli;
mod coalesce;
mod conformance;
mod connections;
mod continuation;
mod discovery;
mod drain;
mod engine_errors;
mod failover;
mod faults;
mod gpus;
mod http2_clients;
mod http_refusals;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod kv_events;
mod ledger;
mod metrics;
mod micro_batch;
mod models;
mod pairs;
mod queue;
mod random_faults;
mod ranks;
mod refusals;
mod reload;
mod replay;
mod rolling;
mod siblings;
mod simulate;
mod simulated;
mod sleep;
mod slow_clients;
mod soak;
mod stream_ends;
mod streams;
mod support;
mod tokens;
mod traces;
mod workers;
