//! Tokenizers by directory, loaded once, with one cache of tokenized text for all of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forebay_tokens::{Cache, LoadError, Tokenizer};

use crate::config;

/// Bytes that tokenized text may be remembered in, over all models.
const CACHE_BYTES_MAX: usize = 256 << 20;

#[derive(Clone)]
pub(super) struct Tokenizers {
    loaded: HashMap<PathBuf, Arc<Tokenizer>>,
    cache: Arc<Cache>,
}

impl Default for Tokenizers {
    fn default() -> Self {
        Self { loaded: HashMap::new(), cache: Arc::new(Cache::new(CACHE_BYTES_MAX)) }
    }
}

impl Tokenizers {
    pub(super) fn get(&self, directory: &Path) -> Option<Arc<Tokenizer>> {
        self.loaded.get(directory).cloned()
    }

    pub(super) fn keep_only(&mut self, directories: &[PathBuf]) {
        self.loaded.retain(|directory, _| directories.contains(directory));
    }

    /// Loads a directory's tokenizer unless it is loaded; up to half a second of work.
    pub(super) fn load(&mut self, directory: &Path) -> Result<(), LoadError> {
        if !self.loaded.contains_key(directory) {
            let tokenizer = Tokenizer::from_dir(directory)?.with_cache(Arc::clone(&self.cache));
            self.loaded.insert(directory.to_owned(), Arc::new(tokenizer));
        }
        Ok(())
    }
}

/// The tokenizer of a model that a worker serves from `root`: a directory that this machine has too, else a name in
/// the local hub cache.
pub(super) fn find(root: &str) -> Option<Arc<Tokenizer>> {
    let directory =
        Some(PathBuf::from(root)).filter(|path| path.is_absolute() && path.join("tokenizer.json").is_file());
    let directory = directory.or_else(|| config::in_hub_cache(root))?;
    match Tokenizer::from_dir(&directory) {
        Ok(tokenizer) => Some(Arc::new(tokenizer)),
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "a tokenizer was found but cannot be loaded");
            None
        }
    }
}
