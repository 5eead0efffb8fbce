//! What comes back: tensors that become OpenAI's chunks.
//!
//! A stop word ends the text before it, wherever it came about and whether or not the engine knows of it: ids are made
//! text here, and what the engine writes may have the word at its end. Text that may become a stop word waits.

use std::sync::Arc;

use bytes::Bytes;
use forebay_proto::error::{ApiError, from_engine};
use forebay_tokens::{Detokenizer, Special, Tokenizer};
use http::StatusCode;
use prost::Message;
use serde_json::json;

use super::{
    tensors::Outputs,
    wire::{ModelInferResponse, ModelStreamInferResponse},
};
use crate::{
    Error,
    engines::{
        Api,
        answer::{Translator, Wire, event},
        chunks::{Chunks, Cost, Piece},
    },
    transport::grpc::Status,
};

/// In which form the model gives its answer.
pub(super) enum Output {
    Text {
        /// Of a model whose answers repeat the text so far.
        repeated: Option<Repeated>,
        tokenizer: Option<Arc<Tokenizer>>,
    },
    /// `None` once all was written.
    Ids(Option<Detokenizer>),
}

impl Output {
    /// `tokenizer` counts what the model does not.
    pub(super) fn text(accumulates: bool, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self::Text { repeated: accumulates.then(Repeated::default), tokenizer }
    }

    pub(super) fn ids(tokenizer: &Arc<Tokenizer>, prompt: &[u32]) -> Self {
        Self::Ids(Some(tokenizer.detokenizer(prompt, Special::Omit)))
    }
}

/// A text that is told again from its beginning each time.
#[derive(Default)]
pub(super) struct Repeated {
    told: String,
    /// What stands at the end for characters that are not whole yet.
    broken: String,
}

impl Repeated {
    /// What is new in `all`. What was said cannot be taken back: what the model changes in it is said again.
    fn fresh(&mut self, all: &str) -> String {
        let whole = all.trim_end_matches('\u{fffd}');
        all.get(whole.len()..).unwrap_or_default().clone_into(&mut self.broken);
        // Bytes of a whole character may count as broken again while more bytes follow them.
        if self.told.starts_with(whole) {
            return String::new();
        }
        let same = self.told.bytes().zip(whole.bytes()).take_while(|(told, now)| told == now).count();
        whole.clone_into(&mut self.told);
        whole.get(whole.floor_char_boundary(same)..).unwrap_or_default().to_owned()
    }
}

/// One answer on its way.
pub(super) struct Answers {
    chunks: Chunks,
    output: Output,
    stops: Vec<String>,
    /// `max_tokens`: an answer of so many was cut off by it.
    most: u64,
    streamed: bool,
    /// Whether the call is a stream, which tells its end.
    several: bool,
    /// Ids of the prompt that come before the answer's.
    skip: usize,
    cost: Cost,
    /// Answers of the model, which has a token to say in each.
    steps: u64,
    /// All text that came. From `shown` on it may still become a stop word.
    text: String,
    /// Bytes of `text` that were given out.
    shown: usize,
    /// Given out and not put into an event yet, as all is where the answer is wanted whole.
    ready: String,
    finish: Option<&'static str>,
    refusal: Option<(StatusCode, ApiError)>,
}

impl Answers {
    pub(super) fn new((api, model): (Api, String), output: Output, stops: Vec<String>, most: u32) -> Self {
        Self {
            chunks: Chunks::new(api, model),
            output,
            stops,
            most: most.into(),
            streamed: false,
            several: false,
            skip: 0,
            cost: Cost::default(),
            steps: 0,
            text: String::new(),
            shown: 0,
            ready: String::new(),
            finish: None,
            refusal: None,
        }
    }

    pub(super) fn streamed(self, streamed: bool) -> Self {
        Self { streamed, ..self }
    }

    pub(super) fn several(self, several: bool) -> Self {
        Self { several, ..self }
    }

    pub(super) fn without(self, skip: usize) -> Self {
        Self { skip, ..self }
    }

    /// What the prompt has, until the model tells.
    pub(super) fn prompt_tokens(mut self, tokens: Option<u32>) -> Self {
        self.cost.prompt_tokens = tokens.unwrap_or_default().into();
        self
    }

    /// One answer of the model.
    fn take(&mut self, response: &ModelInferResponse) -> Option<()> {
        let outputs = Outputs(response);
        let last = outputs.is_final() || !self.several;
        self.cost.prompt_tokens = outputs.count("num_input_tokens").unwrap_or(self.cost.prompt_tokens);
        let told = outputs.count("num_output_tokens");
        let fresh = match &mut self.output {
            Output::Ids(detokenizer) => {
                let mut fresh = String::new();
                if let Some(ids) = outputs.sequence() {
                    let skipped = self.skip.min(ids.len());
                    self.skip -= skipped;
                    let ids = ids.get(skipped..).unwrap_or_default();
                    self.cost.output_tokens += ids.len() as u64;
                    for id in ids {
                        fresh += &detokenizer.as_mut()?.push(*id).ok()?;
                    }
                } else if !last {
                    return None;
                }
                if last {
                    fresh += &detokenizer.take()?.finish().ok()?;
                }
                fresh
            }
            Output::Text { repeated, .. } => {
                self.steps += u64::from(!response.outputs.is_empty());
                self.cost.output_tokens += told.unwrap_or_default();
                let text = match outputs.text("text_output") {
                    None if !last => return None,
                    text => text,
                };
                match repeated {
                    None => text.unwrap_or_default(),
                    Some(repeated) => {
                        let mut fresh = text.map(|all| repeated.fresh(&all)).unwrap_or_default();
                        if last {
                            fresh += &std::mem::take(&mut repeated.broken);
                        }
                        fresh
                    }
                }
            }
        };
        self.say(&fresh, last);
        if last && self.finish.is_none() {
            self.count();
            self.finish = Some(if self.cost.output_tokens >= self.most { "length" } else { "stop" });
        }
        Some(())
    }

    /// More text, and whether it is the last.
    fn say(&mut self, fresh: &str, last: bool) {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        // A stop may have begun in what was not given out, and nowhere before.
        self.text.push_str(fresh);
        let waiting = self.text.get(self.shown..).unwrap_or_default();
        let stop = self.stops.iter().filter_map(|stop| waiting.find(stop.as_str())).min();
        let until = match stop {
            Some(at) => self.shown + at,
            None if last => self.text.len(),
            None => self.text.floor_char_boundary(self.text.len() - beginning(waiting, &self.stops, longest)),
        };
        self.ready += self.text.get(self.shown..until).unwrap_or_default();
        self.shown = until;
        if stop.is_some() {
            self.count();
            self.finish = Some("stop");
        }
    }

    /// The tokens of a text that its model did not count: as its tokenizer would, else one for each of its answers.
    fn count(&mut self) {
        if let (0, Output::Text { tokenizer, .. }) = (self.cost.output_tokens, &self.output) {
            let counted = tokenizer.as_ref().and_then(|tokenizer| tokenizer.encode(&self.text, Special::Omit).ok());
            self.cost.output_tokens = counted.map_or(self.steps, |ids| ids.len() as u64);
        }
    }

    fn piece(&mut self) -> Piece {
        Piece { text: std::mem::take(&mut self.ready), finish: self.finish, ..Piece::default() }
    }

    fn fail(&mut self, status: StatusCode, message: &str, out: &mut Vec<u8>) {
        let error = from_engine(status.as_u16(), json!({"error": message}).to_string().as_bytes());
        if self.streamed {
            let error = json!({"error": {"message": error.message, "type": error.kind, "code": status.as_u16()}});
            event(out, error.to_string());
        }
        self.refusal = Some((status, error));
    }
}

/// Bytes at the end of `text` that may be the beginning of a stop word.
fn beginning(text: &str, stops: &[String], longest: usize) -> usize {
    let from = text.floor_char_boundary(text.len().saturating_sub(longest));
    let tail = text.get(from..).unwrap_or_default();
    let begins = |at: usize| stops.iter().any(|stop| stop.starts_with(tail.get(at..).unwrap_or_default()));
    let at = tail.char_indices().map(|(at, _)| at).find(|&at| begins(at));
    at.map_or(0, |at| tail.len() - at)
}

/// What the server means: the backend calls all that goes wrong an internal error.
fn meant(status: StatusCode, message: &str) -> StatusCode {
    let too_long = status == StatusCode::INTERNAL_SERVER_ERROR && message.contains("exceeds maximum input length");
    if too_long { StatusCode::BAD_REQUEST } else { status }
}

impl Translator for Answers {
    fn event(&mut self, message: &[u8], out: &mut Vec<u8>) -> bool {
        let response = if self.several {
            let Ok(ModelStreamInferResponse { error_message, infer_response }) = Message::decode(message) else {
                return false;
            };
            if !error_message.is_empty() {
                self.fail(meant(StatusCode::INTERNAL_SERVER_ERROR, &error_message), &error_message, out);
                return true;
            }
            infer_response.unwrap_or_default()
        } else {
            let Ok(response) = Message::decode(message) else { return false };
            response
        };
        if self.take(&response).is_none() {
            return false;
        }
        if self.streamed {
            let piece = self.piece();
            let ends = piece.finish.is_some();
            self.chunks.piece(piece, out);
            if ends {
                self.chunks.end(self.cost, out);
            }
        }
        true
    }

    fn status(&mut self, status: Status, out: &mut Vec<u8>) {
        if status.code != 0 && !self.is_done() {
            self.fail(meant(status.http(), &status.message), &status.message, out);
        }
    }

    fn is_done(&self) -> bool {
        self.finish.is_some() || self.refusal.is_some()
    }

    fn whole(&mut self, _: &Bytes) -> Option<Bytes> {
        self.finish?;
        let piece = self.piece();
        Some(self.chunks.whole(piece, self.cost))
    }

    fn refused(&self) -> Error {
        match &self.refusal {
            Some((status, error)) => Error::Refused { status: *status, error: Box::new(error.clone()) },
            // It ended well and left its answer unfinished.
            None => Error::Unreadable,
        }
    }

    fn wire(&self) -> Wire {
        Wire::Messages
    }
}
