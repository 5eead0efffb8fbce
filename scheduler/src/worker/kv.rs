//! How full a worker's KV cache will become with what was sent to it.
//!
//! Adding up prompts and whole expected outputs would leave much of the memory unused: sequences grow together but end
//! one by one. What counts is the peak: with `n` sequences that hold `c` tokens each on average and have `r` more to
//! generate, use rises by `n` a step and falls as they end. For ends that fall together, evenly over `2 r`, or at random
//! (exponentially), the peak is
//!
//! ```text
//! n (c + r)        n (2 r + c)^2 / (8 r)  if c < 2 r, else n c        n r exp(c / r - 1)  if c < r, else n c
//! ```
//!
//! (the maxima of `n (c + x)` while all last, `n (c + x) (1 - x / 2r)` and `n (c + x) exp(-x / r)`), and in between by how
//! wide the ends spread: 0, 1/3 and 1 are their squared coefficients of variation. Progress is known from when each
//! sequence began and how long a token takes there; everything is kept as sums, so that a decision costs nothing more
//! with more sequences.
//!
//! Invariant: the sums are those of what was added and not taken away, exactly (whole numbers).
//! Not here: what the engine says (`load`), which corrects this account.

use crate::Tick;
use crate::outputs::Plan;

/// Most KV tokens counted for one request where the capacity is not known; keeps sums in range.
const NEED_MAX: u64 = 1 << 32;
/// Largest variance counted of one request; keeps sums in range.
const VARIANCE_MAX: u64 = 1 << 42;
/// What is left to expect of a sequence that outlived its expectation, as part of it.
const REST_MIN: f64 = 0.1;

/// What was sent to a worker, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Held {
    sequences: u64,
    prompt_tokens: u64,
    /// Expected output.
    output_tokens: u64,
    /// Variance of that.
    variance: u64,
    /// Sequences that generate.
    started: u64,
    /// Sum over these of the milliseconds at which they began, and of their squares. They wrap: what is read from them
    /// are sums of ages and of their squares, which are exact as long as these are in range (as of thousands of
    /// sequences that generate for a day).
    started_ms: u64,
    started_ms_squares: u64,
}

impl Held {
    /// A request in a cache of `capacity` tokens in blocks of `block_tokens`: at most what there is.
    pub(crate) fn new(plan: &Plan, block_tokens: u32, capacity: Option<u64>) -> Self {
        let most = capacity.unwrap_or(NEED_MAX).min(NEED_MAX);
        let prompt_tokens = u64::from(plan.prompt_tokens).min(most);
        let output_tokens = plan.output_tokens.min(most - prompt_tokens);
        let tokens = (prompt_tokens + output_tokens).next_multiple_of(u64::from(block_tokens.max(1))).min(most);
        Self {
            sequences: u64::from(plan.sequences),
            prompt_tokens: tokens - output_tokens,
            output_tokens,
            variance: plan.variance.min(VARIANCE_MAX),
            ..Self::default()
        }
    }

    /// The same request, generating since `now`.
    pub(crate) fn started(self, now: Tick) -> Self {
        let millis = now.0 / 1000;
        let started_ms = self.sequences.wrapping_mul(millis);
        Self { started: self.sequences, started_ms, started_ms_squares: started_ms.wrapping_mul(millis), ..self }
    }

    pub(crate) fn plus(self, more: Self) -> Self {
        Self {
            sequences: self.sequences + more.sequences,
            prompt_tokens: self.prompt_tokens + more.prompt_tokens,
            output_tokens: self.output_tokens + more.output_tokens,
            variance: self.variance + more.variance,
            started: self.started + more.started,
            started_ms: self.started_ms.wrapping_add(more.started_ms),
            started_ms_squares: self.started_ms_squares.wrapping_add(more.started_ms_squares),
        }
    }

    pub(crate) fn minus(self, less: Self) -> Self {
        Self {
            sequences: self.sequences.saturating_sub(less.sequences),
            prompt_tokens: self.prompt_tokens.saturating_sub(less.prompt_tokens),
            output_tokens: self.output_tokens.saturating_sub(less.output_tokens),
            variance: self.variance.saturating_sub(less.variance),
            started: self.started.saturating_sub(less.started),
            started_ms: self.started_ms.wrapping_sub(less.started_ms),
            started_ms_squares: self.started_ms_squares.wrapping_sub(less.started_ms_squares),
        }
    }

    /// Prompts and whole expected outputs.
    pub(crate) fn tokens(&self) -> u64 {
        self.prompt_tokens + self.output_tokens
    }

    pub(crate) fn sequences(&self) -> u64 {
        self.sequences
    }

    /// Tokens in the cache now, when a token takes `token_seconds`: prompts in full, and what was generated since.
    pub(crate) fn now(&self, now: Tick, token_seconds: f64) -> f64 {
        self.prompt_tokens as f64 + self.generated(now, token_seconds).0
    }

    /// Most tokens that will be in the cache. `beyond`: what is there now besides, or not there after all.
    /// `deviations`: how many standard deviations of the outputs' sum to add.
    pub(crate) fn peak(&self, now: Tick, token_seconds: f64, beyond: f64, deviations: f64) -> f64 {
        let n = self.sequences as f64;
        let (generated, squares) = self.generated(now, token_seconds);
        let used = (self.prompt_tokens as f64 + generated + beyond).max(0.0);
        if n < 1.0 || self.output_tokens == 0 {
            return used;
        }
        let each = 1.0 / n;
        let (mean, variance) = (self.output_tokens as f64 * each, self.variance as f64 * each);
        // what is exactly known shortens with every token; what is random (exponential) is always as long as at first
        let random = (variance / (mean * mean)).min(1.0);
        let progress = generated * each;
        let rest = ((mean - progress) * (1.0 - random) + mean * random).max(mean * REST_MIN).max(1.0);
        let spread = (variance + (squares * each - progress * progress).max(0.0)) / (rest * rest);
        let peak = n * peak_each(used * each, rest, spread.min(1.0));
        let sure = (peak - used) / (n * rest);
        peak + deviations * (self.variance as f64).sqrt() * sure.clamp(0.0, 1.0)
    }

    /// Tokens generated until now, and the sum of their squares by sequence.
    fn generated(&self, now: Tick, token_seconds: f64) -> (f64, f64) {
        let now_ms = now.0 / 1000;
        let passed = self.started.wrapping_mul(now_ms).wrapping_sub(self.started_ms);
        // the sum of (now - begin)^2, from the sums of begin and of its square, in whole numbers
        let squares = now_ms.wrapping_mul(passed.wrapping_sub(self.started_ms)).wrapping_add(self.started_ms_squares);
        // below 0 only where the clock is behind
        let [passed, squares] = [passed, squares].map(|sum| (sum as i64).max(0));
        let per_ms = 1.0 / (token_seconds.max(1e-6) * 1e3);
        let mut generated = passed as f64 * per_ms;
        let expected = self.output_tokens as f64;
        if generated > expected {
            // the pace is a mean; what cannot be expected to have been generated was not
            generated = generated.min(expected + 3.0 * (self.started as f64 * self.variance as f64).sqrt());
        }
        (generated, squares as f64 * per_ms * per_ms)
    }
}

/// The peak for one sequence of many that hold `c` tokens and have `r` to come, where `spread` is the squared coefficient
/// of variation of when they end.
fn peak_each(c: f64, r: f64, spread: f64) -> f64 {
    const EVEN: f64 = 1.0 / 3.0;
    let evenly = if c < 2.0 * r { (2.0 * r + c) * (2.0 * r + c) / (8.0 * r) } else { c };
    if spread < EVEN {
        let together = c + r;
        together + (evenly - together) * spread / EVEN
    } else {
        let at_random = if c < r { r * (c / r - 1.0).exp() } else { c };
        evenly + (at_random - evenly) * (spread - EVEN) / (1.0 - EVEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Leg;

    const TOKEN: f64 = 0.02;

    fn plan(prompt_tokens: u32, output: u64, variance: u64) -> Plan {
        Plan {
            leg: Leg::Whole,
            prompt_tokens,
            sequences: 1,
            output_each: output as f64,
            output_tokens: output,
            variance,
        }
    }

    fn at(seconds: f64) -> Tick {
        Tick((seconds * 1e6) as u64)
    }

    /// `count` requests of which one began each `every` seconds until `now`.
    fn held(count: u32, of: &Plan, every: f64, now: f64) -> Held {
        let begun = |i: u32| Held::new(of, 16, None).started(at(now - every * f64::from(count - 1 - i)));
        (0..count).map(begun).fold(Held::default(), Held::plus)
    }

    #[test]
    fn equal_outputs_that_began_together_all_grow_to_the_end() {
        let all = held(10, &plan(592, 1008, 0), 0.0, 100.0);
        assert_eq!(all.tokens(), 16_000);
        assert_eq!(all.peak(at(100.0), TOKEN, 0.0, 2.0), 16_000.0);
        assert_eq!(all.now(at(110.0), TOKEN), 5920.0 + 10.0 * 500.0);
        assert!((all.peak(at(110.0), TOKEN, 0.0, 2.0) - 16_000.0).abs() < 1.0, "as they grow, the end stays");
    }

    /// Against a plain simulation of the same sequences.
    #[test]
    fn what_began_one_by_one_peaks_lower() {
        for (count, prompt, output, every) in [(50, 100, 1000, 0.4), (50, 2000, 1000, 0.4), (20, 500, 3000, 1.0)] {
            let now = 1000.0;
            let of = plan(prompt, output, 0);
            let all = held(count, &of, every, now);
            let most = (0..(output * 2))
                .map(|step| {
                    let live = (0..count).filter_map(|i| {
                        let generated = f64::from(count - 1 - i) * every / TOKEN + step as f64;
                        (generated < output as f64).then_some(f64::from(prompt) + generated)
                    });
                    live.sum::<f64>()
                })
                .fold(0.0, f64::max);
            let peak = all.peak(at(now), TOKEN, 0.0, 0.0);
            assert!((0.8..1.25).contains(&(peak / most)), "{count} {prompt} {output}: {peak} against {most}");
        }
    }

    #[test]
    fn random_outputs_peak_lower_still_and_never_below_what_is_there() {
        let now = 1000.0;
        let of = |variance| plan(100, 1000, variance);
        let peaks =
            [0, 333_333, 1_000_000].map(|variance| held(50, &of(variance), 0.2, now).peak(at(now), TOKEN, 0.0, 0.0));
        assert!(peaks.is_sorted_by(|a, b| a > b), "{peaks:?}");
        let full = held(50, &of(1_000_000), 0.2, now);
        assert!(peaks[2] >= full.now(at(now), TOKEN));
        assert!(full.peak(at(now), TOKEN, 0.0, 2.0) > peaks[2], "deviations keep some free");
        assert_eq!(held(5, &plan(3000, 1000, 1_000_000), 0.0, now).peak(at(now), TOKEN, 0.0, 0.0), 5.0 * 3000.0);
    }

    #[test]
    fn sums_are_exact_and_anything_is_finite() {
        let (a, b) = (plan(u32::MAX, u64::MAX / 4, u64::MAX), plan(0, 0, 0));
        for of in [a, b] {
            let one = Held::new(&of, 0, None);
            let both = one.plus(one.started(Tick(u64::MAX / 4)));
            assert_eq!(both.minus(one.started(Tick(u64::MAX / 4))), one);
            for now in [Tick(0), Tick(u64::MAX / 2)] {
                assert!(both.peak(now, 0.0, -1e18, 2.0).is_finite());
            }
        }
        assert_eq!(Held::default().peak(Tick(5), TOKEN, 700.0, 2.0), 700.0, "what others hold counts");
    }
}
