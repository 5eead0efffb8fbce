//! One model's tokenizer: text to ids and back, and conversations to prompts.
//!
//! Invariants: ids equal those of the Hugging Face library (`tokenizers`, which does the work) with or without a
//! [`Cache`]; truncation and padding that a `tokenizer.json` asks for are off, since a count must be of the whole.
//! Text that equals a special token becomes that token, as it does in the engines.
//!
//! Not here: `transformers`' own changes to some tokenizer classes (a BOS that only `add_bos_token` in the
//! configuration asks for). Chats are not touched by them, since templates write their own BOS.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::cache::{Cache, Fingerprint};
use crate::chat::{Chat, Parsed};
use crate::config::{Config, DEFAULT, TOOL_USE};
use crate::cuts::{Cuts, PART_BYTES, PIECE_BYTES, Piece};
use crate::detokenizer::Detokenizer;
use crate::error::{Error, LoadError};
use crate::template::ChatTemplate;

/// Text shorter than this (bytes) is encoded whole: it would be one part, found only when all of it was seen before.
const CACHED_FROM_BYTES: usize = 2 * PART_BYTES;

/// Special tokens around or within a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Encoding: what the tokenizer puts around every text (BOS, `[CLS]` … `[SEP]`) is added.
    /// Decoding: special tokens appear in the text.
    Add,
    /// Encoding: the text alone. Decoding: special tokens leave no trace.
    Omit,
}

/// A conversation as the text that the model reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// False when something other than text (an image, an unknown part) was left out, which the engine would count.
    pub exact: bool,
}

/// A conversation as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// As in [`Rendered`]; when false the engine will count more tokens.
    pub exact: bool,
}

/// The files of a tokenizer, as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parts<'a> {
    /// `tokenizer.json`
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`
    pub special_tokens_map: Option<&'a [u8]>,
    /// `chat_template.json`
    pub template_json: Option<&'a [u8]>,
    /// `chat_template.jinja`
    pub template: Option<&'a str>,
}

/// One model's tokenizer and chat templates. Share it behind an [`Arc`].
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    templates: BTreeMap<String, ChatTemplate>,
    config: Config,
    cached: Option<Cached>,
    fingerprint: Fingerprint,
}

/// What the cached way needs beside the tokenizer.
struct Cached {
    cache: Arc<Cache>,
    cuts: Cuts,
    /// What the tokenizer puts around every text, when that is the same for every text.
    around: Option<Around>,
}

#[derive(Debug, PartialEq, Eq)]
struct Around {
    before: Vec<u32>,
    behind: Vec<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary_size())
            .field("templates", &self.templates.keys())
            .field("cached", &self.cached.is_some())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a model's directory: `tokenizer.json`, and where present `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.json` and `chat_template.jinja`. Takes 60 to 300 ms.
    ///
    /// # Errors
    /// [`LoadError`] with the file and what is wrong with it.
    pub fn from_dir(dir: &Path) -> Result<Self, LoadError> {
        let read = |name: &str| match std::fs::read(dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LoadError::Read { path: dir.join(name), source }),
        };
        let path = dir.join("tokenizer.json");
        let tokenizer = std::fs::read(&path).map_err(|source| LoadError::Read { path, source })?;
        let config = read("tokenizer_config.json")?;
        let special_tokens_map = read("special_tokens_map.json")?;
        let template_json = read("chat_template.json")?;
        let template = read("chat_template.jinja")?
            .map(String::from_utf8)
            .transpose()
            .map_err(|error| LoadError::Invalid { file: "chat_template.jinja", message: error.to_string() })?;
        Self::from_parts(&Parts {
            tokenizer: &tokenizer,
            config: config.as_deref(),
            special_tokens_map: special_tokens_map.as_deref(),
            template_json: template_json.as_deref(),
            template: template.as_deref(),
        })
    }

    /// Loads from the contents of these files.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`].
    pub fn from_parts(parts: &Parts<'_>) -> Result<Self, LoadError> {
        let invalid = |message: String| LoadError::Invalid { file: "tokenizer.json", message };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(parts.tokenizer).map_err(|error| invalid(error.to_string()))?;
        inner.with_padding(None).with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        let mut config = parts.config.map(Config::parse).transpose()?.unwrap_or_default();
        if let Some(json) = parts.special_tokens_map {
            config.add_special_tokens_map(json)?;
        }
        if let Some(json) = parts.template_json {
            config.set_template_json(json)?;
        }
        if let Some(text) = parts.template {
            config.set_template(text.to_owned());
        }
        let mut templates = BTreeMap::new();
        for (name, source) in &config.templates {
            let template = ChatTemplate::new(source, config.special.clone())
                .map_err(|error| LoadError::Template { name: name.clone(), message: error.to_string() })?;
            templates.insert(name.clone(), template);
        }
        let fingerprint = *blake3::hash(parts.tokenizer).as_bytes();
        Ok(Self { inner, templates, config, cached: None, fingerprint })
    }

    /// Encodes long texts by way of a cache from now on; ids stay the same. Without effect on a tokenizer whose way of
    /// splitting text is not known to be safe to divide.
    #[must_use]
    pub fn with_cache(mut self, cache: Arc<Cache>) -> Self {
        let around = Around::of(&self.inner);
        self.cached = Cuts::of(&self.inner).map(|cuts| Cached { cache, cuts, around });
        self
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], when the model has no way to write some text (no unknown token).
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, Error> {
        if text.len() >= CACHED_FROM_BYTES
            && let Some(ids) = self.cached.as_ref().and_then(|cached| self.encode_cached(cached, text, special))
        {
            return Ok(ids);
        }
        let encoding = self
            .inner
            .encode_fast(text, special == Special::Add)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// `None` where the text must be encoded whole.
    fn encode_cached(&self, cached: &Cached, text: &str, special: Special) -> Option<Vec<u32>> {
        let around = match special {
            Special::Add => Some(cached.around.as_ref()?),
            Special::Omit => None,
        };
        let mut ids = Vec::with_capacity(text.len() / 3);
        ids.extend(around.iter().flat_map(|around| &around.before));
        let (cuts, cache, tokenizer) = (&cached.cuts, &cached.cache, &self.fingerprint);
        let encode = |part: Piece<'_>| cuts.encode(&self.inner, part);
        let pieces = cuts.pieces(text, PIECE_BYTES);
        let (last, others) = pieces.split_last()?;
        for piece in others {
            let by_parts = || {
                let mut ids = Vec::with_capacity(piece.text.len() / 3);
                for part in cuts.parts(*piece) {
                    match cache.known(tokenizer, part) {
                        Some(known) => ids.extend_from_slice(&known),
                        None => ids.append(&mut encode(part)?),
                    }
                }
                Some(ids)
            };
            ids.extend_from_slice(&cache.ids(tokenizer, *piece, by_parts)?);
        }
        // A conversation grows at its end, so that this piece will be another the next time, but for its first parts.
        for part in cuts.parts(*last) {
            ids.extend_from_slice(&cache.ids(tokenizer, part, || encode(part))?);
        }
        ids.extend(around.iter().flat_map(|around| &around.behind));
        Some(ids)
    }

    /// The text of ids. Ids that the vocabulary does not have leave no trace; bytes that are no whole character become
    /// `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], when the decoder refuses.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String, Error> {
        self.inner.decode(ids, special == Special::Omit).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The text of ids that come one after another. `prompt` are the ids before the first: its end decides how the
    /// first is written (sentencepiece drops a leading space only at the start of a text).
    #[must_use]
    pub fn detokenizer(self: &Arc<Self>, prompt: &[u32], special: Special) -> Detokenizer {
        Detokenizer::new(Arc::clone(self), prompt, special)
    }

    /// Whether an id leaves no trace in a text, wherever it stands.
    pub(crate) fn is_silent(&self, id: u32, special: Special) -> bool {
        let is_special = |token: String| self.inner.get_added_vocabulary().is_special_token(&token);
        self.token(id).is_none_or(|token| special == Special::Omit && is_special(token))
    }

    /// The vocabulary's own spelling of an id (`Ġthe`, `▁the`), as engines show it in log-probabilities.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    #[must_use]
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Entries of the vocabulary, added tokens included.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that ends an answer (`eos_token`), where the configuration names one.
    #[must_use]
    pub fn end(&self) -> Option<u32> {
        self.id(self.config.special.0.get("eos_token")?)
    }

    #[must_use]
    pub fn has_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// A conversation as text, reshaped and rendered as vLLM does it.
    ///
    /// # Errors
    /// [`Error::NoTemplate`], and those of [`ChatTemplate::render`].
    pub fn render(&self, chat: &Chat<'_>) -> Result<Rendered, Error> {
        let own;
        let template = match chat.chat_template {
            None => self.default_template(chat)?,
            Some(named) if self.templates.contains_key(named) => self.templates.get(named).ok_or(Error::NoTemplate)?,
            Some(source) => {
                own = ChatTemplate::new(source, self.config.special.clone())?;
                &own
            }
        };
        let mut parsed = Parsed::new(chat)?;
        let exact = parsed.normalize(template.content_format())?;
        Ok(Rendered { text: template.render_parsed(parsed)?, exact })
    }

    /// A conversation as ids: [`Tokenizer::render`], then [`Tokenizer::encode`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn chat(&self, chat: &Chat<'_>) -> Result<Prompt, Error> {
        let rendered = self.render(chat)?;
        let special = if chat.add_special_tokens { Special::Add } else { Special::Omit };
        Ok(Prompt { ids: self.encode(&rendered.text, special)?, exact: rendered.exact })
    }

    /// As `transformers` chooses among a model's named templates.
    fn default_template(&self, chat: &Chat<'_>) -> Result<&ChatTemplate, Error> {
        let has_tools = chat.tools.is_some_and(|tools| tools.trim_ascii() != b"null");
        let for_tools = self.templates.get(TOOL_USE).filter(|_| has_tools);
        for_tools.or_else(|| self.templates.get(DEFAULT)).ok_or(Error::NoTemplate)
    }
}

impl Around {
    /// Finds out from three texts; `None` when they disagree.
    fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let of = |text: &str| {
            let bare = tokenizer.encode_fast(text, false).ok()?;
            let full = tokenizer.encode_fast(text, true).ok()?;
            let (bare, full) = (bare.get_ids(), full.get_ids());
            let at = full.windows(bare.len().max(1)).position(|window| window == bare)?;
            let (before, rest) = full.split_at_checked(at)?;
            Some(Self { before: before.to_vec(), behind: rest.get(bare.len()..)?.to_vec() })
        };
        let first = of("a")?;
        (of("Two words.")? == first && of("3 lines\n\n of text")? == first).then_some(first)
    }
}
