//! Engines on this machine, at the ports that they take by default.
//!
//! Only the loopback interface is asked, only with GET, and only what lists a model, in OpenAI's way or its engine's own,
//! is an engine: other programs like these ports too.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;
use url::Url;

use super::Found;
use crate::{
    engines::detect,
    transport::{Endpoint, Timeouts, Transport},
};

/// vLLM, TensorRT-LLM and Triton; SGLang; TGI; llama.cpp; Ollama. (8001 is Triton's gRPC, which has no OpenAI API.)
pub const USUAL_PORTS: [u16; 5] = [8000, 30000, 3000, 8080, 11434];

/// For all questions to one port together: who waits is a person at a terminal.
const LIMIT: Duration = Duration::from_secs(3);

/// Asks all `ports` at once, except those in `own`, which are the asker's. What is found comes in the order of `ports`.
pub async fn probe_local(transport: &Transport, ports: &[u16], own: &[u16]) -> Vec<Found> {
    let asked = ports.iter().filter(|port| !own.contains(port)).map(|&port| ask(transport, port));
    join_all(asked).await.into_iter().flatten().collect()
}

async fn ask(transport: &Transport, port: u16) -> Option<Found> {
    let url = Url::parse(&format!("http://127.0.0.1:{port}")).ok()?;
    let endpoint = Endpoint::new(&url, None).ok()?;
    let channel = transport.channel(endpoint, Timeouts::default());
    match timeout(LIMIT, detect(&channel, None)).await.ok()? {
        Ok(detected) => Some(Found { url, detected }),
        Err(error) => {
            tracing::debug!(port, %error, "no engine at a usual port");
            None
        }
    }
}
