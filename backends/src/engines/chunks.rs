//! OpenAI's answers, written for engines whose own wire is another.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{Api, answer::event};

/// The head that all chunks of one answer share.
#[derive(Debug)]
pub(super) struct Chunks {
    id: String,
    created: u64,
    model: String,
    chat: bool,
    begun: bool,
}

/// A choice's output, whole or a piece of it.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) thinking: String,
    /// As OpenAI's messages have them.
    pub(super) tool_calls: Vec<Value>,
    pub(super) logprobs: Option<Value>,
    pub(super) finish: Option<&'static str>,
}

/// What it cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
}

impl Chunks {
    pub(super) fn new(api: Api, model: String) -> Self {
        let chat = api == Api::ChatCompletions;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { id: new_id(if chat { "chatcmpl" } else { "cmpl" }), created, model, chat, begun: false }
    }

    /// Adds the event of a piece, if it says anything.
    pub(super) fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        let Piece { text, thinking, tool_calls, logprobs, finish } = piece;
        let says = !text.is_empty() || !thinking.is_empty() || !tool_calls.is_empty() || finish.is_some();
        if !says {
            return;
        }
        let choice = if self.chat {
            let mut delta = Map::new();
            if !self.begun {
                delta.insert("role".to_owned(), "assistant".into());
            }
            if !text.is_empty() || !self.begun {
                delta.insert("content".to_owned(), text.into());
            }
            said(&mut delta, thinking, tool_calls);
            json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish})
        };
        self.begun = true;
        event(out, self.head(true, &json!([choice])).to_string());
    }

    /// Adds the event that tells the cost, and the end mark.
    pub(super) fn end(&self, cost: Cost, out: &mut Vec<u8>) {
        let mut chunk = self.head(true, &json!([]));
        if let Some(object) = chunk.as_object_mut() {
            object.insert("usage".to_owned(), cost.usage());
        }
        event(out, chunk.to_string());
        event(out, "[DONE]");
    }

    /// The whole answer.
    pub(super) fn whole(&self, piece: Piece, cost: Cost) -> Bytes {
        let Piece { text, thinking, tool_calls, logprobs, finish } = piece;
        let choice = if self.chat {
            let content = if tool_calls.is_empty() || !text.is_empty() { text.into() } else { Value::Null };
            let mut message = Map::new();
            message.insert("role".to_owned(), "assistant".into());
            message.insert("content".to_owned(), content);
            said(&mut message, thinking, tool_calls);
            json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish})
        };
        let mut answer = self.head(false, &json!([choice]));
        if let Some(object) = answer.as_object_mut() {
            object.insert("usage".to_owned(), cost.usage());
        }
        answer.to_string().into()
    }

    fn head(&self, streamed: bool, choices: &Value) -> Value {
        let object = match (self.chat, streamed) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }
}

impl Cost {
    fn usage(self) -> Value {
        let Self { prompt_tokens, output_tokens } = self;
        let total = prompt_tokens.saturating_add(output_tokens);
        json!({"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens, "total_tokens": total})
    }
}

fn said(message: &mut Map<String, Value>, thinking: String, tool_calls: Vec<Value>) {
    if !thinking.is_empty() {
        message.insert("reasoning".to_owned(), thinking.into());
    }
    if !tool_calls.is_empty() {
        message.insert("tool_calls".to_owned(), tool_calls.into());
    }
}

/// An id unlike any other.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{:032x}", rand::random::<u128>())
}
