//! The `usage` object, and where it stands in a chunk.

use serde_json::Value;

use crate::peek::Span;

/// Tokens that an answer cost. Counts that are missing are 0, as in embeddings without completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    /// Of all choices together.
    pub completion_tokens: u64,
    /// Part of `prompt_tokens`. vLLM tells it only with `--enable-prompt-tokens-details`.
    pub cached_tokens: Option<u64>,
    /// Part of `completion_tokens`.
    pub reasoning_tokens: Option<u64>,
}

impl Usage {
    /// Reads a JSON object; None for any other value.
    pub(crate) fn read(json: &[u8]) -> Option<Self> {
        let Value::Object(usage) = serde_json::from_slice(json).ok()? else { return None };
        let detail = |group: &str, name: &str| count(usage.get(group)?.get(name)?);
        Some(Self {
            prompt_tokens: usage.get("prompt_tokens").and_then(count).unwrap_or(0),
            completion_tokens: usage.get("completion_tokens").and_then(count).unwrap_or(0),
            cached_tokens: detail("prompt_tokens_details", "cached_tokens"),
            reasoning_tokens: detail("completion_tokens_details", "reasoning_tokens"),
        })
    }
}

fn count(value: &Value) -> Option<u64> {
    // `as` saturates, negative counts become 0.
    value.as_u64().or_else(|| value.as_f64().map(|value| value as u64))
}

/// The span of the member whose value is `value`, a slice of `data`, together with one comma beside it.
pub(super) fn member(data: &[u8], value: &str) -> Option<Span> {
    let start = value.as_ptr().addr().checked_sub(data.as_ptr().addr())?;
    let end = start.checked_add(value.len())?;
    // Back over `"usage" :` to what stands before it. The key reads "usage", so no quote is within, however it is escaped.
    let before = data.get(..start)?.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end().strip_suffix(b"\"")?;
    let key = memchr::memrchr(b'"', before)?;
    let before = data.get(..key)?.trim_ascii_end();
    if before.ends_with(b",") {
        return Some(before.len() - 1..end);
    }
    let after = data.get(end..)?;
    let gap = after.len() - after.trim_ascii_start().len();
    let has_next = after.get(gap) == Some(&b',');
    Some(key..if has_next { end + gap + 1 } else { end })
}
