//! An engine's KV events in Forebay's own hashes.
//!
//! An engine's hash says nothing about the tokens under it (vLLM's default covers a Python pickle), so a block gets the
//! hash that its tokens have in a prompt, on top of its parent's. The engine's hash is kept to know the block again: as a
//! parent, and when it is removed.
//!
//! Invariants: a block that is told to the core can be taken back; the memory of one engine's blocks is bounded.
//! Deliberately left out, since no prompt could match: blocks with images, of an adapter that the pool does not serve,
//! in slower tiers, of layers that do not attend to the whole prefix, and all blocks behind such a one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use forebay_proto::kv_events::{EngineHash, Event, Place, Stored};
use forebay_scheduler::KvEvent;
use smallvec::SmallVec;

use crate::prepare::hashes::{Chain, seed};
use crate::routing::Adapter;

/// Blocks of one engine: 8 million tokens in blocks of 16, some 20 MB at the most.
const BLOCKS_MAX: usize = 1 << 19;
/// Groups of layers that one model may have.
const GROUPS_MAX: usize = 64;

/// One engine's blocks.
pub(super) struct Rehash {
    /// The name that prompts are hashed with.
    model: Arc<str>,
    known: HashMap<EngineHash, u64>,
    /// Groups of layers whose blocks do not count.
    partial_groups: SmallVec<[u32; 4]>,
    block_tokens: Option<u32>,
}

impl Rehash {
    pub(super) fn new(model: Arc<str>) -> Self {
        Self { model, known: HashMap::new(), partial_groups: SmallVec::new(), block_tokens: None }
    }

    /// Tokens in one of its blocks: what the first event said.
    pub(super) fn block_tokens(&self) -> Option<u32> {
        self.block_tokens
    }

    /// All blocks that it holds.
    pub(super) fn blocks(&self) -> Vec<u64> {
        self.known.values().copied().collect()
    }

    pub(super) fn forget(&mut self) {
        self.known.clear();
    }

    /// Takes events in, and gives what they mean, in order. `own` is the LoRA adapter that the pool's model is, by its name
    /// at the engine; `adapters` are those that the pool serves beside its model.
    pub(super) fn apply(&mut self, events: &[Event], (own, adapters): (Option<&str>, &[Adapter])) -> Vec<KvEvent> {
        let mut changes: Vec<KvEvent> = Vec::new();
        for event in events {
            match event {
                Event::Stored(stored) => {
                    let new = self.store(stored, (own, adapters));
                    match changes.last_mut() {
                        _ if new.is_empty() => {}
                        Some(KvEvent::Stored { blocks }) => blocks.extend(new),
                        _ => changes.push(KvEvent::Stored { blocks: new }),
                    }
                }
                Event::Removed(removed) if self.counts(removed.place) => {
                    let gone: Vec<u64> = removed.blocks.iter().filter_map(|hash| self.known.remove(hash)).collect();
                    match changes.last_mut() {
                        _ if gone.is_empty() => {}
                        Some(KvEvent::Removed { blocks }) => blocks.extend(gone),
                        _ => changes.push(KvEvent::Removed { blocks: gone }),
                    }
                }
                Event::Removed(_) => {}
                Event::Cleared => {
                    self.known.clear();
                    changes.push(KvEvent::Cleared);
                }
            }
        }
        changes
    }

    fn store(&mut self, stored: &Stored, (own, adapters): (Option<&str>, &[Adapter])) -> Vec<u64> {
        if let (Some(group), false) = (stored.place.group, stored.place.full_attention)
            && !self.partial_groups.contains(&group)
            && self.partial_groups.len() < GROUPS_MAX
        {
            self.partial_groups.push(group);
        }
        // The name of the model that prompts for it are hashed with.
        let named = |lora: &str| adapters.iter().find(|adapter| *adapter.name == *lora).map(|adapter| &adapter.name);
        let model = match stored.lora.as_deref() {
            lora if lora == own => &self.model,
            lora => match lora.and_then(named) {
                Some(name) => name,
                None => return Vec::new(),
            },
        };
        if !self.counts(stored.place) || *self.block_tokens.get_or_insert(stored.block_tokens) != stored.block_tokens {
            return Vec::new();
        }
        let start = match stored.parent {
            None => seed(model, stored.salt.as_deref()),
            Some(parent) => match self.known.get(&parent) {
                Some(hash) => *hash,
                None => return Vec::new(),
            },
        };
        let mut chain = Chain::after(start);
        let ids = stored.tokens.chunks_exact(stored.block_tokens.max(1) as usize);
        let mut new = Vec::new();
        for (engines, ids) in stored.blocks.iter().zip(ids).take(stored.plain) {
            let hash = chain.block(ids);
            let full = self.known.len() >= BLOCKS_MAX;
            match self.known.entry(*engines) {
                // Told again because it was used again.
                Entry::Occupied(known) if *known.get() == hash => {}
                Entry::Occupied(mut known) => {
                    known.insert(hash);
                    new.push(hash);
                }
                // What could not be taken back is not told, nor what stands behind it.
                Entry::Vacant(_) if full => break,
                Entry::Vacant(vacant) => {
                    vacant.insert(hash);
                    new.push(hash);
                }
            }
        }
        new
    }

    fn counts(&self, place: Place) -> bool {
        let partial = place.group.is_some_and(|group| self.partial_groups.contains(&group));
        place.on_gpu && place.full_attention && !partial
    }
}

#[cfg(test)]
mod tests;
