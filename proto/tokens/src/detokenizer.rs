//! Text from ids that come one at a time.
//!
//! A character may span several tokens, and how a token is written may depend on the one before it. So a few ids are
//! decoded with and without the new ones, and the difference is the new text, once it ends in whole characters: the
//! way vLLM does it (`detokenize_incrementally`).
//!
//! Invariants: the texts given out, with what [`Detokenizer::finish`] gives, are the text of the whole; a few ids are
//! held, however long the stream; nothing waits for more than [`WAITING_MAX`] ids.

use std::sync::Arc;

use crate::error::Error;
use crate::tokenizer::{Special, Tokenizer};

/// Ids that may wait for a character to become whole. A character has at most four bytes, so more than four tokens of
/// broken bytes are no beginning of anything; a few more let a run of them come out together.
const WAITING_MAX: usize = 8;

/// Ids of the prompt that are kept as context: what vLLM keeps, too.
const CONTEXT: usize = 5;

/// The text of one sequence's ids, piece by piece.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    special: Special,
    /// Context first, then ids whose text has not been given out.
    ids: Vec<u32>,
    /// How many of `ids` are context.
    context: usize,
    /// The text of the context, as far as it was given out.
    prefix: String,
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], special: Special) -> Self {
        let ids = prompt.get(prompt.len().saturating_sub(CONTEXT)..).unwrap_or_default().to_vec();
        let prefix = tokenizer.decode(&ids, special).unwrap_or_default();
        Self { tokenizer, special, context: ids.len(), ids, prefix }
    }

    /// Takes the next id and gives the text that became certain with it; often one word, sometimes nothing.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        if self.tokenizer.is_silent(id, self.special) {
            return Ok(String::new());
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.special)?;
        match text.strip_suffix(char::REPLACEMENT_CHARACTER) {
            None => self.give_out(&text, &text),
            Some(_) if self.ids.len() - self.context <= WAITING_MAX => Ok(String::new()),
            // only the last of them can still become a character
            Some(certain) => self.give_out(certain, &text),
        }
    }

    /// Gives out what still waits: the replacement characters of bytes that never became whole.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String, Error> {
        let text = self.tokenizer.decode(&self.ids, self.special)?;
        self.give_out(&text, &text)
    }

    /// Gives out what is new in `certain`, the beginning of `text`, which is the text of all ids held.
    fn give_out(&mut self, certain: &str, text: &str) -> Result<String, Error> {
        let new = certain.get(common(&self.prefix, certain)..).unwrap_or_default().to_owned();
        if new.is_empty() {
            // at the start of a text a token may have none of its own and yet decide about the next one's
            if self.ids.len() - self.context > WAITING_MAX {
                self.ids.pop();
            }
            return Ok(new);
        }
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        self.prefix = self.tokenizer.decode(&self.ids, self.special)?;
        if certain.len() < text.len() {
            self.prefix.pop();
        }
        Ok(new)
    }
}

/// Bytes that both texts begin with, in whole characters. A decoder that tidies up may rewrite what it wrote before,
/// which cannot be taken back.
fn common(one: &str, other: &str) -> usize {
    if other.starts_with(one) {
        return one.len();
    }
    one.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
