//! Where mistakes are collected while reading goes on.
//!
//! Shared by all readers of one text, hence the cells; nothing in here outlives the reading.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use super::mistake::{Mistake, Mistakes, Place};

/// Collects mistakes and knows how to turn an offset of the text into line and column.
pub(super) struct Log<'a> {
    file: Arc<str>,
    text: &'a str,
    complete: Cell<bool>,
    refused: RefCell<Vec<Refused>>,
}

/// A mistake whose place is still an offset: lines are counted only for those that will be listed.
struct Refused {
    at: At,
    value: String,
    remedy: String,
}

/// A key and where its value was given.
#[derive(Debug, Clone)]
pub(super) struct At {
    key: String,
    spot: Spot,
}

/// The order is that of the report: the file from top to bottom, then what was given outside it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Spot {
    Offset(usize),
    Given(String),
}

impl At {
    /// A place inside the text.
    pub(super) fn offset(key: impl Into<String>, offset: usize) -> Self {
        Self { key: key.into(), spot: Spot::Offset(offset) }
    }

    /// An environment variable or a flag.
    pub(super) fn given(key: impl Into<String>, name: impl Into<String>) -> Self {
        Self { key: key.into(), spot: Spot::Given(name.into()) }
    }
}

impl<'a> Log<'a> {
    pub(super) fn new(file: &str, text: &'a str) -> Self {
        Self { file: Arc::from(file), text, complete: Cell::new(true), refused: RefCell::default() }
    }

    pub(super) fn refuse(&self, at: &At, value: impl Into<String>, remedy: impl Into<String>) {
        let refused = Refused { at: at.clone(), value: value.into(), remedy: remedy.into() };
        self.refused.borrow_mut().push(refused);
    }

    /// As `refuse`, for a mistake that only holds if the rest of the file was understood.
    pub(super) fn refuse_absence(&self, at: &At, value: impl Into<String>, remedy: impl Into<String>) {
        if self.complete.get() {
            self.refuse(at, value, remedy);
        }
    }

    /// Says that parts of the file could not be read: what seems to be absent may stand there.
    pub(super) fn mark_incomplete(&self) {
        self.complete.set(false);
    }

    /// For a remedy that points at another value.
    pub(super) fn mention(&self, at: &At) -> String {
        format!("`{}` ({})", at.key, self.place(at))
    }

    /// All that was refused; `None` when nothing was.
    pub(super) fn mistakes(&self) -> Option<Mistakes> {
        let mut refused = self.refused.take();
        refused.sort_by(|a, b| a.at.spot.cmp(&b.at.spot));
        let mistake = |Refused { at, value, remedy }| Mistake { place: self.place(&at), key: at.key, value, remedy };
        Mistakes::of(refused.into_iter().map(mistake))
    }

    /// The text as it was written in a range of it.
    pub(super) fn source(&self, range: Range<usize>) -> &'a str {
        self.text.get(range).unwrap_or_default()
    }

    fn place(&self, at: &At) -> Place {
        let offset = match &at.spot {
            Spot::Offset(offset) => *offset,
            Spot::Given(name) => return Place::Given(name.clone()),
        };
        let offset = self.text.floor_char_boundary(offset);
        let before = self.text.get(..offset).unwrap_or(self.text).trim_start_matches('\u{feff}');
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Place::Text { file: self.file.clone(), line, column }
    }
}
