//! Wire tests: a real gateway process, real simulated-engine processes, raw sockets on both sides.

mod architecture;
mod support;
