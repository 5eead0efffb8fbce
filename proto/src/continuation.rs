//! A streamed answer that broke off and is gone on with elsewhere: what was said of it, how the rest is asked for, and how
//! the rest is told so that both are one answer.
//!
//! The rest is asked for as a completion of the prompt's token ids and those of the text that was said. What goes on is
//! the text: the engine that broke off may have drawn other tokens for the same text, and some that nobody was told of.
//! Those are drawn again. So a character is said once or not yet, and what was cut within one is said whole.
//!
//! Only what stands in the text can be gone on with, so that an answer that says anything else (thinking, a call of a
//! tool, log probabilities), and a request with a member that the rest could not be asked for with, is left as it is.

use serde_json::{Map, Value, json};

use crate::peek::{COMPLETION_TOKENS, HARMLESS};
use crate::stream::{self, Chunk, Usage};

/// Text that is kept of one answer; a longer one is not gone on with. A token is some four bytes.
pub const TEXT_BYTES_MAX: usize = 256 << 10;

/// What the rest of an answer shows that it is one, in each of its chunks.
pub const MARK: &str = "forebay";

/// Members of a request that mean the same for the rest.
const KEPT: [&str; 14] = [
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
    "user",
    "cache_salt",
    "priority",
];
/// Those that are written anew, and those that the prompt's tokens already follow.
const READ: [&str; 11] = [
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
];
/// How the rest of an answer can be asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Asking {
    members: Map<String, Value>,
    /// Of the whole answer. None: as many as there is room for.
    max_tokens: Option<u32>,
    min_tokens: u32,
}

impl Asking {
    /// Reads a request for one streamed answer, for chat or a completion. None where the rest could not be had as the
    /// whole would have been.
    #[must_use]
    pub fn read(body: &[u8], chat: bool) -> Option<Self> {
        let mut members: Map<String, Value> = serde_json::from_slice(body).ok()?;
        members.retain(|_, value| !value.is_null());
        let known = |name: &str| [&KEPT[..], &READ, &HARMLESS].iter().any(|some| some.contains(&name));
        if members.iter().any(|(name, value)| !known(name) && !asks_for_nothing(name, value)) {
            return None;
        }
        let count = |name| members.get(name).map(|value| value.as_u64().and_then(|count| u32::try_from(count).ok()));
        let max_tokens = match count("max_completion_tokens").or(count("max_tokens")) {
            None => (!chat).then_some(COMPLETION_TOKENS),
            Some(given) => Some(given?),
        };
        let min_tokens = count("min_tokens").unwrap_or(Some(0))?;
        members.retain(|name, _| KEPT.contains(&name.as_str()));
        Some(Self { members, max_tokens, min_tokens })
    }

    /// The request for what follows `ids`, of which the last `said` are the answer's; `room` is what the context holds
    /// beside the prompt. None where nothing may follow, or nobody knows how much.
    #[must_use]
    pub fn rest(&self, ids: &[u32], said: u32, room: Option<u32>) -> Option<Vec<u8>> {
        let left = self.most(room)?.checked_sub(said).filter(|left| *left > 0)?;
        let mut members = self.members.clone();
        members.insert("prompt".to_owned(), ids.into());
        members.insert("max_tokens".to_owned(), left.into());
        if let Some(min) = self.min_tokens.checked_sub(said).filter(|min| *min > 0) {
            members.insert("min_tokens".to_owned(), min.into());
        }
        Some(Value::Object(members).to_string().into_bytes())
    }

    /// Whether so many tokens are all that were asked for, or that there is `room` for.
    #[must_use]
    pub fn is_all(&self, said: u32, room: Option<u32>) -> bool {
        self.most(room).is_some_and(|most| said >= most)
    }

    /// Tokens of the whole answer.
    fn most(&self, room: Option<u32>) -> Option<u32> {
        self.max_tokens.into_iter().chain(room).min()
    }
}

/// Whether an engine does the same without it. What a member means that is not named here is unknown, and so whether its
/// default is.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match name {
        // Of tools there are none.
        "parallel_tool_calls" => value.is_boolean(),
        "tool_choice" => matches!(value.as_str(), Some("auto" | "none")),
        "tools" | "functions" | "stop" | "bad_words" => says_nothing(value),
        "suffix" => value.as_str() == Some(""),
        "response_format" => value.get("type") == Some(&json!("text")),
        "skip_special_tokens" | "spaces_between_special_tokens" => *value == Value::Bool(true),
        "echo"
        | "logprobs"
        | "use_beam_search"
        | "include_stop_str_in_output"
        | "return_token_ids"
        | "return_tokens_as_token_ids"
        | "return_hidden_states"
        | "no_stop_trim" => *value == Value::Bool(false),
        "n" | "best_of" | "repetition_penalty" | "length_penalty" | "typical_p" => value.as_f64() == Some(1.0),
        "top_logprobs" | "presence_penalty" | "frequency_penalty" => value.as_f64() == Some(0.0),
        _ => false,
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// What was said of an answer with one choice.
#[derive(Debug)]
pub struct Said {
    chat: bool,
    /// The first chunk without its choices and usage, which is what all others begin with.
    head: Option<Map<String, Value>>,
    text: String,
    /// Chunks with text.
    pieces: u32,
    /// Something was said that is no text, or more than is kept.
    lost: bool,
    seam: Option<Seam>,
}

/// What the chunks behind a break need to be those of one answer.
#[derive(Debug)]
struct Seam {
    /// Of the prompt and of what was said, where that stands in the prompt of the rest.
    tokens: Option<[u32; 2]>,
    mark: Value,
}

impl Said {
    #[must_use]
    pub fn new(chat: bool) -> Self {
        Self { chat, head: None, text: String::new(), pieces: 0, lost: false, seam: None }
    }

    /// The text until now; None where that is not all that was said.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        (!self.lost && self.head.is_some()).then_some(&*self.text)
    }

    /// Chunks with text until now: each was one token or more.
    #[must_use]
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    /// Tokens that were said before the engine that speaks now.
    #[must_use]
    pub fn before(&self) -> u32 {
        self.seam.as_ref().and_then(|seam| seam.tokens).map_or(0, |[_, said]| said)
    }

    /// From here on the chunks are those of a completion that goes on after so many tokens of the prompt and of its
    /// answer; without these they are those of the whole answer, of which nothing was said yet. They will show `mark`.
    pub fn goes_on(&mut self, tokens: Option<[u32; 2]>, mark: Value) {
        self.seam = Some(Seam { tokens, mark });
    }

    /// Takes note of a chunk, the data of one event but not `[DONE]`. Behind a break gives what the client is to get in
    /// its place.
    pub fn hear(&mut self, data: &[u8]) -> Option<Vec<u8>> {
        let Ok(mut chunk) = serde_json::from_slice::<Map<String, Value>>(data) else {
            // It may say something that others can read.
            if stream::read(data) != Chunk::Malformed {
                self.lose();
            }
            return None;
        };
        let is_error = chunk.get("error").is_some_and(|error| !error.is_null());
        if is_error || chunk.get("object").is_some_and(|object| object == "error") {
            return None;
        }
        let usage = chunk.shift_remove("usage");
        let mut choices = match chunk.shift_remove("choices") {
            Some(Value::Array(choices)) => choices,
            None | Some(Value::Null) => Vec::new(),
            Some(_) => return None,
        };
        if self.head.is_none() {
            self.head = Some(chunk);
        }
        choices.iter_mut().for_each(|choice| self.hear_choice(choice));
        let seam = self.seam.as_ref()?;
        let mut told = self.head.clone().unwrap_or_default();
        told.insert("choices".to_owned(), choices.into());
        if let Some(usage) = usage {
            told.insert("usage".to_owned(), seam.all_told(usage));
        }
        told.insert(MARK.to_owned(), seam.mark.clone());
        Some(Value::Object(told).to_string().into_bytes())
    }

    /// Keeps what a choice says; behind a break makes it one of the kind that was asked for.
    fn hear_choice(&mut self, choice: &mut Value) {
        let Some(choice) = choice.as_object_mut() else { return self.lose() };
        let is_other = choice.get("index").is_some_and(|index| index.as_f64() != Some(0.0));
        if is_other || choice.get("logprobs").is_some_and(|logprobs| !logprobs.is_null()) {
            self.lose();
        }
        let is_completion = self.seam.as_ref().is_some_and(|seam| seam.tokens.is_some());
        let is_delta = self.chat && !is_completion;
        let said = if is_delta { choice.get("delta") } else { choice.get("text") };
        match said {
            Some(Value::String(text)) if !is_delta => self.keep(text),
            Some(Value::Object(delta)) if is_delta => {
                for (name, value) in delta {
                    match (name.as_str(), value) {
                        ("role", _) => {}
                        ("content", Value::String(text)) => self.keep(text),
                        (_, value) if !says_nothing(value) => self.lose(),
                        _ => {}
                    }
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => self.lose(),
        }
        if self.chat && is_completion {
            let text = choice.shift_remove("text").filter(|text| text.as_str() != Some(""));
            let delta = text.map_or_else(|| json!({}), |text| json!({"content": text}));
            choice.insert("delta".to_owned(), delta);
        } else if self.seam.is_some()
            && let Some(delta) = choice.get_mut("delta").and_then(Value::as_object_mut)
        {
            // Told already, and some clients would put one behind the other.
            delta.shift_remove("role");
        }
    }

    fn keep(&mut self, text: &str) {
        if text.is_empty() || self.lost {
            return;
        }
        self.pieces = self.pieces.saturating_add(1);
        if self.text.len() + text.len() > TEXT_BYTES_MAX {
            return self.lose();
        }
        self.text.push_str(text);
    }

    fn lose(&mut self) {
        self.lost = true;
        self.text = String::new();
    }

    /// The data of what is still to be told of an answer of which `said` tokens are all that were asked for.
    #[must_use]
    pub fn ending(&self, prompt_tokens: u32, said: u32) -> [Vec<u8>; 3] {
        let mut choice = json!({"index": 0, "logprobs": null, "finish_reason": "length"});
        if let Some(choice) = choice.as_object_mut() {
            let (name, nothing) = if self.chat { ("delta", json!({})) } else { ("text", json!("")) };
            choice.insert(name.to_owned(), nothing);
        }
        let usage = Seam { tokens: Some([prompt_tokens, said]), mark: Value::Null }.all_told(json!({}));
        let told = |choices: Value, usage: Option<Value>| {
            let mut told = self.head.clone().unwrap_or_default();
            told.insert("choices".to_owned(), choices);
            told.extend(usage.map(|usage| ("usage".to_owned(), usage)));
            told.extend(self.seam.iter().map(|seam| (MARK.to_owned(), seam.mark.clone())));
            Value::Object(told).to_string().into_bytes()
        };
        [told(json!([choice]), None), told(json!([]), Some(usage)), b"[DONE]".to_vec()]
    }
}

impl Seam {
    /// The usage of the whole answer, given that of its rest. The prompt counts once.
    fn all_told(&self, mut usage: Value) -> Value {
        let (Some([prompt, said]), Some(members)) = (self.tokens, usage.as_object_mut()) else { return usage };
        let of_rest = Usage::read(Value::Object(members.clone()).to_string().as_bytes()).unwrap_or_default();
        let prompt = u64::from(prompt);
        let completion = of_rest.completion_tokens.saturating_add(said.into());
        members.insert("prompt_tokens".to_owned(), prompt.into());
        members.insert("completion_tokens".to_owned(), completion.into());
        members.insert("total_tokens".to_owned(), prompt.saturating_add(completion).into());
        if let Some(cached) =
            members.get_mut("prompt_tokens_details").and_then(|details| details.get_mut("cached_tokens"))
            && cached.as_u64().is_some_and(|cached| cached > prompt)
        {
            *cached = prompt.into();
        }
        usage
    }
}

#[cfg(test)]
mod tests;
