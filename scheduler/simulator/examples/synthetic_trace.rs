//! Makes the synthetic trace that ships with the project, from its seed:
//!
//! ```text
//! cargo run -p forebay-simulator --example synthetic_trace | gzip -9n > tests/fixtures/traces/synthetic.jsonl.gz
//! ```
//!
//! Five tenants of different size and habit hold conversations of several turns. A tenant's conversations share its
//! system prompt; a turn's prompt is the turn before, its answer and a new message. Sessions begin as a Poisson process,
//! but for one tenant whose sessions come in bursts. Lengths are log-normal. Tokens do not exist, only block ids, chained
//! as in published traces: an id stands for its block and all before it.

use std::collections::BTreeMap;

/// Tokens in a block.
pub(crate) const BLOCK_TOKENS: u32 = 64;
/// The seed of the trace that ships.
pub(crate) const SEED: u64 = 20_260_501;
const MINUTES: f64 = 15.0;
/// The longest prompt; a conversation that would exceed it is over.
const PROMPT_MAX: u32 = 12_000;

/// Who calls, and how.
struct Tenant {
    name: &'static str,
    sessions_per_minute: f64,
    /// Sessions that begin together.
    burst: u32,
    system_tokens: u32,
    turns_mean: f64,
    message_tokens: f64,
    output_tokens: f64,
}

const TENANTS: [Tenant; 5] = [
    Tenant {
        name: "assistant",
        sessions_per_minute: 9.0,
        burst: 1,
        system_tokens: 1100,
        turns_mean: 4.0,
        message_tokens: 120.0,
        output_tokens: 260.0,
    },
    Tenant {
        name: "support",
        sessions_per_minute: 5.0,
        burst: 1,
        system_tokens: 2600,
        turns_mean: 3.0,
        message_tokens: 60.0,
        output_tokens: 140.0,
    },
    Tenant {
        name: "agents",
        sessions_per_minute: 1.2,
        burst: 3,
        system_tokens: 3900,
        turns_mean: 9.0,
        message_tokens: 500.0,
        output_tokens: 90.0,
    },
    Tenant {
        name: "search",
        sessions_per_minute: 7.0,
        burst: 1,
        system_tokens: 350,
        turns_mean: 1.0,
        message_tokens: 2200.0,
        output_tokens: 180.0,
    },
    Tenant {
        name: "essays",
        sessions_per_minute: 1.0,
        burst: 1,
        system_tokens: 90,
        turns_mean: 2.0,
        message_tokens: 300.0,
        output_tokens: 900.0,
    },
];

struct Chance(u64);

impl Chance {
    /// SplitMix64.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -(1.0 - self.unit()).ln() * mean
    }

    /// Median `median`, two thirds within a factor of two of it; at least 1.
    fn tokens(&mut self, median: f64) -> u32 {
        let normal = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (self.unit() * std::f64::consts::TAU).cos();
        (median * (normal * std::f64::consts::LN_2).exp()).clamp(1.0, 8000.0) as u32
    }
}

/// The trace as text, one JSON object a line.
pub(crate) fn generate(seed: u64) -> String {
    let mut chance = Chance(seed);
    let mut next_id = 0_u64;
    // Rows without their time, by arrival; the number keeps those of one moment in their order.
    let mut rows: BTreeMap<(u64, usize), String> = BTreeMap::new();
    for tenant in &TENANTS {
        let system: Vec<u64> = (0..tenant.system_tokens / BLOCK_TOKENS).map(|at| next_id + u64::from(at)).collect();
        next_id += system.len() as u64;
        let mut at = 0.0;
        for number in 0.. {
            at += chance.exponential(60.0 / tenant.sessions_per_minute * f64::from(tenant.burst));
            if at > MINUTES * 60.0 {
                break;
            }
            for member in 0..tenant.burst {
                let session = format!("{}-{number}-{member}", tenant.name);
                converse(tenant, &session, at, &system, (&mut chance, &mut next_id), &mut rows);
            }
        }
    }
    let first = rows.keys().next().map_or(0, |(t_ms, _)| *t_ms);
    rows.into_iter().map(|((t_ms, _), row)| format!("{{\"t_ms\":{},{row}}}\n", t_ms - first)).collect()
}

fn converse(
    tenant: &Tenant,
    session: &str,
    mut at: f64,
    system: &[u64],
    (chance, next_id): (&mut Chance, &mut u64),
    rows: &mut BTreeMap<(u64, usize), String>,
) {
    let mut known = system.to_vec();
    let mut prompt = tenant.system_tokens;
    loop {
        prompt += chance.tokens(tenant.message_tokens);
        let output = chance.tokens(tenant.output_tokens);
        if prompt > PROMPT_MAX || at > MINUTES * 60.0 {
            return;
        }
        let full = (prompt / BLOCK_TOKENS) as usize;
        while known.len() < full {
            known.push(*next_id);
            *next_id += 1;
        }
        let mut ids: Vec<String> = known.iter().map(u64::to_string).collect();
        if !prompt.is_multiple_of(BLOCK_TOKENS) {
            // A block that is not full is like no other.
            ids.push(next_id.to_string());
            *next_id += 1;
        }
        let t_ms = (at * 1000.0) as u64;
        let row = format!(
            "\"in_tokens\":{prompt},\"out_tokens\":{output},\"hash_ids\":[{}],\"tenant\":\"{}\",\"session\":\"{session}\"",
            ids.join(","),
            tenant.name
        );
        rows.insert((t_ms, rows.len()), row);
        if chance.unit() > 1.0 - 1.0 / tenant.turns_mean {
            return;
        }
        prompt += output;
        // The answer is read, or acted on, and answered.
        at += f64::from(output) * 0.02 + chance.exponential(12.0);
    }
}

#[cfg_attr(test, expect(dead_code, reason = "the test that compares the shipped trace wants `generate` only"))]
fn main() {
    print!("{}", generate(SEED));
}
