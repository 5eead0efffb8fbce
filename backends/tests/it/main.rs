//! The crate against real sockets: fake servers play documented wires and every way to break them.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "a test that cannot go on says why")]

mod adapters;
mod faults;
mod http2;
mod inference_proto;
mod kv_events;
mod remote;
mod support;
mod tls;
mod transport;
