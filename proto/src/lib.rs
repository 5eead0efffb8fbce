//! What crosses a process boundary: bytes in, typed facts out, and the few bytes Forebay writes itself.
//!
//! * [`peek`] reads the fields of a request body that Forebay acts on; [`splice`] changes them in place;
//! * [`merge`] makes one request of several, and several answers of one;
//! * [`continuation`] asks for the rest of a streamed answer that broke off, and makes one answer of both parts;
//! * [`sse`] cuts a byte stream into server-sent events, [`stream`] reads one event of an OpenAI stream, [`tap`] finds
//!   the usage of a whole answer without keeping it;
//! * [`error`] turns any engine's error body into OpenAI's; [`metrics_text`] reads Prometheus text;
//! * [`trace_context`] is the trace that a request belongs to, [`otlp`] what a collector is told of it;
//! * [`kv_events`] reads what an engine says of its prefix cache, [`zmtp`] is ZeroMQ's wire, over which it does.
//!
//! Invariants: no I/O, no clock and no async runtime; nothing panics, recurses without bound or allocates without bound
//! on any input; bytes that nobody acts on are neither copied nor re-written.

pub mod continuation;
pub mod error;
pub mod kv_events;
pub mod merge;
pub mod metrics_text;
mod msgpack;
pub mod otlp;
pub mod peek;
pub mod splice;
pub mod sse;
pub mod stream;
mod strings;
pub mod tap;
pub mod trace_context;
pub mod zmtp;

pub use msgpack::Malformed;
