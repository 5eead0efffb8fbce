//! A server that speaks an inference engine's HTTP wire without a model behind it.
//!
//! [`serve`] answers on a listener as the engine named in [`Options`] would: same routes, bodies, stream framing, error
//! shapes and metric names; vLLM's and llama.cpp's are held against recorded bytes, the others are written from what their
//! sources say. How long an answer takes is decided by
//! `forebay-simulator`'s engine model, run in real time; what it says is prose of its own, drawn from the prompt and a
//! seed, in real tokens of a real tokenizer. Faults ([`Fault`]) make it fail in the ways that engines and networks do.
//!
//! The parts, in the order a request meets them: `server` (sockets, connections), `wire` and a module for each
//! engine (routes, bodies), `model`
//! (tokenizer, templates), `output` (what is said), `driver` (when), `faults` (how it goes wrong); and `kv_events`, which
//! publishes what the prefix cache holds.
//!
//! Invariants: equal requests to servers of equal options get equal texts; a client that leaves frees its sequences
//! before the next step; nothing that a client sends panics the server.
//!
//! Not here: sampling (temperature and its kin are checked, not applied), constrained decoding (an answer in JSON is the
//! least instance of the schema), images, LoRA, the engines' control routes.

mod body;
mod control;
mod driver;
mod faults;
mod kv_events;
mod llamacpp;
mod model;
mod ollama;
mod options;
mod output;
mod schema;
mod server;
mod sglang;
mod tgi;
mod triton;
mod trtllm;
mod vllm;
mod wire;

pub use forebay_simulator::EngineConfig;

pub use crate::{
    faults::{Fault, FaultError, FaultKind},
    kv_events::{KvAddress, KvEventForm, KvEventOptions},
    model::{ModelFiles, builtin_model},
    options::{EngineKind, Options},
    server::{Bound, bind, serve},
    vllm::pair::PairRole,
};
