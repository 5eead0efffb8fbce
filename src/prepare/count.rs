//! Counting one request with a tokenizer at hand, and guessing without.

use std::sync::Arc;
use std::time::SystemTime;

use forebay_backends::engines::{Form, Written};
use forebay_proto::peek::{Input, Source, Span, TemplateFields, Tokenize, Truncation};
use forebay_tokens::{Chat, Prompt as Rendered, Special, Tokenizer};

use super::{Asked, BYTES_PER_TOKEN, Error, hashes};
use crate::routing::Model;

/// Tokens of a prompt's end that show how what follows is read: more than a character or a word has.
const SEAM_TOKENS: usize = 32;

/// What a request costs before it is generated.
pub(super) struct Counted {
    /// All prompts together.
    pub(super) tokens: u32,
    /// The longest single one: each must fit the context for itself.
    pub(super) longest: u32,
    pub(super) exact: bool,
    pub(super) blocks: Arc<[u64]>,
}

impl Counted {
    /// The count of these prompts; prefix hashes are the first one's.
    pub(super) fn of<T: AsRef<[u32]>>(prompts: &[T], model: &Model, asked: &Asked, exact: bool) -> Self {
        let cut = Cut::new(truncation(asked), model.max_model_len);
        let lengths = || prompts.iter().map(|ids| cut.length(ids.as_ref().len()));
        let first = prompts.first().map_or(&[][..], AsRef::as_ref);
        let blocks = match asked {
            // Embedding models keep no prefix.
            Asked::Embedding(_) | Asked::Ranking(_) => Arc::default(),
            // What is left of a prompt that the engine shortens depends on settings of its own.
            _ if cut.length(first.len()) as usize != first.len() => Arc::default(),
            _ => hashes::blocks(first, model.block_tokens, &model.name, cache_salt(asked)),
        };
        Self { tokens: lengths().fold(0, u32::saturating_add), longest: lengths().max().unwrap_or(0), exact, blocks }
    }
}

/// Counts with the model's own tokenizer.
pub(super) fn exactly(tokenizer: &Tokenizer, model: &Model, asked: &Asked, body: &[u8]) -> Result<Counted, Error> {
    match asked {
        // A template of the client's own is a program that engines refuse unless told to trust it; it is not run here.
        Asked::Chat(chat) if chat.template.chat_template.is_some() => Ok(estimate(model, asked)),
        Asked::Embedding(embedding) if embedding.template.chat_template.is_some() => Ok(estimate(model, asked)),
        Asked::Ranking(_) => Ok(estimate(model, asked)),
        Asked::Chat(chat) => {
            let prompt = rendered(tokenizer, body, &chat.messages, chat.tools.as_ref(), &chat.template)?;
            Ok(Counted::of(&[prompt.ids], model, asked, prompt.exact))
        }
        Asked::Completion(completion) => {
            let special = special(completion.add_special_tokens.unwrap_or(true));
            input(tokenizer, model, asked, &completion.prompt, special)
        }
        Asked::Embedding(embedding) => match &embedding.input {
            Source::Plain(plain) => {
                let special = special(embedding.template.add_special_tokens.unwrap_or(true));
                input(tokenizer, model, asked, plain, special)
            }
            Source::Messages(messages) => {
                let prompt = rendered(tokenizer, body, messages, None, &embedding.template)?;
                Ok(Counted::of(&[prompt.ids], model, asked, prompt.exact))
            }
        },
    }
}

fn input(
    tokenizer: &Tokenizer,
    model: &Model,
    asked: &Asked,
    input: &Input,
    special: Special,
) -> Result<Counted, Error> {
    Ok(match input {
        Input::Ids(ids) => Counted::of(&[ids], model, asked, true),
        Input::IdLists(lists) => Counted::of(lists, model, asked, true),
        Input::Text(text) => Counted::of(&[tokenizer.encode(text, special)?], model, asked, true),
        Input::Texts(texts) => {
            let prompts: Result<Vec<_>, _> = texts.iter().map(|text| tokenizer.encode(text, special)).collect();
            Counted::of(&prompts?, model, asked, true)
        }
    })
}

/// Guesses by length, except where the client counted itself by sending ids.
pub(super) fn estimate(model: &Model, asked: &Asked) -> Counted {
    let given = match asked {
        Asked::Completion(completion) => Some(&completion.prompt),
        Asked::Embedding(embedding) => match &embedding.input {
            Source::Plain(input) => Some(input),
            Source::Messages(_) => None,
        },
        Asked::Chat(_) | Asked::Ranking(_) => None,
    };
    match given {
        Some(Input::Ids(ids)) => Counted::of(&[ids], model, asked, true),
        Some(Input::IdLists(lists)) => Counted::of(lists, model, asked, true),
        _ => {
            let tokens = u32::try_from(asked.text_bytes() / BYTES_PER_TOKEN).unwrap_or(u32::MAX).max(1);
            Counted { tokens, longest: tokens, exact: false, blocks: Arc::default() }
        }
    }
}

/// What `/tokenize` answers with.
#[derive(Debug)]
pub struct Tokenized {
    pub ids: Vec<u32>,
    /// Each id's token as the vocabulary writes it, where asked for.
    pub strings: Option<Vec<String>>,
}

pub(super) fn tokenized(tokenizer: &Tokenizer, asked: &Tokenize, body: &[u8]) -> Result<Tokenized, Error> {
    let ids = match &asked.prompt {
        Source::Plain(text) => tokenizer.encode(text, special(asked.template.add_special_tokens.unwrap_or(true)))?,
        Source::Messages(_) if asked.template.chat_template.is_some() => {
            return Err(Error::Template("chat_template: a template of the request's own is not accepted".to_owned()));
        }
        Source::Messages(messages) => rendered(tokenizer, body, messages, asked.tools.as_ref(), &asked.template)?.ids,
    };
    let strings =
        asked.return_token_strs.then(|| ids.iter().map(|id| tokenizer.token(*id).unwrap_or_default()).collect());
    Ok(Tokenized { ids, strings })
}

/// A prompt in the form that an engine wants.
pub(super) fn written(tokenizer: &Arc<Tokenizer>, asked: &Asked, body: &[u8], form: Form) -> Result<Written, Error> {
    let mut written = Written { tokenizer: Some(Arc::clone(tokenizer)), ..Written::default() };
    match (asked, form) {
        (Asked::Chat(chat), Form::Text) => {
            let render = |chat: &Chat<'_>| tokenizer.render(chat);
            let rendered = conversation(body, &chat.messages, chat.tools.as_ref(), &chat.template, render)?;
            written.text = Some(rendered.text);
        }
        (Asked::Chat(chat), Form::Ids) => {
            let prompt = rendered(tokenizer, body, &chat.messages, chat.tools.as_ref(), &chat.template)?;
            // What is no text was left out.
            written.ids = prompt.exact.then_some(prompt.ids);
        }
        (Asked::Completion(completion), Form::Ids) => {
            let special = special(completion.add_special_tokens.unwrap_or(true));
            written.ids = match &completion.prompt {
                Input::Ids(ids) => Some(ids.clone()),
                Input::IdLists(lists) => <&[_; 1]>::try_from(lists.as_slice()).ok().map(|[ids]| ids.clone()),
                Input::Text(text) => Some(tokenizer.encode(text, special)?),
                Input::Texts(texts) => match texts.as_slice() {
                    [text] => Some(tokenizer.encode(text, special)?),
                    _ => None,
                },
            };
        }
        _ => {}
    }
    Ok(written)
}

/// The ids of a prompt and of the beginning of its answer.
#[derive(Debug)]
pub struct SaidIds {
    pub ids: Vec<u32>,
    /// How many of them are the prompt's.
    pub prompt_tokens: usize,
}

/// The ids of a prompt and of what was said after it.
pub(super) fn said(
    tokenizer: &Arc<Tokenizer>,
    asked: &Asked,
    body: &[u8],
    said: &str,
) -> Result<Option<SaidIds>, Error> {
    let Some(mut ids) = written(tokenizer, asked, body, Form::Ids)?.ids else { return Ok(None) };
    let prompt_tokens = ids.len();
    ids.extend(tokenizer.encode(said, Special::Omit)?);
    // Some tokenizers put a space before a text.
    let end = ids.get(prompt_tokens.saturating_sub(SEAM_TOKENS)..).unwrap_or_default();
    let before = ids.get(prompt_tokens.saturating_sub(SEAM_TOKENS)..prompt_tokens).unwrap_or_default();
    let (before, both) = (tokenizer.decode(before, Special::Add)?, tokenizer.decode(end, Special::Add)?);
    Ok((both.strip_prefix(&*before) == Some(said)).then_some(SaidIds { ids, prompt_tokens }))
}

/// A conversation as its engine will render and count it.
fn rendered(
    tokenizer: &Tokenizer,
    body: &[u8],
    messages: &Span,
    tools: Option<&Span>,
    template: &TemplateFields,
) -> Result<Rendered, Error> {
    conversation(body, messages, tools, template, |chat| tokenizer.chat(chat))
}

/// What `render` makes of these parts of a body.
fn conversation<T>(
    body: &[u8],
    messages: &Span,
    tools: Option<&Span>,
    template: &TemplateFields,
    render: impl FnOnce(&Chat<'_>) -> Result<T, forebay_tokens::Error>,
) -> Result<T, Error> {
    let at = |span: Option<&Span>| span.and_then(|span| body.get(span.clone()));
    let text = |span: &Option<Span>| at(span.as_ref()).map_or(Ok(None), string);
    let reasoning_effort = text(&template.reasoning_effort)?;
    let chat = Chat {
        tools: at(tools),
        documents: at(template.documents.as_ref()),
        kwargs: at(template.chat_template_kwargs.as_ref()),
        reasoning_effort: reasoning_effort.as_deref(),
        add_generation_prompt: template.add_generation_prompt.unwrap_or(true),
        continue_final_message: template.continue_final_message.unwrap_or(false),
        add_special_tokens: template.add_special_tokens.unwrap_or(false),
        ..Chat::new(at(Some(messages)).unwrap_or_default(), SystemTime::now())
    };
    Ok(render(&chat)?)
}

fn string(json: &[u8]) -> Result<Option<String>, Error> {
    serde_json::from_slice(json).map_err(|_| Error::Template("a template field is not a string".to_owned()))
}

fn special(add: bool) -> Special {
    if add { Special::Add } else { Special::Omit }
}

fn truncation(asked: &Asked) -> Truncation {
    match asked {
        Asked::Chat(chat) => chat.truncation,
        Asked::Completion(completion) => completion.truncation,
        Asked::Embedding(embedding) => embedding.truncation,
        Asked::Ranking(_) => Truncation::default(),
    }
}

fn cache_salt(asked: &Asked) -> Option<&str> {
    match asked {
        Asked::Chat(chat) => chat.cache_salt.as_deref(),
        Asked::Completion(completion) => completion.cache_salt.as_deref(),
        Asked::Embedding(embedding) => embedding.cache_salt.as_deref(),
        Asked::Ranking(_) => None,
    }
}

/// How many tokens of a prompt the engine keeps.
struct Cut(Option<u32>);

impl Cut {
    fn new(truncation: Truncation, max_model_len: Option<u32>) -> Self {
        Self(match truncation.tokens {
            None => None,
            Some(-1) => max_model_len,
            Some(tokens) => u32::try_from(tokens).ok(),
        })
    }

    fn length(&self, tokens: usize) -> u32 {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        self.0.map_or(tokens, |kept| tokens.min(kept))
    }
}
