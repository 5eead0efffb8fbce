//! Tokens: how many a request has, and which.
//!
//! A [`Tokenizer`] is one model's `tokenizer.json` with its chat template. It encodes and decodes exactly as the
//! Hugging Face library does, renders a conversation exactly as vLLM does before it hands the text to the model, and
//! turns generated ids back into text piece by piece. A [`Cache`] shared by all tokenizers makes a long prompt cheap
//! when most of it was seen before, without ever changing an id.
//!
//! Pure CPU: no threads, no I/O after loading, no clock (the time that a template prints is an argument). Long
//! prompts cost milliseconds, so callers on an async runtime move them to a CPU pool.
//!
//! Not here: which requests need counting, context limits, block hashes of prompts, and anything of images or audio
//! beyond saying that a count without them is an estimate.

#[cfg(test)]
extern crate self as forebay_tokens; // the helpers of the integration tests serve unit tests too

mod cache;
mod chat;
mod config;
mod cuts;
mod detokenizer;
mod error;
mod template;
mod tokenizer;

pub use cache::{Cache, CacheStats};
pub use chat::Chat;
pub use config::SpecialTokens;
pub use detokenizer::Detokenizer;
pub use error::{Error, LoadError};
pub use template::ChatTemplate;
pub use tokenizer::{Parts, Prompt, Rendered, Special, Tokenizer};
