//! One request made of several, and the several answers that its answer holds.
//!
//! Requests that are equal but for their inputs become one with all of them ([`join`]). Of the answer each gets back the
//! items that are its own ([`split`]), numbered as in a call of its own, with its share of the tokens; all else is as the
//! engine wrote it. Bytes are moved, numbers never printed anew.

use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::peek::{Items, Span};
use crate::splice::Edits;

/// One request of several that are asked as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Inputs, in the order of the requests.
    pub items: u32,
    /// Tokens by our own count. They are what the request is told if together they are the engine's count; if not, the
    /// engine's is divided in their proportion.
    pub tokens: u32,
}

/// The request `body`, whose inputs are `items`, with `inners` in their place: the inputs of several requests.
#[must_use]
pub fn join<'a>(body: &Bytes, items: &Items, inners: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut list = vec![b'['];
    for inner in inners {
        if list.len() > 1 {
            list.push(b',');
        }
        list.extend_from_slice(inner);
    }
    list.push(b']');
    let mut edits = Edits::new();
    edits.replace(items.value.clone(), list);
    edits.apply(body)
}

/// What an answer holds for each who asked.
#[derive(Debug)]
pub struct Split {
    /// In the order of the shares.
    pub answers: Vec<Bytes>,
    /// Their counts of tokens are the engine's for all, divided in the proportion of our own.
    pub apportioned: bool,
}

/// The answer of each of `shares`. The list of items is `data`, or else `results`, which may stand in any order.
///
/// `None` for what is not an answer to all of these requests: no JSON, no such list, an item that is missing, twice, or
/// has no `index`.
#[must_use]
pub fn split(answer: &Bytes, shares: &[Share]) -> Option<Split> {
    let text = std::str::from_utf8(answer).ok()?;
    let whole: Whole<'_> = serde_json::from_str(text).ok()?;
    let list = whole.data.or(whole.results)?;
    let items: Vec<&RawValue> = serde_json::from_str(list.get()).ok()?;
    let usage = whole.usage.and_then(|usage| serde_json::from_str::<Usage<'_>>(usage.get()).ok()).unwrap_or_default();
    let prompt_tokens = portions(text, usage.prompt_tokens, shares);
    let total_tokens = portions(text, usage.total_tokens, shares);

    let mut lists = lists(&items, shares)?.into_iter();
    let answers = shares.iter().enumerate().map(|(at, _)| {
        let mut edits = Edits::new();
        edits.replace(place(text, list), lists.next().unwrap_or_default());
        for (span, tokens) in [&prompt_tokens, &total_tokens].into_iter().flatten() {
            edits.replace(span.clone(), tokens.get(at).copied().unwrap_or(0).to_string());
        }
        edits.apply(answer)
    });
    let own: u64 = shares.iter().map(|share| u64::from(share.tokens)).sum();
    let mut counts = [&prompt_tokens, &total_tokens].into_iter().flatten();
    let apportioned = counts.any(|(_, tokens)| tokens.iter().sum::<u64>() != own);
    Some(Split { answers: answers.collect(), apportioned })
}

#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    results: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct Usage<'a> {
    #[serde(borrow)]
    prompt_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    total_tokens: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    index: &'a RawValue,
}

/// Where `value` stands in `text`, a slice of which it is.
fn place(text: &str, value: &RawValue) -> Span {
    let start = value.get().as_ptr().addr().saturating_sub(text.as_ptr().addr());
    start..start + value.get().len()
}

/// The list of each share, its items in the order in which they stand in `items`.
fn lists(items: &[&RawValue], shares: &[Share]) -> Option<Vec<Vec<u8>>> {
    let mut first = 0;
    let own: Vec<Range<usize>> = shares
        .iter()
        .map(|share| {
            let start = first;
            first += share.items as usize;
            start..first
        })
        .collect();
    if items.len() != first {
        return None;
    }
    let mut seen = vec![false; first];
    let mut lists = vec![vec![b'[']; shares.len()];
    for item in items {
        let index = serde_json::from_str::<Item<'_>>(item.get()).ok()?.index;
        let number: usize = index.get().parse().ok()?;
        if std::mem::replace(seen.get_mut(number)?, true) {
            return None;
        }
        let at = own.partition_point(|range| range.end <= number);
        let (list, range) = (lists.get_mut(at)?, own.get(at)?);
        if list.len() > 1 {
            list.push(b',');
        }
        let span = place(item.get(), index);
        list.extend_from_slice(item.get().as_bytes().get(..span.start)?);
        list.extend_from_slice((number - range.start).to_string().as_bytes());
        list.extend_from_slice(item.get().as_bytes().get(span.end..)?);
    }
    lists.iter_mut().for_each(|list| list.push(b']'));
    Some(lists)
}

/// Where a count stands, and what each share has of it. `None` where there is no count.
fn portions(text: &str, count: Option<&RawValue>, shares: &[Share]) -> Option<(Span, Vec<u64>)> {
    let count = count?;
    Some((place(text, count), apportion(count.get().parse().ok()?, shares)))
}

/// Divides `total` among shares in the proportion of their tokens; the parts sum to it. Shares without tokens count
/// as one each where none has any.
fn apportion(total: u64, shares: &[Share]) -> Vec<u64> {
    let sum: u64 = shares.iter().map(|share| u64::from(share.tokens)).sum();
    let weigh = |share: &Share| if sum == 0 { 1 } else { u128::from(share.tokens) };
    let sum: u128 = shares.iter().map(weigh).sum();
    // Rounded sums of the shares so far: what is rounded off one is given to the next.
    let (mut weight, mut given) = (0, 0);
    let part = |share: &Share| {
        weight += weigh(share);
        let until = u64::try_from(u128::from(total) * weight / sum.max(1)).unwrap_or(u64::MAX);
        let part = until - given;
        given = until;
        part
    };
    shares.iter().map(part).collect()
}

#[cfg(test)]
mod tests;
