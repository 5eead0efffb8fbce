//! Wire tests: a real gateway process, real simulated-engine processes, raw sockets on both sides.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that finds something else than it expects fails"
)]

mod admin;
mod agent;
mod architecture;
mod bytes;
mod cancel;
mod cli;
mod conformance;
mod connections;
mod discovery;
mod drain;
mod engine_errors;
mod faults;
mod gpus;
mod http2_clients;
mod http_refusals;
mod kv_events;
mod ledger;
mod metrics;
mod models;
mod queue;
mod refusals;
mod reload;
mod replay;
mod rolling;
mod simulate;
mod simulated;
mod slow_clients;
mod stream_ends;
mod streams;
mod support;
mod tokens;
mod traces;
