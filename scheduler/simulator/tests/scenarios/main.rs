//! Scenarios in virtual time: what the scheduler promises, on loads that are made to break it. Each runs over a few seeds;
//! a failure prints its seed.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that finds something else than it expects fails"
)]

mod backfill;
mod calibration;
mod conversations;
mod fairness;
mod faults;
mod fleet;
mod load;
mod siblings;
mod turns;
