//! Engines on this machine, at the ports that they take by default.
//!
//! Only the loopback interface is asked, only with questions that change nothing, and only what lists a model, in
//! OpenAI's way or its engine's own, is an engine: other programs like these ports too.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;
use url::Url;

use super::Found;
use crate::{
    engines::{by_name, detect},
    transport::{Endpoint, Timeouts, Transport},
};

/// vLLM and TensorRT-LLM; Triton's gRPC; SGLang; TGI; llama.cpp; Ollama.
pub const USUAL_PORTS: [u16; 6] = [8000, TRITON, 30000, 3000, 8080, 11434];
/// Where nothing but gRPC is spoken.
const TRITON: u16 = 8001;

/// For all questions to one port together: who waits is a person at a terminal.
const LIMIT: Duration = Duration::from_secs(3);

/// Asks all `ports` at once, except those in `own`, which are the asker's. What is found comes in the order of `ports`.
pub async fn probe_local(transport: &Transport, ports: &[u16], own: &[u16]) -> Vec<Found> {
    let asked = ports.iter().filter(|port| !own.contains(port)).map(|&port| ask(transport, port));
    join_all(asked).await.into_iter().flatten().collect()
}

async fn ask(transport: &Transport, port: u16) -> Option<Found> {
    let url = Url::parse(&format!("http://127.0.0.1:{port}")).ok()?;
    let known = (port == TRITON).then(|| by_name("triton")).flatten();
    let endpoint = Endpoint::new(&url, None).ok()?.with_http2(known.is_some());
    let channel = transport.channel(endpoint, Timeouts::default());
    match timeout(LIMIT, detect(&channel, known)).await.ok()? {
        Ok(detected) => Some(Found { url, detected }),
        Err(error) => {
            tracing::debug!(port, %error, "no engine at a usual port");
            None
        }
    }
}
