//! What an answer says, token by token, decided before the first token is due.
//!
//! Prose is drawn sentence by sentence from the built-in text, by a hash of prompt, seed and choice, so that equal
//! requests get equal answers. An answer ends with the model's end token unless a limit ends it earlier.
//!
//! Not here: when the tokens come (`driver`), and constrained answers themselves (`schema`).

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::model::Model;

/// What bounds an answer.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) tokens_max: u32,
    pub(crate) tokens_min: u32,
    pub(crate) ignore_end: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) include_stop: bool,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Output {
    pub(crate) tokens: Vec<Token>,
    pub(crate) finish: Finish,
    /// The stop string or stop token that ended it, else null.
    pub(crate) stop_reason: Value,
    /// Tokens at the beginning that say nothing themselves: the name of a tool, before its arguments.
    pub(crate) lead: usize,
}

/// One token and the text that it adds. The text is empty for the end token, inside a character of several tokens, and
/// where a stop string may still follow.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
}

impl Output {
    /// All of the text.
    pub(crate) fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).collect()
    }

    pub(crate) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// An answer in prose of a natural length between `natural` tokens, end token included.
pub(crate) fn prose(
    model: &Model,
    prompt: &[u32],
    seed: u64,
    natural: &std::ops::RangeInclusive<u32>,
    limits: &Limits,
) -> Output {
    if let Some(text) = model.recited(prompt) {
        return fixed(model, "", &text, limits);
    }
    let mut draw = Draw(hash(prompt, seed));
    let span = u64::from(natural.end().saturating_sub(*natural.start())) + 1;
    let length = natural.start().saturating_add(u32::try_from(draw.below(span)).unwrap_or(0)).max(1);
    let length = if limits.ignore_end { u32::MAX } else { length.max(limits.tokens_min.saturating_add(1)) };
    let words = length.saturating_sub(1).min(limits.tokens_max) as usize;
    let mut ids = Vec::with_capacity(words);
    while ids.len() < words {
        let sentences = model.sentences();
        let at = draw.below(sentences.len() as u64);
        let Some(sentence) = sentences.get(usize::try_from(at).unwrap_or(0)) else { break };
        let said = if ids.is_empty() { &sentence.first } else { &sentence.next };
        if said.is_empty() {
            break;
        }
        ids.extend(said.iter().take(words - ids.len()));
    }
    finish(model, &[], ids, limits)
}

/// An answer that says exactly `text`, as far as the limits let it, after the silent tokens of `lead`.
pub(crate) fn fixed(model: &Model, lead: &str, text: &str, limits: &Limits) -> Output {
    finish(model, &model.encode(lead, false), model.encode(text, false), limits)
}

/// Ends an answer: by a stop string or token, by the end token, or by its length.
fn finish(model: &Model, lead: &[u32], mut ids: Vec<u32>, limits: &Limits) -> Output {
    let tokens_max = limits.tokens_max as usize;
    let ended = lead.len() + ids.len() < tokens_max;
    if ended {
        ids.push(model.end());
    }
    let texts = model.texts(&ids);
    let silent = lead.iter().map(|id| Token { id: *id, text: String::new() });
    let said = ids.into_iter().zip(texts).map(|(id, text)| Token { id, text });
    let tokens = silent.chain(said).take(tokens_max).collect();
    let finish = if ended { Finish::Stop } else { Finish::Length };
    let mut output = Output { tokens, finish, stop_reason: Value::Null, lead: lead.len() };
    stop_at_token(&mut output, limits);
    stop_at_string(&mut output, limits);
    output
}

fn stop_at_token(output: &mut Output, limits: &Limits) {
    let min = limits.tokens_min as usize;
    let at = output.tokens.iter().skip(min).position(|token| limits.stop_ids.contains(&token.id));
    let Some(at) = at.map(|at| at + min) else { return };
    output.tokens.truncate(at + 1);
    if let Some(token) = output.tokens.last_mut() {
        output.stop_reason = token.id.into();
        if !limits.include_stop {
            token.text.clear();
        }
    }
    output.finish = Finish::Stop;
}

/// Ends the text where a stop string begins, and holds back as many bytes of each token's text as could still become part
/// of one, as the engine does.
fn stop_at_string(output: &mut Output, limits: &Limits) {
    let stops = || limits.stop.iter().filter(|stop| !stop.is_empty());
    let Some(longest) = stops().map(String::len).max() else { return };
    let hold = if limits.include_stop { 0 } else { longest - 1 };
    let min = limits.tokens_min as usize;
    let mut text = String::new();
    let mut shown = 0;
    let mut from = 0;
    let last = output.tokens.len().saturating_sub(1);
    for at in 0..output.tokens.len() {
        let Some(token) = output.tokens.get_mut(at) else { break };
        let before = text.len();
        text.push_str(&token.text);
        if at < min {
            from = text.len();
        }
        // A stop may have begun in the text before this token.
        let search = floor(&text, before.saturating_sub(longest).max(from));
        let tail = text.get(search..).unwrap_or_default();
        let found = stops().filter_map(|stop| Some((tail.find(stop.as_str())? + search, stop))).min();
        if let Some((begin, stop)) = found {
            let end = if limits.include_stop { begin + stop.len() } else { begin };
            token.text = text.get(shown..end).unwrap_or_default().to_owned();
            output.finish = Finish::Stop;
            output.stop_reason = stop.as_str().into();
            output.tokens.truncate(at + 1);
            return;
        }
        let until = if at == last { text.len() } else { floor(&text, text.len().saturating_sub(hold)).max(shown) };
        token.text = text.get(shown..until).unwrap_or_default().to_owned();
        shown = until;
    }
}

/// The last character boundary at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at)
}

/// Hash of token ids.
pub(crate) fn hash(ids: &[u32], seed: u64) -> u64 {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, seed)
}

/// A stream of numbers from one seed.
pub(crate) struct Draw(pub(crate) u64);

impl Draw {
    /// A number in `0..bound`, or 0 when `bound` is.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        xxh3_64_with_seed(&self.0.to_le_bytes(), 0) % bound.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(tokens_max: u32) -> Limits {
        Limits {
            tokens_max,
            tokens_min: 0,
            ignore_end: false,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            include_stop: false,
        }
    }

    fn say(model: &Model, limits: &Limits) -> Output {
        prose(model, &[1, 2, 3], 5, &(400..=400), limits)
    }

    #[test]
    fn prose_has_the_length_asked_for_and_ends_with_the_end_token() {
        let model = Model::load(None).unwrap();
        for (max, expect, finish) in [(1, 1, Finish::Length), (399, 399, Finish::Length), (400, 400, Finish::Stop)] {
            let output = say(&model, &limits(max));
            assert_eq!((output.tokens.len(), output.finish), (expect, finish));
            let ended = output.tokens.last().is_some_and(|token| token.id == model.end());
            assert_eq!(ended, finish == Finish::Stop);
        }
        let output = say(&model, &Limits { ignore_end: true, ..limits(500) });
        assert_eq!((output.tokens.len(), output.finish), (500, Finish::Length));
    }

    #[test]
    fn every_stop_in_the_text_ends_it_there_and_shows_no_part_of_itself() {
        let model = Model::load(None).unwrap();
        let whole = say(&model, &limits(400)).text();
        let boundaries: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
        for length in [1, 2, 9, 40] {
            for begin in (0..boundaries.len() - length - 1).step_by(23) {
                let stop = whole[boundaries[begin]..boundaries[begin + length]].to_owned();
                let at = whole.find(&stop).unwrap();
                for include_stop in [false, true] {
                    let stops = vec!["not there".to_owned(), stop.clone()];
                    let output = say(&model, &Limits { stop: stops, include_stop, ..limits(400) });
                    let end = if include_stop { at + stop.len() } else { at };
                    assert_eq!(output.text(), whole[..end], "{stop:?}");
                    assert_eq!((output.finish, &output.stop_reason), (Finish::Stop, &Value::from(stop.as_str())));
                }
            }
        }
    }

    #[test]
    fn a_stop_that_never_comes_changes_nothing_but_when_text_is_shown() {
        let model = Model::load(None).unwrap();
        let free = say(&model, &limits(300));
        let bound = say(&model, &Limits { stop: vec!["zzzz".to_owned()], ..limits(300) });
        assert_eq!((bound.text(), bound.ids(), bound.finish), (free.text(), free.ids(), free.finish));
        assert_ne!(bound.tokens, free.tokens);
    }

    #[test]
    fn what_is_recited_is_gone_on_with_wherever_a_prompt_ends() {
        let model = Model::load(None).unwrap().reciting(true);
        let say = |prompt: &str, max| prose(&model, &model.encode(prompt, false), 5, &(1..=1), &limits(max)).text();
        let begun = say("A question? ", 30);
        assert_eq!(say("another", 30), begun);
        for (at, _) in begun.char_indices() {
            let rest = say(&format!("A question? {}", &begun[..at]), 60);
            assert!(rest.starts_with(&begun[at..]), "after {:?}: {rest:?}", &begun[..at]);
        }
    }

    #[test]
    fn a_silent_lead_counts_but_says_nothing() {
        let model = Model::load(None).unwrap();
        let output = fixed(&model, "a name: ", "{}", &limits(100));
        assert_eq!((output.text().as_str(), output.finish), ("{}", Finish::Stop));
        assert!(output.lead > 0 && output.tokens.len() > output.lead + 1);
        assert_eq!(fixed(&model, "a name: ", "{}", &limits(1)).finish, Finish::Length);
    }
}
