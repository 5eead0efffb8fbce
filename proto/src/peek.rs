//! Strict reading of a request body for the fields that Forebay acts on; everything else travels unread.
//!
//! The body must be one JSON object in UTF-8 with nothing but white space around it. Keys are compared as JSON reads
//! them (`"mod\u0065l"` is `model`), and a key that we act on may stand only once: otherwise an engine, which may take
//! the first or the last, could see another model than the one that was authorised. Other keys may repeat.
//! What we act on must have its type, since a tokenizer or a limit that guesses would guess differently from the
//! engine; what we do not act on is the engine's to judge.
//!
//! Values come as [`Span`]s of the body where somebody else reads them later (messages, tools) and owned where they are
//! small or where we are the reader. Nothing recurses: a body of brackets costs memory in proportion to its length.

mod field;
mod input;
mod items;
mod keys;
mod messages;
mod refusal;
#[cfg(test)]
pub(crate) mod tests;

use field::Field;
pub use input::{INPUTS_MAX, Input};
pub use items::Items;
use keys::keys;
pub use refusal::Refusal;

/// A byte range of the body that was peeked at.
pub type Span = std::ops::Range<usize>;

/// `max_tokens` of a completion that names none, by OpenAI and vLLM.
pub const COMPLETION_TOKENS: u32 = 16;

/// Fields that say who asks and how it is billed or kept: without them the answer is the same.
pub const HARMLESS: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "session_id",
];

/// Choices that one request may ask for per prompt. OpenAI's bound; vLLM's own is 16384.
pub const CHOICES_MAX: u32 = 128;

/// The model a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Empty where the body names none, or an empty name.
    pub name: String,
    /// The JSON string, quotes included, or where it would stand.
    pub at: Place,
}

/// Whether and how the answer is streamed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Streaming {
    pub stream: bool,
    /// Where `stream_options` stands, if it is an object.
    pub options: Option<Span>,
    /// Whether the client itself asked for usage. False for `"stream_options": {}`, as OpenAI documents it; vLLM and
    /// trtllm-serve would take that for true.
    pub include_usage: bool,
    pub(crate) usage_at: UsageAt,
}

/// Where `include_usage` stands, or would have to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UsageAt {
    /// Its value, `null` included.
    Value(Span),
    /// Missing: right after the opening brace of `stream_options`, which has other keys or none.
    Options { open: usize, empty: bool },
    /// `"stream_options": null`.
    NullOptions(Span),
    /// No `stream_options`: right after the opening brace of the body.
    Body { open: usize },
}

/// Where a string field stands or would be put; what [`crate::splice::Edits::cache_salt`] needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The value that stands there, `null` included.
    Value(Span),
    /// Nothing yet; a member may be put here, right after the body's opening brace.
    Free(usize),
}

/// What changes the prompt that an engine renders, beside messages and tools. The defaults are the engine's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateFields {
    /// vLLM's default: true, for embeddings false.
    pub add_generation_prompt: Option<bool>,
    /// vLLM's default: false.
    pub continue_final_message: Option<bool>,
    /// vLLM's default for chat: false, since templates write their own.
    pub add_special_tokens: Option<bool>,
    /// Any JSON value, as with the other spans here: whoever renders the template judges it.
    pub chat_template: Option<Span>,
    pub chat_template_kwargs: Option<Span>,
    pub documents: Option<Span>,
    pub reasoning_effort: Option<Span>,
}

/// How a prompt longer than wanted is cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Truncation {
    /// Tokens to keep; −1 stands for the model's maximum (vLLM's `truncate_prompt_tokens`).
    pub tokens: Option<i64>,
    /// None: the side that the engine's tokenizer is set to.
    pub side: Option<Side>,
}

/// The side on which tokens are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chat {
    pub model: Model,
    pub streaming: Streaming,
    /// A non-empty array of objects that each have a string `role`.
    pub messages: Span,
    /// An array.
    pub tools: Option<Span>,
    /// Any JSON value.
    pub tool_choice: Option<Span>,
    /// `max_completion_tokens`, else `max_tokens`. None: whatever is left of the context.
    pub max_tokens: Option<u32>,
    /// 1 to [`CHOICES_MAX`].
    pub n: u32,
    pub template: TemplateFields,
    pub truncation: Truncation,
    pub cache_salt: Option<String>,
    pub cache_salt_at: Place,
    pub user: Option<String>,
    /// Nothing is drawn by chance: `temperature` is 0, or there is a `seed`.
    pub deterministic: bool,
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    pub model: Model,
    pub streaming: Streaming,
    pub prompt: Input,
    /// Where `prompt` stands.
    pub prompt_at: Span,
    /// None: the engine's default, 16. Zero only with `echo`, which scores a prompt and generates nothing.
    pub max_tokens: Option<u32>,
    /// 1 to [`CHOICES_MAX`], for each prompt.
    pub n: u32,
    pub echo: bool,
    /// vLLM's default: true.
    pub add_special_tokens: Option<bool>,
    pub truncation: Truncation,
    pub cache_salt: Option<String>,
    pub cache_salt_at: Place,
    pub user: Option<String>,
    /// As [`Chat::deterministic`].
    pub deterministic: bool,
}

/// A prompt given plainly, or as messages for the model's chat template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source<T> {
    Plain(T),
    /// A non-empty array of objects that each have a string `role`.
    Messages(Span),
}

/// `POST /v1/embeddings`, and vLLM's `/pooling` and `/classify`, which are asked alike. Messages in place of an input are
/// vLLM's extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedding {
    pub model: Model,
    pub input: Source<Input>,
    /// None: messages, or an answer that is not JSON.
    pub items: Option<Items>,
    pub template: TemplateFields,
    pub truncation: Truncation,
    pub cache_salt: Option<String>,
    pub cache_salt_at: Place,
    pub user: Option<String>,
}

/// `POST /v1/rerank` and `/v1/score`, in vLLM's shape. How an engine pairs the texts is its model's matter, so they are
/// only measured here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranking {
    pub model: Model,
    /// Length of what is compared with each other, as JSON.
    pub text_bytes: usize,
    /// What one text is compared with. None: several texts stand against as many, they are no plain texts, or only the
    /// best of them are asked for.
    pub items: Option<Items>,
}

/// `POST /tokenize`, in vLLM's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenize {
    pub model: Model,
    pub prompt: Source<String>,
    /// An array.
    pub tools: Option<Span>,
    /// Its `add_special_tokens` defaults to true for a plain prompt and to false for messages.
    pub template: TemplateFields,
    pub return_token_strs: bool,
}

/// `POST /detokenize`, in vLLM's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detokenize {
    pub model: Model,
    /// May be empty.
    pub tokens: Vec<u32>,
}

keys!(ChatKeys {
    model,
    stream,
    stream_options,
    messages,
    tools,
    tool_choice,
    max_tokens,
    max_completion_tokens,
    n,
    add_generation_prompt,
    continue_final_message,
    add_special_tokens,
    chat_template,
    chat_template_kwargs,
    documents,
    reasoning_effort,
    truncate_prompt_tokens,
    truncation_side,
    cache_salt,
    user,
    temperature,
    seed,
});

keys!(CompletionKeys {
    model,
    stream,
    stream_options,
    prompt,
    max_tokens,
    n,
    echo,
    add_special_tokens,
    truncate_prompt_tokens,
    truncation_side,
    cache_salt,
    user,
    temperature,
    seed,
});

keys!(EmbeddingKeys {
    model,
    input,
    messages,
    encoding_format,
    add_generation_prompt,
    continue_final_message,
    add_special_tokens,
    chat_template,
    chat_template_kwargs,
    truncate_prompt_tokens,
    truncation_side,
    cache_salt,
    user,
});

keys!(RankingKeys { model, query, documents, top_n, text_1, text_2, queries, items });

keys!(TokenizeKeys {
    model,
    prompt,
    messages,
    tools,
    add_generation_prompt,
    continue_final_message,
    add_special_tokens,
    chat_template,
    chat_template_kwargs,
    return_token_strs,
});

keys!(DetokenizeKeys { model, tokens });

keys!(OptionKeys { include_usage as "stream_options.include_usage" });

impl Chat {
    /// Reads a chat request.
    pub fn peek(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<ChatKeys<'_>>(body)?;
        Ok(Self {
            model: model(&keys.model, open)?,
            streaming: streaming(open, &keys.stream, &keys.stream_options)?,
            messages: messages::read(&keys.messages)?.ok_or_else(|| keys.messages.missing())?,
            tools: keys.tools.array()?,
            tool_choice: keys.tool_choice.span(),
            max_tokens: chat_max_tokens(&keys.max_tokens, &keys.max_completion_tokens)?,
            n: keys.n.count(1..=CHOICES_MAX)?.unwrap_or(1),
            template: TemplateFields {
                add_generation_prompt: keys.add_generation_prompt.boolean()?,
                continue_final_message: keys.continue_final_message.boolean()?,
                add_special_tokens: keys.add_special_tokens.boolean()?,
                chat_template: keys.chat_template.span(),
                chat_template_kwargs: keys.chat_template_kwargs.span(),
                documents: keys.documents.span(),
                reasoning_effort: keys.reasoning_effort.span(),
            },
            truncation: truncation(&keys.truncate_prompt_tokens, &keys.truncation_side)?,
            cache_salt: keys.cache_salt.string()?,
            cache_salt_at: place(&keys.cache_salt, open),
            user: keys.user.string()?,
            deterministic: deterministic(&keys.temperature, &keys.seed),
        })
    }
}

impl Completion {
    /// Reads a completion request.
    pub fn peek(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<CompletionKeys<'_>>(body)?;
        let echo = keys.echo.boolean()?.unwrap_or(false);
        Ok(Self {
            model: model(&keys.model, open)?,
            streaming: streaming(open, &keys.stream, &keys.stream_options)?,
            prompt: input::read(&keys.prompt)?.ok_or_else(|| keys.prompt.missing())?,
            prompt_at: keys.prompt.span().ok_or_else(|| keys.prompt.missing())?,
            max_tokens: keys.max_tokens.count(if echo { 0 } else { 1 }..=u32::MAX)?,
            n: keys.n.count(1..=CHOICES_MAX)?.unwrap_or(1),
            echo,
            add_special_tokens: keys.add_special_tokens.boolean()?,
            truncation: truncation(&keys.truncate_prompt_tokens, &keys.truncation_side)?,
            cache_salt: keys.cache_salt.string()?,
            cache_salt_at: place(&keys.cache_salt, open),
            user: keys.user.string()?,
            deterministic: deterministic(&keys.temperature, &keys.seed),
        })
    }
}

impl Embedding {
    /// Reads an embedding request.
    pub fn peek(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<EmbeddingKeys<'_>>(body)?;
        let input = source(&keys.input, input::read(&keys.input)?, &keys.messages)?;
        let is_json = matches!(keys.encoding_format.text(), None | Some(r#""float""# | r#""base64""#));
        let items = match &input {
            Source::Plain(input) if is_json => Items::of(&keys.input, input),
            _ => None,
        };
        Ok(Self {
            model: model(&keys.model, open)?,
            input,
            items,
            template: TemplateFields {
                add_generation_prompt: keys.add_generation_prompt.boolean()?,
                continue_final_message: keys.continue_final_message.boolean()?,
                add_special_tokens: keys.add_special_tokens.boolean()?,
                chat_template: keys.chat_template.span(),
                chat_template_kwargs: keys.chat_template_kwargs.span(),
                ..TemplateFields::default()
            },
            truncation: truncation(&keys.truncate_prompt_tokens, &keys.truncation_side)?,
            cache_salt: keys.cache_salt.string()?,
            cache_salt_at: place(&keys.cache_salt, open),
            user: keys.user.string()?,
        })
    }
}

impl Ranking {
    /// Reads a request to rank documents by a query.
    pub fn rerank(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<RankingKeys<'_>>(body)?;
        let query = keys.query.span().ok_or_else(|| keys.query.missing())?;
        let documents = keys.documents.array()?.ok_or_else(|| keys.documents.missing())?;
        Ok(Self {
            model: model(&keys.model, open)?,
            text_bytes: query.len() + documents.len(),
            items: if keys.top_n.span().is_none() { Items::texts(&keys.documents) } else { None },
        })
    }

    /// Reads a request to score pairs of texts, which engines and their releases name differently.
    pub fn score(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<RankingKeys<'_>>(body)?;
        let named = [&keys.text_1, &keys.text_2, &keys.query, &keys.queries, &keys.documents, &keys.items];
        let items = match (only(keys.text_1, keys.queries), only(keys.text_2, keys.documents)) {
            (Some(one), Some(several)) if one.is_string() && !keys.query.is_given() && !keys.items.is_given() => {
                Items::texts(&several)
            }
            _ => None,
        };
        Ok(Self {
            model: model(&keys.model, open)?,
            text_bytes: named.into_iter().filter_map(Field::span).map(|span| span.len()).sum(),
            items,
        })
    }
}

impl Tokenize {
    /// Reads a request to tokenize.
    pub fn peek(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<TokenizeKeys<'_>>(body)?;
        Ok(Self {
            model: model(&keys.model, open)?,
            prompt: source(&keys.prompt, keys.prompt.string()?, &keys.messages)?,
            tools: keys.tools.array()?,
            template: TemplateFields {
                add_generation_prompt: keys.add_generation_prompt.boolean()?,
                continue_final_message: keys.continue_final_message.boolean()?,
                add_special_tokens: keys.add_special_tokens.boolean()?,
                chat_template: keys.chat_template.span(),
                chat_template_kwargs: keys.chat_template_kwargs.span(),
                ..TemplateFields::default()
            },
            return_token_strs: keys.return_token_strs.boolean()?.unwrap_or(false),
        })
    }
}

impl Detokenize {
    /// Reads a request to turn token ids into text.
    pub fn peek(body: &[u8]) -> Result<Self, Refusal> {
        let (keys, open) = keys::read::<DetokenizeKeys<'_>>(body)?;
        Ok(Self {
            model: model(&keys.model, open)?,
            tokens: input::read_ids(&keys.tokens)?.ok_or_else(|| keys.tokens.missing())?,
        })
    }
}

fn model(field: &Field<'_>, open: usize) -> Result<Model, Refusal> {
    Ok(Model { name: field.string()?.unwrap_or_default(), at: place(field, open) })
}

fn streaming(open: usize, stream: &Field<'_>, options: &Field<'_>) -> Result<Streaming, Refusal> {
    let stream = stream.boolean()?.unwrap_or(false);
    let (Some(span), Some(text)) = (options.object()?, options.text()) else {
        let usage_at = options.place().map_or(UsageAt::Body { open }, UsageAt::NullOptions);
        return Ok(Streaming { stream, options: None, include_usage: false, usage_at });
    };
    if !stream {
        return Err(Refusal::value(options.name(), format_args!("only allowed when 'stream' is true")));
    }
    let include_usage = keys::nested::<OptionKeys<'_>>(text)?.include_usage;
    let usage_at = match include_usage.place() {
        Some(place) => UsageAt::Value(Span { start: span.start + place.start, end: span.start + place.end }),
        None => UsageAt::Options { open: span.start + 1, empty: text.trim_start_matches('{').trim_ascii() == "}" },
    };
    let include_usage = include_usage.boolean()?.unwrap_or(false);
    Ok(Streaming { stream, options: Some(span), include_usage, usage_at })
}

/// Both names may stand if they agree; OpenAI deprecates `max_tokens` in favour of `max_completion_tokens`.
fn chat_max_tokens(old: &Field<'_>, new: &Field<'_>) -> Result<Option<u32>, Refusal> {
    match (old.count(1..=u32::MAX)?, new.count(1..=u32::MAX)?) {
        (Some(a), Some(b)) if a != b => {
            Err(Refusal::value(old.name(), format_args!("it is {a} while '{}' is {b}. Give one of them", new.name())))
        }
        (old, new) => Ok(new.or(old)),
    }
}

fn truncation(tokens: &Field<'_>, side: &Field<'_>) -> Result<Truncation, Refusal> {
    let tokens = tokens.integer(-1..=i64::from(u32::MAX))?;
    let side = match side.string()?.as_deref() {
        None => None,
        Some("left") => Some(Side::Left),
        Some("right") => Some(Side::Right),
        Some(_) => return Err(Refusal::value(side.name(), format_args!("expected 'left' or 'right'"))),
    };
    Ok(Truncation { tokens, side })
}

/// Exactly one of a plain value and messages.
fn source<T>(field: &Field<'_>, plain: Option<T>, messages: &Field<'_>) -> Result<Source<T>, Refusal> {
    match (plain, messages::read(messages)?) {
        (Some(plain), None) => Ok(Source::Plain(plain)),
        (None, Some(span)) => Ok(Source::Messages(span)),
        (None, None) => Err(field.missing()),
        (Some(_), Some(_)) => {
            Err(Refusal::value(messages.name(), format_args!("give either it or '{}', not both", field.name())))
        }
    }
}

/// Their types are the engine's to judge; what cannot be read makes nothing certain.
fn deterministic(temperature: &Field<'_>, seed: &Field<'_>) -> bool {
    if temperature.is_repeated() || seed.is_repeated() {
        return false; // engines may read the first or the last
    }
    temperature.text().and_then(|text| text.parse().ok()) == Some(0.0f64)
        || seed.text().is_some_and(|text| text.parse::<i64>().is_ok())
}

/// The one of two fields that is given.
fn only<'a>(one: Field<'a>, other: Field<'a>) -> Option<Field<'a>> {
    match (one.is_given(), other.is_given()) {
        (true, false) => Some(one),
        (false, true) => Some(other),
        _ => None,
    }
}

fn place(field: &Field<'_>, open: usize) -> Place {
    field.place().map_or(Place::Free(open), Place::Value)
}
