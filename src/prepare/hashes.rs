//! Rolling hashes of KV blocks: of a prompt's, and of those that an engine says it holds.
//!
//! Block i's hash covers every token up to its end, so that equal hashes mean equal prefixes. The seed covers the
//! model's name and the client's `cache_salt`, since engines share no blocks across either. A collision costs a
//! wrong guess about a cache, nothing else, so a fast hash (XXH3, 64 bits) is enough.

use std::sync::Arc;

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// Where the hashes of prompts to `model` begin.
#[must_use]
pub fn seed(model: &str, cache_salt: Option<&str>) -> u64 {
    let plain = xxh3_64(model.as_bytes());
    let Some(salt) = cache_salt else { return plain };
    let mut hasher = Xxh3::with_seed(plain);
    hasher.update(b"salt");
    hasher.update(salt.as_bytes());
    hasher.digest()
}

/// Hashes of blocks that follow each other.
pub struct Chain {
    rolling: u64,
    bytes: Vec<u8>,
}

impl Chain {
    /// Goes on after the block with this hash, or begins with a [`seed`].
    #[must_use]
    pub fn after(hash: u64) -> Self {
        Self { rolling: hash, bytes: Vec::new() }
    }

    /// The hash of the next block, which has these tokens.
    pub fn block(&mut self, ids: &[u32]) -> u64 {
        self.bytes.clear();
        ids.iter().for_each(|id| self.bytes.extend_from_slice(&id.to_le_bytes()));
        self.rolling = xxh3_64_with_seed(&self.bytes, self.rolling);
        self.rolling
    }
}

/// One hash a full block of `block_tokens` ids.
pub(super) fn blocks(ids: &[u32], block_tokens: u32, model: &str, cache_salt: Option<&str>) -> Arc<[u64]> {
    let mut chain = Chain::after(seed(model, cache_salt));
    ids.chunks_exact(block_tokens.max(1) as usize).map(|block| chain.block(block)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_have_equal_hashes_and_a_change_shows_from_its_block_on() {
        let ids: Vec<u32> = (0..100).collect();
        let mut other = ids.clone();
        other[40] = 7;
        let (a, b) = (blocks(&ids, 16, "m", None), blocks(&other, 16, "m", None));
        assert_eq!(a.len(), 6, "only full blocks count");
        assert_eq!(a[..2], b[..2]);
        assert!(a[2..].iter().zip(&b[2..]).all(|(x, y)| x != y));
    }

    #[test]
    fn a_chain_may_be_cut_and_taken_up_again() {
        let ids: Vec<u32> = (0..64).collect();
        let whole = blocks(&ids, 16, "m", Some("s"));
        let mut rest = Chain::after(whole[1]);
        assert_eq!([rest.block(&ids[32..48]), rest.block(&ids[48..])], whole[2..]);
    }

    #[test]
    fn model_and_salt_separate_prefixes() {
        let ids: Vec<u32> = (0..16).collect();
        let of = |model, salt| blocks(&ids, 16, model, salt)[0];
        assert_ne!(of("m", None), of("n", None));
        assert_ne!(of("m", None), of("m", Some("a")));
        assert_ne!(of("m", Some("a")), of("m", Some("b")));
    }
}
