//! The shell toward engines: how their servers are reached, recognised, watched and asked.
//!
//! [`transport`] is the only module that touches a worker's socket. [`engines`] holds one pure adapter per engine: which
//! paths it has and how its answers are read. [`signals`] polls what an engine says of its own load, and reads, serves
//! and follows what GPUs say; [`discovery`] looks for engines, and [`tokenize`] asks one to count tokens where no local
//! tokenizer is to be had.
//!
//! Invariants: everything read from an engine has a bound in bytes and in time; nothing an engine sends can make this
//! crate panic; a request that may have started is never sent a second time from here.
//!
//! Not here: which worker serves a request (`forebay-scheduler`), retries on another worker (the gateway), metrics and
//! logs of requests (the gateway): this crate gives back facts and errors.

pub mod discovery;
pub mod engines;
mod error;
pub mod signals;
pub mod tokenize;
pub mod transport;

pub use error::{Error, Phase, Source};
