#![doc = include_str!("ARCHITECTURE.md")]

pub mod access;
pub mod admin;
pub mod api;
pub mod app;
pub mod cache;
pub mod cli;
pub mod config;
pub mod dispatch;
pub mod ids;
pub mod ledger;
pub mod pipeline;
pub mod prepare;
pub mod routing;
pub mod server;
pub mod telemetry;
