//! Where a model's tokenizer lies: a directory, or `hf:org/name` in the local cache of the Hugging Face hub.
//!
//! Not here: downloading, and reading what is in the directory beyond that `tokenizer.json` is there.

use std::path::{Path, PathBuf};

use super::read::{Environment, read_bounded};
use super::tree::Refusal;

/// The file that makes a directory a tokenizer.
const FILE: &str = "tokenizer.json";

pub(super) fn directory(text: &str, environment: &Environment) -> Result<PathBuf, Refusal> {
    if let Some(repository) = text.strip_prefix("hf:") {
        return environment.cached_tokenizer(repository).ok_or_else(|| {
            let remedy = "must be hf:org/name of a repository in the local cache with its tokenizer.json: fetch it with \
                          `hf download org/name`, or write the path of a directory";
            Refusal::new(remedy)
        });
    }
    let path = PathBuf::from(text);
    if !path.is_dir() {
        return Err(Refusal::new("must be a directory that exists, or hf:org/name"));
    }
    if !path.join(FILE).is_file() {
        return Err(Refusal::new("must be a directory that holds tokenizer.json"));
    }
    Ok(path)
}

/// A directory with the tokenizer of a hub repository (`org/name`), where this machine's cache holds one.
#[must_use]
pub fn in_hub_cache(repository: &str) -> Option<PathBuf> {
    Environment::of_process().cached_tokenizer(repository)
}

impl Environment {
    /// The snapshot of a hub repository (`org/name`) in the local cache that holds a tokenizer: what the branch `main`
    /// points at, else the newest. Layout: `models--org--name/{refs/main,snapshots/<commit>/}`, as `huggingface_hub`
    /// keeps it, under `HF_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`.
    pub(super) fn cached_tokenizer(&self, repository: &str) -> Option<PathBuf> {
        let part = |text: &str| !text.is_empty() && !text.starts_with('.') && text.bytes().all(is_repository_byte);
        if repository.split('/').count() > 2 || !repository.split('/').all(part) {
            return None;
        }
        let repository = self.hub_cache()?.join(format!("models--{}", repository.replace('/', "--")));
        let snapshots = repository.join("snapshots");
        main_snapshot(&repository, &snapshots).or_else(|| newest_snapshot(&snapshots))
    }

    fn hub_cache(&self) -> Option<PathBuf> {
        let set = |name| self.get(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        set("HF_HUB_CACHE")
            .or_else(|| Some(set("HF_HOME")?.join("hub")))
            .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface/hub")))
            .or_else(|| Some(set("HOME")?.join(".cache/huggingface/hub")))
    }
}

fn is_repository_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

fn main_snapshot(repository: &Path, snapshots: &Path) -> Option<PathBuf> {
    let commit = read_bounded(&repository.join("refs/main"), 256).ok()?;
    let commit = std::str::from_utf8(commit.trim_ascii()).ok()?;
    let snapshot = snapshots.join(commit);
    (!commit.is_empty() && snapshot.join(FILE).is_file()).then_some(snapshot)
}

fn newest_snapshot(snapshots: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(snapshots).ok()?.filter_map(Result::ok);
    let dated = entries.filter_map(|entry| {
        let path = entry.path();
        let modified = path.join(FILE).metadata().ok()?.modified().ok()?;
        Some((modified, path))
    });
    dated.max().map(|(_, path)| path)
}
