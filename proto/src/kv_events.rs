//! KV-cache events: what an engine stored in its prefix cache and dropped from it.
//!
//! vLLM and SGLang publish batches over ZeroMQ. A batch is a MessagePack array `[time, [event…], rank]`; an event is a
//! map whose `type` names it (vLLM 0.32 and later, SGLang 0.5), or an array `[tag, field…]` in a fixed order (releases
//! before). Fields, and whole events, that are not known here are passed over. Sources: vLLM 0.32.0
//! `distributed/kv_events.py` and `v1/core/block_pool.py`, SGLang 0.5 `disaggregation/kv_events.py`.
//!
//! Invariants: a payload is read whole or refused; memory is in proportion to the payload.
//!
//! Not here: sequence numbers and sockets, and what the blocks are called in Forebay: an engine's hashes mean nothing
//! outside of it, but they name a block when it is dropped.

use crate::msgpack::{Malformed, Reader, Value};

/// One change of the prefix cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Stored(Stored),
    Removed(Removed),
    /// Everything is gone.
    Cleared,
}

/// An engine's own name for a block with all that stands before it. Bytes count by their last eight, which is also what
/// vLLM sends when told to send numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u64);

/// Blocks that can be read from the cache from now on. The first follows `parent`, each other the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub blocks: Vec<EngineHash>,
    /// The block before the first; none at the start of a prompt.
    pub parent: Option<EngineHash>,
    /// Token ids of all blocks, `block_tokens` each. Empty where they are no plain ids.
    pub tokens: Vec<u32>,
    /// Tokens in each block.
    pub block_tokens: u32,
    /// Name of the LoRA adapter; empty where there is one but it is not named.
    pub lora: Option<String>,
    /// The client's `cache_salt`; only told with the block that starts a prompt.
    pub salt: Option<String>,
    /// How many of the blocks, from the first on, are told entirely by their tokens: not those with images and the like,
    /// and none behind them.
    pub plain: usize,
    pub place: Place,
}

/// Blocks that can no longer be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    pub blocks: Vec<EngineHash>,
    pub place: Place,
}

/// Which cache an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The engine's own GPU memory, not a slower tier or another machine.
    pub on_gpu: bool,
    /// Index of the group of layers, in models that have several kinds of attention.
    pub group: Option<u32>,
    /// Whether these layers attend to the whole prefix. Only told with stored blocks; true where it is not.
    pub full_attention: bool,
}

/// Reads a payload: what happened in one step of the engine, in order. Kinds that are not known are left out.
///
/// # Errors
/// [`Malformed`] when it is no batch, or an event in it lacks what makes it one.
pub fn read(payload: &[u8]) -> Result<Vec<Event>, Malformed> {
    let mut reader = Reader::new(payload);
    let Value::Array(length @ 2..) = reader.next()? else { return Err(Malformed) };
    let (Value::Float(_) | Value::Unsigned(_)) = reader.next()? else { return Err(Malformed) };
    let count = reader.array_or_nil()?.ok_or(Malformed)?;
    let mut events = Vec::new();
    for _ in 0..count {
        events.extend(event(&mut reader)?);
    }
    for _ in 2..length {
        reader.skip()?;
    }
    if reader.is_empty() { Ok(events) } else { Err(Malformed) }
}

/// Fields of the known events, in the order of the array form.
const STORED: [&str; 16] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
    "session_id",
    "lookahead_token_ids",
    "cache_salt",
];
const REMOVED: [&str; 5] = ["block_hashes", "medium", "group_idx", "locality", "ownership"];

/// Kinds of KV cache that keep the whole prefix (vLLM's `KVCacheSpecKind`).
const WHOLE_PREFIX: [&str; 3] = ["full_attention", "mla_attention", "sink_full_attention"];

#[derive(Clone, Copy)]
enum Tag {
    Stored,
    Removed,
    Cleared,
}

fn tag(name: &[u8]) -> Option<Tag> {
    match name {
        b"BlockStored" => Some(Tag::Stored),
        b"BlockRemoved" => Some(Tag::Removed),
        b"AllBlocksCleared" => Some(Tag::Cleared),
        _ => None,
    }
}

/// One event; `None` for a kind that is not known.
fn event(reader: &mut Reader<'_>) -> Result<Option<Event>, Malformed> {
    let mut fields = Fields::default();
    let mut inside = *reader;
    let tag = match inside.next()? {
        Value::Array(length @ 1..) => {
            let Value::Text(name) = inside.next()? else { return Err(Malformed) };
            let Some(tag) = tag(name) else { return reader.skip().map(|()| None) };
            let order: &[&str] = match tag {
                Tag::Stored => &STORED,
                Tag::Removed => &REMOVED,
                Tag::Cleared => &[],
            };
            for at in 0..length - 1 {
                fields.take(order.get(at).map_or(&[][..], |name| name.as_bytes()), &mut inside)?;
            }
            tag
        }
        Value::Map(length) => {
            let Some(tag) = tag_of_map(inside, length)? else { return reader.skip().map(|()| None) };
            for _ in 0..length {
                let Value::Text(name) = inside.next()? else { return Err(Malformed) };
                fields.take(name, &mut inside)?;
            }
            tag
        }
        _ => return Err(Malformed),
    };
    *reader = inside;
    match tag {
        Tag::Stored => fields.stored().map(|stored| Some(Event::Stored(stored))),
        Tag::Removed => fields.removed().map(|removed| Some(Event::Removed(removed))),
        Tag::Cleared => Ok(Some(Event::Cleared)),
    }
}

fn tag_of_map(mut inside: Reader<'_>, length: usize) -> Result<Option<Tag>, Malformed> {
    for _ in 0..length {
        let Value::Text(name) = inside.next()? else { return Err(Malformed) };
        if name == b"type" {
            let Value::Text(name) = inside.next()? else { return Err(Malformed) };
            return Ok(tag(name));
        }
        inside.skip()?;
    }
    Err(Malformed)
}

/// What was read of one event.
#[derive(Default)]
struct Fields {
    blocks: Option<Vec<EngineHash>>,
    parent: Option<EngineHash>,
    tokens: Vec<u32>,
    block_tokens: Option<u32>,
    lora_id: bool,
    lora: Option<String>,
    salt: Option<String>,
    extra_keys: Vec<Keys>,
    medium: Option<String>,
    locality: Option<String>,
    kind: Option<String>,
    group: Option<u32>,
}

/// What besides its tokens went into one block's hash.
#[derive(Default)]
struct Keys {
    /// The adapter's name and the salt, without a word which is which.
    texts: Vec<String>,
    /// Something else: images by their hash and place, digests of embeddings.
    other: bool,
}

impl Fields {
    fn take(&mut self, name: &[u8], reader: &mut Reader<'_>) -> Result<(), Malformed> {
        match name {
            b"block_hashes" => self.blocks = Some(hashes(reader)?),
            b"parent_block_hash" => self.parent = hash(reader.next()?)?,
            b"token_ids" => self.tokens = tokens(reader)?,
            b"block_size" => self.block_tokens = u32::try_from(reader.unsigned()?).ok(),
            b"lora_id" => self.lora_id = reader.next()? != Value::Nil,
            b"lora_name" => self.lora = reader.text_or_nil()?,
            b"cache_salt" => self.salt = reader.text_or_nil()?,
            b"extra_keys" => {
                for _ in 0..reader.array_or_nil()?.unwrap_or(0) {
                    self.extra_keys.push(keys(reader)?);
                }
            }
            b"medium" => self.medium = reader.text_or_nil()?,
            b"locality" => self.locality = reader.text_or_nil()?,
            b"kv_cache_spec_kind" => self.kind = reader.text_or_nil()?,
            b"group_idx" => {
                self.group = match reader.next()? {
                    Value::Unsigned(group) => u32::try_from(group).ok(),
                    Value::Nil => None,
                    _ => return Err(Malformed),
                }
            }
            _ => reader.skip()?,
        }
        Ok(())
    }

    fn place(&self) -> Place {
        let on_gpu = self.medium.as_deref().is_none_or(|medium| medium == "GPU");
        let local = self.locality.as_deref() != Some("REMOTE");
        let full_attention = self.kind.as_deref().is_none_or(|kind| WHOLE_PREFIX.contains(&kind));
        Place { on_gpu: on_gpu && local, group: self.group, full_attention }
    }

    fn removed(self) -> Result<Removed, Malformed> {
        let place = self.place();
        Ok(Removed { blocks: self.blocks.ok_or(Malformed)?, place })
    }

    fn stored(self) -> Result<Stored, Malformed> {
        let place = self.place();
        let block_tokens = self.block_tokens.filter(|tokens| *tokens > 0).ok_or(Malformed)?;
        let blocks = self.blocks.ok_or(Malformed)?;
        let lora = self.lora.or_else(|| self.lora_id.then(String::new));
        let mut salt = self.salt;
        // Where blocks are left out (windows of attention), the tokens cannot be told apart.
        let aligned = blocks.len().checked_mul(block_tokens as usize) == Some(self.tokens.len());
        let mut plain = if aligned { blocks.len() } else { 0 };
        for (at, keys) in self.extra_keys.into_iter().enumerate().take(plain) {
            let mut texts = keys.texts;
            if let Some(named) = texts.iter().position(|text| Some(text) == lora.as_ref()) {
                texts.remove(named);
            }
            match texts.pop() {
                None if !keys.other => {}
                // The salt goes into the block that starts a prompt and into no other.
                Some(text) if !keys.other && texts.is_empty() && at == 0 && self.parent.is_none() => salt = Some(text),
                _ => plain = plain.min(at),
            }
        }
        let tokens = if aligned { self.tokens } else { Vec::new() };
        Ok(Stored { blocks, parent: self.parent, tokens, block_tokens, lora, salt, plain, place })
    }
}

fn hashes(reader: &mut Reader<'_>) -> Result<Vec<EngineHash>, Malformed> {
    let count = reader.array_or_nil()?.ok_or(Malformed)?;
    let mut found = Vec::with_capacity(count);
    for _ in 0..count {
        found.push(hash(reader.next()?)?.ok_or(Malformed)?);
    }
    Ok(found)
}

fn hash(value: Value<'_>) -> Result<Option<EngineHash>, Malformed> {
    match value {
        Value::Nil => Ok(None),
        Value::Unsigned(number) => Ok(Some(EngineHash(number))),
        Value::Negative(number) => Ok(Some(EngineHash(number.cast_unsigned()))),
        Value::Bytes(bytes) if !bytes.is_empty() => {
            let last = bytes.iter().rev().take(8).rev();
            Ok(Some(EngineHash(last.fold(0, |number, byte| number << 8 | u64::from(*byte)))))
        }
        _ => Err(Malformed),
    }
}

/// Token ids; none where one is no plain id (SGLang sends pairs for some speculative decoders).
fn tokens(reader: &mut Reader<'_>) -> Result<Vec<u32>, Malformed> {
    let mut inside = *reader;
    let count = inside.array_or_nil()?.unwrap_or(0);
    let mut found = Vec::with_capacity(count);
    for _ in 0..count {
        match inside.next()? {
            Value::Unsigned(id) if id <= u64::from(u32::MAX) => found.push(id as u32),
            _ => return reader.skip().map(|()| Vec::new()),
        }
    }
    *reader = inside;
    Ok(found)
}

fn keys(reader: &mut Reader<'_>) -> Result<Keys, Malformed> {
    let mut keys = Keys::default();
    for _ in 0..reader.array_or_nil()?.unwrap_or(0) {
        let mut ahead = *reader;
        reader.skip()?;
        match ahead.next()? {
            Value::Text(text) => keys.texts.push(String::from_utf8_lossy(text).into_owned()),
            _ => keys.other = true,
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests;
