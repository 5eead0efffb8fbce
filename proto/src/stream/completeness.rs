//! Whether a stream's answer is whole.

use smallvec::SmallVec;

use super::Delta;

/// Knows which choices have a finish reason. A stream that ends before all have one was cut, `[DONE]` or not.
#[derive(Debug, Clone)]
pub struct Completeness {
    choices: u32,
    /// A bit for each choice that has finished.
    finished: SmallVec<[u64; 2]>,
    left: u32,
}

impl Completeness {
    /// Of an answer with `choices` choices: the number of prompts times `n`.
    #[must_use]
    pub fn new(choices: u32) -> Self {
        let words = choices.div_ceil(u64::BITS) as usize;
        Self { choices, finished: SmallVec::from_elem(0, words), left: choices }
    }

    /// Takes note of a chunk. Choices nobody asked for do not count.
    pub fn observe(&mut self, delta: &Delta) {
        for choice in delta.choices.iter().filter(|choice| choice.finished && choice.index < self.choices) {
            let bit = 1 << (choice.index % u64::BITS);
            if let Some(word) = self.finished.get_mut((choice.index / u64::BITS) as usize)
                && *word & bit == 0
            {
                *word |= bit;
                self.left = self.left.saturating_sub(1);
            }
        }
    }

    /// Whether every choice has finished.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.left == 0
    }
}
