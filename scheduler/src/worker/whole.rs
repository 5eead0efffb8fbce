//! How fast a worker prefills, learned from answers that come whole, whose first token nobody sees.
//!
//! While such a request is at a worker, its time goes into prompts, its own and those that came after it, and into its
//! output: `seconds = prompt tokens * a + output tokens * b`. What was sent before it and not prefilled yet is not
//! counted, nor is taken off what was sent after it and not prefilled at its end: over many requests these are as much,
//! and have nothing to do with how long the request's own prompt and output are. These are therefore what the equation
//! is multiplied by before it is summed, once each (instrumental variables: least squares would be misled by the noise
//! in the prompts), as parts of a time that is assumed for them, so that long requests do not outweigh short ones.
//!
//! An observation of an assumed time for a token stands at the beginning and fades: with no output (embeddings) or
//! little of it the prompt's speed is seen at once. Where prompts and outputs only grow together nothing is learned.
//!
//! Not here: streams (`rate`), which are better evidence and go first.

use super::rate::{RATE_BOUNDS, TRUSTED_AFTER as MEASUREMENTS_MIN};
use super::step::ASSUMED_SECONDS;

/// Weight that the past keeps at each new observation: the last 200 or so count: outputs take most of the time, and
/// their noise would drown the prompts in fewer.
const KEEP: f64 = 0.995;
/// Answers before the fit is believed.
const TRUSTED_AFTER: u32 = 2 * MEASUREMENTS_MIN;
/// One more answer changes the rate by at most this factor, once it is believed.
const STEP_MAX: f64 = 1.25;
/// What must be left of the equations' determinant for the two to be told apart, as part of what it is when they have
/// nothing to do with each other.
const APART_MIN: f64 = 0.02;
/// Prompt tokens/s by which answers are weighted.
const ASSUMED_RATE: f64 = 2000.0;
/// What is left of the assumed time for a token.
const ASSUMED_MIN: f64 = 0.001;

#[derive(Debug)]
pub(super) struct Whole {
    /// Own prompt tokens times prompt tokens, output tokens and seconds.
    by_prompt: [f64; 3],
    /// Output tokens times the same.
    by_output: [f64; 3],
    /// Weight of the observation that is assumed.
    assumed: f64,
    seen: u32,
    rate: Option<f64>,
}

/// What was sent to a worker before a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    /// Prompt tokens to compute, of all time (wraps).
    pub(crate) tokens: u64,
    /// Sequences still there.
    pub(crate) sequences: u64,
}

/// What one answer says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    /// Tokens of its own prompt to compute.
    pub(super) own_tokens: u32,
    /// The same of all prompts that were sent until its end, its own first.
    pub(super) prompt_tokens: u64,
    /// Of each sequence.
    pub(super) output_tokens: u32,
    /// From the send to the end, without what the other sequences added to each token.
    pub(super) seconds: f64,
}

impl Default for Whole {
    fn default() -> Self {
        Self { by_prompt: [0.0; 3], by_output: [0.0; 3], assumed: 1.0, seen: 0, rate: None }
    }
}

impl Whole {
    /// Prompt tokens/s, once enough was seen.
    pub(super) fn value(&self) -> Option<f64> {
        self.rate
    }

    pub(super) fn observe(&mut self, answer: Answer) {
        let Answer { own_tokens, prompt_tokens, output_tokens, seconds } = answer;
        if !seconds.is_finite() || own_tokens == 0 {
            return;
        }
        let (own, output) = (f64::from(own_tokens), f64::from(output_tokens));
        let usual = own / ASSUMED_RATE + output * ASSUMED_SECONDS;
        let facts = [prompt_tokens as f64, output, seconds];
        for (sums, by) in [(&mut self.by_prompt, own), (&mut self.by_output, output)] {
            sums.iter_mut().zip(facts).for_each(|(sum, fact)| *sum = *sum * KEEP + by * fact / (usual * usual));
        }
        self.assumed = (self.assumed * KEEP).max(ASSUMED_MIN);
        self.seen = self.seen.saturating_add(1);
        if let Some(fitted) = self.fit().filter(|_| self.seen >= TRUSTED_AFTER) {
            let rate = self.rate.map_or(fitted, |rate| fitted.clamp(rate / STEP_MAX, rate * STEP_MAX));
            self.rate = Some(rate.clamp(RATE_BOUNDS.0, RATE_BOUNDS.1));
        }
    }

    /// The prompt tokens/s that explain the times; none where they do not tell.
    fn fit(&self) -> Option<f64> {
        let [prompts, mixed, prompt_seconds] = self.by_prompt;
        let [mixed_too, outputs, output_seconds] = self.by_output;
        let weight = self.assumed / (ASSUMED_SECONDS * ASSUMED_SECONDS);
        let (outputs, output_seconds) = (outputs + weight, output_seconds + weight * ASSUMED_SECONDS);
        let determinant = prompts * outputs - mixed * mixed_too;
        let seconds = (prompt_seconds * outputs - output_seconds * mixed) / determinant;
        (determinant > APART_MIN * prompts * outputs && seconds > 0.0).then(|| 1.0 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that was alone.
    fn answer(prompt: u32, output_tokens: u32, seconds: f64) -> Answer {
        Answer { own_tokens: prompt, prompt_tokens: prompt.into(), output_tokens, seconds }
    }

    /// Answers of an engine that takes so long for a prompt and an output token, `noise` parts more or less.
    fn fitted(answers: u32, output: (u32, u32), token_seconds: f64, noise: f64) -> Option<f64> {
        let mut whole = Whole::default();
        for i in 0..answers {
            let (prompt, output) = (200 + i * 7919 % 4000, output.0 + i * 104_729 % (output.1 + 1 - output.0));
            let seconds = f64::from(prompt) / 8000.0 + f64::from(output) * token_seconds;
            let others = i * 1_299_709 % 3 * 1000;
            let seconds = seconds * (1.0 + noise * (f64::from(i * 31 % 21) / 10.0 - 1.0));
            whole.observe(Answer {
                prompt_tokens: u64::from(prompt + others),
                ..answer(prompt, output, seconds + f64::from(others) / 8000.0)
            });
        }
        whole.value()
    }

    #[test]
    fn the_prompts_speed_is_told_apart_from_the_outputs() {
        for (output, token_seconds) in [((0, 0), 0.01), ((1, 4), 0.01), ((0, 400), 0.01), ((50, 200), 0.01)] {
            let rate = fitted(1000, output, token_seconds, 0.1).unwrap();
            assert!((rate / 8000.0 - 1.0).abs() < 0.25, "{output:?}: {rate}");
        }
        assert_eq!(fitted(TRUSTED_AFTER - 1, (0, 400), 0.01, 0.0), None, "too few");
    }

    #[test]
    fn what_cannot_be_told_is_not_said() {
        let mut whole = Whole::default();
        for _ in 0..1000 {
            for (prompt, output, seconds) in [(1000, 100, 1.2), (1000, 0, f64::NAN), (0, 10, 1.0)] {
                whole.observe(answer(prompt, output, seconds));
            }
        }
        assert_eq!(whole.value(), None, "prompts and outputs are always the same");
    }

    #[test]
    fn one_answer_moves_it_by_a_bounded_factor() {
        let mut whole = Whole::default();
        for _ in 0..20 {
            whole.observe(answer(1000, 0, 0.125));
        }
        let before = whole.value().unwrap();
        whole.observe(answer(100_000_000, 0, 1e-5));
        assert!(whole.value().unwrap() <= before * STEP_MAX);
        (0..10_000).for_each(|i| whole.observe(answer(u32::MAX, 0, f64::from(i + 1) * 1e-5)));
        assert!(whole.value().unwrap() <= RATE_BOUNDS.1);
    }
}
