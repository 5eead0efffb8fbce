//! What the hashes of blocks stand for, as long as a sequence that may store them is in the engine.

use std::{collections::HashMap, sync::Arc};

/// The full blocks of one sequence, prompt and answer.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// Chained hashes.
    pub(crate) blocks: Vec<u64>,
    /// Token ids of all blocks.
    pub(crate) ids: Vec<u32>,
    pub(crate) salt: Option<String>,
    /// The LoRA adapter that computed them.
    pub(crate) adapter: Option<String>,
}

/// One block of a content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    pub(super) hash: u64,
    pub(super) parent: Option<u64>,
    pub(super) ids: &'a [u32],
    /// Only of the first block.
    pub(super) salt: Option<&'a str>,
    pub(super) adapter: Option<&'a str>,
}

/// Contents of the sequences that are in the engine.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    blocks: HashMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    sequences: u32,
    content: Arc<Content>,
    at: usize,
}

impl Contents {
    pub(crate) fn enter(&mut self, content: &Arc<Content>) {
        for (at, hash) in content.blocks.iter().enumerate() {
            let fresh = || Known { sequences: 0, content: Arc::clone(content), at };
            self.blocks.entry(*hash).or_insert_with(fresh).sequences += 1;
        }
    }

    pub(crate) fn leave(&mut self, content: &Content) {
        for hash in &content.blocks {
            if let Some(known) = self.blocks.get_mut(hash) {
                known.sequences -= 1;
                if known.sequences == 0 {
                    self.blocks.remove(hash);
                }
            }
        }
    }

    pub(super) fn block(&self, hash: u64, block_tokens: u32) -> Option<Block<'_>> {
        let Known { content, at, .. } = self.blocks.get(&hash)?;
        let size = block_tokens.max(1) as usize;
        Some(Block {
            hash,
            parent: at.checked_sub(1).and_then(|before| content.blocks.get(before)).copied(),
            ids: content.ids.get(at * size..(at + 1) * size)?,
            salt: content.salt.as_deref().filter(|_| *at == 0),
            adapter: content.adapter.as_deref(),
        })
    }
}
