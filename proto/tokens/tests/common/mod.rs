//! What the tests share: finding the shared test data, tokenizers trained on the spot, and random text.

#![allow(dead_code, reason = "no test binary uses all of it")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a helper of tests fails as they do")]

pub(crate) mod text;
pub(crate) mod trained;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use forebay_tokens::{Parts, Tokenizer};
use serde_json::Value;

/// The tokenizers of the shared data.
pub(crate) const TOKENIZERS: [&str; 6] = ["gpt2", "smollm2", "qwen3", "deepseek-v3", "mistral-v3-spm", "minilm"];

/// A folder of the shared data: `$FOREBAY_SHARED_DIR`, else `../shared` beside the checkout. Where it is absent, says
/// so, and the test passes over.
pub(crate) fn shared(folder: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = std::env::var_os("FOREBAY_SHARED_DIR").map_or_else(beside, PathBuf::from).join(folder);
    if !path.is_dir() {
        println!("skipped: {} not found", path.display());
        return None;
    }
    Some(path)
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub(crate) fn lines(path: &Path) -> Vec<Value> {
    read(path).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The `tokenizer.json` of one of [`TOKENIZERS`].
pub(crate) fn tokenizer_json(shared: &Path, name: &str) -> Vec<u8> {
    let dir = shared.join(name);
    let Ok(packed) = std::fs::read(dir.join("tokenizer.json.gz")) else {
        return std::fs::read(dir.join("tokenizer.json")).unwrap();
    };
    let mut json = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut json).unwrap();
    json
}

/// One of [`TOKENIZERS`], from its directory or its compressed file.
pub(crate) fn tokenizer(shared: &Path, name: &str) -> Tokenizer {
    if shared.join(name).join("tokenizer.json").is_file() {
        return Tokenizer::from_dir(&shared.join(name)).unwrap();
    }
    Tokenizer::from_parts(&Parts { tokenizer: &tokenizer_json(shared, name), ..Parts::default() }).unwrap()
}
