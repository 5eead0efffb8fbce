//! How much work is a request: its exact token count and the hashes of its prefix blocks.
//!
//! Counting runs on a bounded pool of threads of its own (`cpu`), since it takes about a microsecond a token.
//! A [`Prompt`] proves that the prompt was counted and fits the model's context; a count that is only an estimate is
//! marked so and never a reason to refuse.
//!
//! Not here: limits of tenants, and the queue.

mod count;
mod cpu;
pub mod hashes;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_backends::engines::{Form, Written};
use forebay_backends::tokenize;
use forebay_proto::error::{ApiError, from_engine};
use forebay_proto::peek::{self, Input, Source, Span};
use forebay_proto::splice::Edits;
use forebay_tokens::Special;
use http::StatusCode;

use crate::routing::{Counting, EngineTokenizer, Model};
use count::Counted;
pub use count::{SaidIds, Tokenized};
use cpu::CpuPool;

/// Prompts whose text is no longer than this are counted where they are: some 40 tokens, less than 50 µs.
const INLINE_BYTES_MAX: usize = 128;
/// Token-id prompts up to this length are hashed where they are (about 1 ns an id).
const INLINE_IDS_MAX: usize = 16_384;
/// Bodies up to this length are read where they are: some 40 µs of JSON.
const INLINE_BODY_BYTES_MAX: usize = 32 << 10;
/// Typical bytes a token, for counts that are only estimates.
const BYTES_PER_TOKEN: usize = 4;
/// How long an engine may take to count for us before an estimate must do.
const ENGINE_COUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// The checked fields of a request's body.
#[derive(Debug)]
pub enum Asked {
    Chat(peek::Chat),
    Completion(peek::Completion),
    Embedding(peek::Embedding),
    Ranking(peek::Ranking),
}

impl Asked {
    #[must_use]
    pub fn model(&self) -> &peek::Model {
        match self {
            Self::Chat(chat) => &chat.model,
            Self::Completion(completion) => &completion.model,
            Self::Embedding(embedding) => &embedding.model,
            Self::Ranking(ranking) => &ranking.model,
        }
    }

    #[must_use]
    pub fn streaming(&self) -> Option<&peek::Streaming> {
        match self {
            Self::Chat(chat) => Some(&chat.streaming),
            Self::Completion(completion) => Some(&completion.streaming),
            Self::Embedding(_) | Self::Ranking(_) => None,
        }
    }

    /// Whether the usage that we ask a stream for is not the client's to see.
    #[must_use]
    pub fn hides_usage(&self) -> bool {
        self.streaming().is_some_and(|streaming| streaming.stream && !streaming.include_usage)
    }

    /// Whether equal requests get equal answers, and a client acts on none of them.
    #[must_use]
    pub fn can_be_shared(&self) -> bool {
        match self {
            // A tool that is called twice by one answer may do its work twice.
            Self::Chat(chat) => chat.deterministic && chat.tools.is_none(),
            Self::Completion(completion) => completion.deterministic,
            Self::Embedding(_) | Self::Ranking(_) => true,
        }
    }

    /// The most tokens the client wants of each choice, where it said so.
    #[must_use]
    pub fn max_output(&self) -> Option<u32> {
        match self {
            Self::Chat(chat) => chat.max_tokens,
            Self::Completion(completion) => completion.max_tokens,
            Self::Embedding(_) | Self::Ranking(_) => Some(0),
        }
    }

    /// How many choices the answer will have: `n` for each prompt.
    #[must_use]
    pub fn choices(&self) -> u32 {
        match self {
            Self::Chat(chat) => chat.n,
            Self::Completion(completion) => {
                completion.n.saturating_mul(u32::try_from(completion.prompt.count()).unwrap_or(u32::MAX))
            }
            Self::Embedding(_) | Self::Ranking(_) => 0,
        }
    }

    /// The inputs, where they can stand in one call with those of other requests.
    #[must_use]
    pub fn items(&self) -> Option<&peek::Items> {
        match self {
            Self::Embedding(embedding) => embedding.items.as_ref(),
            Self::Ranking(ranking) => ranking.items.as_ref(),
            Self::Chat(_) | Self::Completion(_) => None,
        }
    }

    /// The field that holds the prompt.
    fn prompt_field(&self) -> &'static str {
        match self {
            Self::Completion(_) => "prompt",
            Self::Embedding(peek::Embedding { input: Source::Plain(_), .. }) => "input",
            Self::Ranking(_) => "documents",
            Self::Chat(_) | Self::Embedding(_) => "messages",
        }
    }

    fn text_bytes(&self) -> usize {
        let input = |input: &Input| match input {
            Input::Text(text) => text.len(),
            Input::Texts(texts) => texts.iter().map(String::len).sum(),
            Input::Ids(ids) => ids.len() * BYTES_PER_TOKEN,
            Input::IdLists(lists) => lists.iter().map(|ids| ids.len() * BYTES_PER_TOKEN).sum(),
        };
        match self {
            Self::Chat(chat) => chat.messages.len() + chat.tools.as_ref().map_or(0, Span::len),
            Self::Completion(completion) => input(&completion.prompt),
            Self::Embedding(embedding) => match &embedding.input {
                Source::Plain(plain) => input(plain),
                Source::Messages(messages) => messages.len(),
            },
            Self::Ranking(ranking) => ranking.text_bytes,
        }
    }

    fn is_small(&self) -> bool {
        let small = |input: &Input| match input {
            Input::Ids(ids) => ids.len() <= INLINE_IDS_MAX,
            Input::IdLists(lists) => lists.iter().map(Vec::len).sum::<usize>() <= INLINE_IDS_MAX,
            Input::Text(_) | Input::Texts(_) => self.text_bytes() <= INLINE_BYTES_MAX,
        };
        match self {
            // A template takes some 20 µs by itself.
            Self::Chat(_) => false,
            Self::Completion(completion) => small(&completion.prompt),
            // Only estimated.
            Self::Ranking(_) => true,
            Self::Embedding(embedding) => matches!(&embedding.input, Source::Plain(input) if small(input)),
        }
    }
}

/// A counted prompt that fits its model.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// All prompts of the request together.
    pub tokens: u32,
    /// The longest one; of an estimate all together.
    pub longest: u32,
    /// False for an estimate.
    pub exact: bool,
    /// Rolling hash of each full KV block of the (first) prompt.
    pub blocks: Arc<[u64]>,
}

/// Why a prompt cannot be served.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the prompt has {tokens} tokens and {output} more are asked for, the context is {limit}")]
    TooLong {
        tokens: u32,
        output: u32,
        limit: u32,
        /// The field that holds the prompt.
        param: &'static str,
    },
    /// The model's chat template refuses the messages, in its own words.
    #[error("{0}")]
    Template(String),
    #[error("no tokenizer is known for this model")]
    NoTokenizer,
    /// The engine that counts for this model refuses, in its own words.
    #[error("the engine that counts for this model refuses: {}", .0.message)]
    Engine(ApiError),
    /// Only an engine could count, and it does not answer.
    #[error("the engine that counts for this model does not answer")]
    NoAnswer,
    /// Every counting thread has a full queue of work.
    #[error("too many prompts wait to be counted")]
    Busy,
}

impl From<forebay_tokens::Error> for Error {
    fn from(error: forebay_tokens::Error) -> Self {
        Self::Template(error.to_string())
    }
}

/// Counts prompts.
#[derive(Debug)]
pub struct Prepare {
    pool: CpuPool,
}

impl Prepare {
    /// Starts one counting thread a core.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start() -> std::io::Result<Self> {
        Ok(Self { pool: CpuPool::start()? })
    }

    /// Reads a body's fields with `peek`; a long one on the counting threads.
    ///
    /// # Errors
    /// [`Error::Busy`]; what `peek` says comes inside.
    pub async fn read(
        &self,
        body: &Bytes,
        peek: fn(&[u8]) -> Result<Asked, peek::Refusal>,
    ) -> Result<Result<Asked, peek::Refusal>, Error> {
        if body.len() <= INLINE_BODY_BYTES_MAX {
            return Ok(peek(body));
        }
        let body = body.clone();
        self.apart(move || peek(&body)).await
    }

    /// Does `work` on the counting threads.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub async fn apart<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        self.pool.run(work).await.ok_or(Error::Busy)
    }

    /// Counts `asked` (whose spans lie in `body`) for `model`.
    ///
    /// # Errors
    /// See [`Error`]; nothing is held afterwards.
    pub async fn prompt(&self, model: &Arc<Model>, asked: &Arc<Asked>, body: &Bytes) -> Result<Prompt, Error> {
        let counted = match &model.counting {
            Counting::Tokenizer(tokenizer) if asked.is_small() => count::exactly(tokenizer, model, asked, body)?,
            Counting::Tokenizer(tokenizer) => {
                let (tokenizer, model, asked) = (Arc::clone(tokenizer), Arc::clone(model), Arc::clone(asked));
                let body = body.clone();
                self.pool.run(move || count::exactly(&tokenizer, &model, &asked, &body)).await.ok_or(Error::Busy)??
            }
            Counting::Engines(engines) => match Box::pin(by_engine(engines, asked, body)).await {
                Some(ids) => Counted::of(&[ids], model, asked, true),
                None => count::estimate(model, asked),
            },
            Counting::Estimate => count::estimate(model, asked),
        };
        let output = asked.max_output();
        if let (true, Some(limit)) = (counted.exact, model.max_model_len) {
            // An engine needs room for one token of output at least, also when the client names no maximum.
            let needed = output.unwrap_or(1);
            if counted.longest.saturating_add(needed) > limit {
                let (tokens, output) = (counted.longest, output.unwrap_or(0));
                return Err(Error::TooLong { tokens, output, limit, param: asked.prompt_field() });
            }
        }
        Ok(Prompt { tokens: counted.tokens, longest: counted.longest, exact: counted.exact, blocks: counted.blocks })
    }

    /// The prompt in another form: a conversation as the text that the model reads, for engines that know no messages,
    /// or any one prompt in token ids. Nothing where the model's tokenizer is not at hand.
    ///
    /// # Errors
    /// [`Error::Busy`]; what the template refuses it has refused before, when the prompt was counted.
    pub async fn written(&self, model: &Model, asked: &Arc<Asked>, body: &Bytes, form: Form) -> Result<Written, Error> {
        let Counting::Tokenizer(tokenizer) = &model.counting else { return Ok(Written::default()) };
        if asked.is_small() {
            return count::written(tokenizer, asked, body, form);
        }
        let (tokenizer, asked, body) = (Arc::clone(tokenizer), Arc::clone(asked), body.clone());
        self.pool.run(move || count::written(&tokenizer, &asked, &body, form)).await.ok_or(Error::Busy)?
    }

    /// The token ids to go on from when an answer to `asked` has said `said`. None where that cannot be written in ids: the
    /// tokenizer is not at hand, or reads the text otherwise by itself than behind the prompt.
    ///
    /// # Errors
    /// As [`Prepare::written`].
    pub async fn said(
        &self,
        model: &Model,
        asked: &Arc<Asked>,
        body: &Bytes,
        said: String,
    ) -> Result<Option<SaidIds>, Error> {
        let Counting::Tokenizer(tokenizer) = &model.counting else { return Ok(None) };
        let (tokenizer, asked, body) = (Arc::clone(tokenizer), Arc::clone(asked), body.clone());
        self.pool.run(move || count::said(&tokenizer, &asked, &body, &said)).await.ok_or(Error::Busy)?
    }

    /// Token ids of what `/tokenize` was asked.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] when this gateway has none for the model; else as [`Prepare::prompt`].
    pub async fn tokenize(
        &self,
        model: &Model,
        asked: peek::Tokenize,
        body: Bytes,
    ) -> Result<Answered<Tokenized>, Error> {
        match &model.counting {
            Counting::Tokenizer(tokenizer) => {
                let tokenizer = Arc::clone(tokenizer);
                let counted = self.pool.run(move || count::tokenized(&tokenizer, &asked, &body)).await;
                Ok(Answered::Here(counted.ok_or(Error::Busy)??))
            }
            Counting::Engines(engines) => engines_answer(engines, tokenize::TOKENIZE, &asked.model, &body).await,
            Counting::Estimate => Err(Error::NoTokenizer),
        }
    }

    /// Text of token ids, special tokens kept, as `/detokenize` was asked.
    ///
    /// # Errors
    /// As [`Prepare::tokenize`].
    pub async fn detokenize(
        &self,
        model: &Model,
        asked: peek::Detokenize,
        body: Bytes,
    ) -> Result<Answered<String>, Error> {
        match &model.counting {
            Counting::Tokenizer(tokenizer) => {
                let tokenizer = Arc::clone(tokenizer);
                let text = self.pool.run(move || tokenizer.decode(&asked.tokens, Special::Add)).await;
                Ok(Answered::Here(text.ok_or(Error::Busy)??))
            }
            Counting::Engines(engines) => engines_answer(engines, tokenize::DETOKENIZE, &asked.model, &body).await,
            Counting::Estimate => Err(Error::NoTokenizer),
        }
    }
}

/// Who answered a question about tokens.
pub enum Answered<T> {
    Here(T),
    /// An engine, in its own words: the JSON of a success.
    Engine(Bytes),
}

async fn engines_answer<T>(
    engines: &[EngineTokenizer],
    path: &'static str,
    asked: &peek::Model,
    body: &Bytes,
) -> Result<Answered<T>, Error> {
    let mut failed = Error::NoAnswer;
    for EngineTokenizer { channel, model } in engines {
        let mut edits = Edits::new();
        edits.model(asked, model);
        match tokenize::ask(channel, path, edits.apply(body)).await {
            Ok((status, answer)) if status.is_success() => return Ok(Answered::Engine(answer)),
            Ok((status @ (StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY), answer)) => {
                return Err(Error::Engine(from_engine(status.as_u16(), &answer)));
            }
            // An engine of this kind has the path, but not every release and not behind every proxy.
            Ok((StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, _)) => failed = Error::NoTokenizer,
            Ok(_) | Err(_) => {}
        }
    }
    Err(failed)
}

/// Token ids by the engine's own word. A chat or completion body is a `/tokenize` body too: the fields that shape the
/// prompt have the same names there, and the others are ignored. One prompt a call, so lists are left to the estimate.
async fn by_engine(engines: &[EngineTokenizer], asked: &Asked, body: &Bytes) -> Option<Vec<u32>> {
    match asked {
        Asked::Chat(_) => {}
        Asked::Completion(completion) if matches!(completion.prompt, Input::Text(_)) => {}
        _ => return None,
    }
    let counting = async {
        for EngineTokenizer { channel, model } in engines {
            let mut edits = Edits::new();
            edits.model(asked.model(), model);
            if let Ok(ids) = tokenize::tokenize(channel, edits.apply(body)).await {
                return Some(ids);
            }
        }
        None
    };
    tokio::time::timeout(ENGINE_COUNT_TIMEOUT, counting).await.ok()?
}
