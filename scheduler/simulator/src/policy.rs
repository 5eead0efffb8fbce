//! The policies that can be compared: the scheduler, and its rivals.

use crate::rivals::{self, Router};

/// A way to place requests.
#[derive(Clone, Copy)]
pub struct Policy {
    name: &'static str,
    /// None: the scheduler itself.
    pub(crate) rival: Option<MakeRouter>,
}

pub(crate) type MakeRouter = fn(&rivals::Setup) -> Box<dyn Router>;

macro_rules! policies {
    ($($name:literal => $router:path),+ $(,)?) => {
        const POLICIES: &[Policy] = &[
            Policy { name: "forebay", rival: None },
            $(Policy { name: $name, rival: Some(|setup| Box::new(<$router>::new(setup))) }),+
        ];
    };
}

policies! {
    "round-robin" => rivals::round_robin::RoundRobin,
    "least-requests" => rivals::least_requests::LeastRequests,
    "power-of-two" => rivals::power_of_two::PowerOfTwo,
    "least-tokens" => rivals::least_tokens::LeastTokens,
    "bounded-hash" => rivals::bounded_hash::BoundedHash,
    "radix-threshold" => rivals::radix_threshold::RadixThreshold,
    "weighted-223" => rivals::weighted_223::Weighted223,
    "linear-cost" => rivals::linear_cost::LinearCost,
}

impl Policy {
    /// All of them, the scheduler first.
    #[must_use]
    pub fn all() -> &'static [Self] {
        POLICIES
    }

    /// The one of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        POLICIES.iter().find(|policy| policy.name == name).copied()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}
