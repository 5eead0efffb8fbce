//! The model behind a server: its tokenizer, its chat template, and what it has to say.

use std::{path::Path, sync::Arc, time::SystemTime};

use forebay_tokens::{Cache, Chat, Parts, Special, Tokenizer};
use serde_json::Value;
use tokio::runtime::{Handle, RuntimeFlavor};

/// What the model says, one sentence a line.
const PROSE: &str = include_str!("../model/prose.txt");

/// Memory of the cache for long prompts, in bytes.
const CACHE_BYTES: usize = 32 << 20;

/// Bytes or tokens from which work takes longer than a task should hold its thread.
const ASIDE_FROM: usize = 8192;

/// The files of a model directory.
#[derive(Clone, Copy, Debug)]
pub struct ModelFiles {
    /// Content of `tokenizer.json`.
    pub tokenizer: &'static [u8],
    /// Content of `tokenizer_config.json`; the chat template is in it.
    pub tokenizer_config: &'static [u8],
}

/// The model that the simulated engine carries: a byte-level BPE tokenizer with 6144 tokens, trained on texts of this
/// project, and a chat template that knows system, user, assistant and tool messages.
#[must_use]
pub const fn builtin_model() -> ModelFiles {
    ModelFiles {
        tokenizer: include_bytes!("../model/tokenizer.json"),
        tokenizer_config: include_bytes!("../model/tokenizer_config.json"),
    }
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    #[error("cannot load the tokenizer")]
    Tokenizer(#[from] forebay_tokens::LoadError),
    #[error("cannot read `tokenizer_config.json`")]
    Config(#[from] std::io::Error),
    #[error("`tokenizer_config.json` names no `eos_token` of the vocabulary")]
    NoEnd,
}

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Model {
    tokenizer: Arc<Tokenizer>,
    end: u32,
    vocabulary: u32,
    sentences: Vec<Sentence>,
    recites: bool,
}

/// Something to say, in tokens.
#[derive(Debug)]
pub(crate) struct Sentence {
    /// As the beginning of an answer.
    pub(crate) first: Vec<u32>,
    /// After another sentence, with the space between them.
    pub(crate) next: Vec<u32>,
}

/// The parts of a chat request that decide its prompt, as the client sent them; null where absent.
#[derive(Debug)]
pub(crate) struct Conversation<'a> {
    pub(crate) messages: &'a Value,
    pub(crate) tools: &'a Value,
    pub(crate) documents: &'a Value,
    pub(crate) kwargs: &'a Value,
    pub(crate) reasoning_effort: Option<&'a str>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) continue_final_message: bool,
    pub(crate) add_special_tokens: bool,
}

impl Model {
    /// Loads a model directory, or the built-in model.
    pub(crate) fn load(directory: Option<&Path>) -> Result<Self, ModelError> {
        let (tokenizer, config) = match directory {
            Some(directory) => {
                let config = std::fs::read(directory.join("tokenizer_config.json"))?;
                (Tokenizer::from_dir(directory)?, config)
            }
            None => {
                let files = builtin_model();
                let config = Some(files.tokenizer_config);
                let parts = Parts { tokenizer: files.tokenizer, config, ..Parts::default() };
                (Tokenizer::from_parts(&parts)?, files.tokenizer_config.to_vec())
            }
        };
        let end = end_token(&config).and_then(|token| tokenizer.id(&token)).ok_or(ModelError::NoEnd)?;
        let vocabulary = u32::try_from(tokenizer.vocabulary_size()).unwrap_or(u32::MAX).max(1);
        let tokenizer = Arc::new(tokenizer.with_cache(Arc::new(Cache::new(CACHE_BYTES))));
        let mut model = Self { tokenizer, end, vocabulary, sentences: Vec::new(), recites: false };
        let sentence =
            |line: &str| Sentence { first: model.encode(line, false), next: model.encode(&format!(" {line}"), false) };
        model.sentences = PROSE.lines().map(sentence).collect();
        Ok(model)
    }

    /// The same, saying one text to everybody.
    pub(crate) fn reciting(self, recites: bool) -> Self {
        Self { recites, ..self }
    }

    /// What a model that recites says next: all of its text, or the rest where the prompt ends within it.
    pub(crate) fn recited(&self, prompt: &[u32]) -> Option<String> {
        if !self.recites {
            return None;
        }
        let text = PROSE.replace('\n', " ");
        let prompt = self.decode(prompt);
        let said = text.char_indices().rev().map(|(at, _)| at).find(|at| {
            let (said, _) = text.split_at_checked(*at).unwrap_or_default();
            prompt.ends_with(said)
        });
        text.get(said?..).map(str::to_owned)
    }

    /// The ids of a text. A text that the tokenizer cannot write has none.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Vec<u32> {
        let special = if add_special { Special::Add } else { Special::Omit };
        aside(text.len(), || self.tokenizer.encode(text, special)).unwrap_or_default()
    }

    /// The text of ids, special tokens included.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, Special::Add).unwrap_or_default()
    }

    /// The text that each id adds to those before it; empty for special tokens and inside characters.
    pub(crate) fn texts(&self, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = self.tokenizer.detokenizer(&[], Special::Omit);
        aside(ids.len(), || ids.iter().map(|id| detokenizer.push(*id).unwrap_or_default()).collect())
    }

    /// The vocabulary's own spelling of an id.
    pub(crate) fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.token(id)
    }

    /// Renders a conversation into the prompt's ids. The error is a message for the client.
    pub(crate) fn chat(&self, conversation: &Conversation<'_>) -> Result<Vec<u32>, String> {
        let [messages, tools, documents, kwargs] = [
            conversation.messages.to_string(),
            conversation.tools.to_string(),
            conversation.documents.to_string(),
            conversation.kwargs.to_string(),
        ];
        let chat = Chat {
            tools: Some(tools.as_bytes()),
            documents: Some(documents.as_bytes()),
            kwargs: Some(kwargs.as_bytes()),
            reasoning_effort: conversation.reasoning_effort,
            add_generation_prompt: conversation.add_generation_prompt,
            continue_final_message: conversation.continue_final_message,
            add_special_tokens: conversation.add_special_tokens,
            ..Chat::new(messages.as_bytes(), SystemTime::now())
        };
        let prompt = aside(messages.len(), || self.tokenizer.chat(&chat));
        prompt.map(|prompt| prompt.ids).map_err(|error| error.to_string())
    }

    /// Ends an answer.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Entries of the vocabulary; at least one.
    pub(crate) fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    pub(crate) fn sentences(&self) -> &[Sentence] {
        &self.sentences
    }
}

/// Does work on so many bytes or tokens; much of it where it does not keep other tasks waiting.
fn aside<T>(amount: usize, work: impl FnOnce() -> T) -> T {
    let threads = || Handle::try_current().map(|handle| handle.runtime_flavor());
    if amount >= ASIDE_FROM && matches!(threads(), Ok(RuntimeFlavor::MultiThread)) {
        return tokio::task::block_in_place(work);
    }
    work()
}

/// `eos_token` of a configuration, or `sep_token`, which ends a text of an encoder: a text, or an object with it.
fn end_token(config: &[u8]) -> Option<String> {
    let config: Value = serde_json::from_slice(config).ok()?;
    let named = |name| config.get(name).filter(|value: &&Value| !value.is_null());
    let end = named("eos_token").or_else(|| named("sep_token"))?;
    Some(end.as_str().or_else(|| end.get("content")?.as_str())?.to_owned())
}
