//! What a worker is for, and which part of a request it gets: engines that hand their KV cache to one another compute a
//! prompt at one worker and generate at another, so that long prompts hold up nobody's tokens.
//!
//! Not here: when that is done and with whom (`core::pairs`).

/// What a worker is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Role {
    /// Whole requests.
    #[default]
    Both,
    /// Prompts, whose cache a worker for [`Role::Decode`] fetches.
    Prefill,
    /// What comes after the prompt; whole requests where that is better, or nobody is there for their prompts.
    Decode,
}

impl Role {
    /// Every role by the name that users give it.
    pub const NAMES: [(&str, Self); 3] = [("both", Self::Both), ("prefill", Self::Prefill), ("decode", Self::Decode)];
}

/// What of a request is done at a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Leg {
    /// All of it.
    #[default]
    Whole,
    /// Its prompt.
    Prefill,
    /// Its output, with the cache that another worker computed.
    Decode,
}

impl Leg {
    /// Whether a worker of this role does it.
    #[must_use]
    pub fn fits(self, role: Role) -> bool {
        match self {
            Self::Whole => role != Role::Prefill,
            Self::Prefill => role == Role::Prefill,
            Self::Decode => role == Role::Decode,
        }
    }
}
