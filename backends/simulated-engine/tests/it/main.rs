//! The simulated engine's wire, through real sockets.

mod client;
mod faults;
mod generation;
mod load;
mod recorded;
mod tokenizer;
