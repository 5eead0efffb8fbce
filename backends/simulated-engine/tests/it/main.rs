//! The simulated engine's wire, through real sockets.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, in its helpers too"
)]

mod client;
mod faults;
mod generation;
mod load;
mod recorded;
mod tokenizer;
