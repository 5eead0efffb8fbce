//! Rolling hashes of a prompt's KV blocks.
//!
//! Block i's hash covers every token up to its end, so that equal hashes mean equal prefixes. The seed covers the
//! model's name and the client's `cache_salt`, since engines share no blocks across either. A collision costs a
//! wrong guess about a cache, nothing else, so a fast hash (XXH3, 64 bits) is enough.

use std::sync::Arc;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// One hash a full block of `block_tokens` ids.
pub(super) fn blocks(ids: &[u32], block_tokens: u32, model: &str, cache_salt: Option<&str>) -> Arc<[u64]> {
    let block = block_tokens.max(1) as usize;
    let mut rolling = xxh3_64(model.as_bytes());
    if let Some(salt) = cache_salt {
        let mut hasher = Xxh3::with_seed(rolling);
        hasher.update(b"salt");
        hasher.update(salt.as_bytes());
        rolling = hasher.digest();
    }
    let mut bytes = Vec::with_capacity(block * 4);
    ids.chunks_exact(block)
        .map(|chunk| {
            bytes.clear();
            chunk.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
            rolling = xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, rolling);
            rolling
        })
        .collect()
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
    fn model_and_salt_separate_prefixes() {
        let ids: Vec<u32> = (0..16).collect();
        let of = |model, salt| blocks(&ids, 16, model, salt)[0];
        assert_ne!(of("m", None), of("n", None));
        assert_ne!(of("m", None), of("m", Some("a")));
        assert_ne!(of("m", Some("a")), of("m", Some("b")));
    }
}
