//! The inputs of a request where they stand as JSON, for a list that holds those of several requests.

use serde_json::value::RawValue;

use super::field::{Field, Kind, kind};
use super::{INPUTS_MAX, Input, Span};

/// Inputs that can stand in one list with those of other requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Items {
    /// The field's whole value.
    pub value: Span,
    /// Each input with the commas between them: what a list has within its brackets, else the value itself.
    pub inner: Span,
    /// How many they are, 1 to [`INPUTS_MAX`].
    pub count: u32,
    /// Whether each is a list of token ids; else each is a text.
    pub ids: bool,
}

impl Items {
    /// The items of `field`, which was read as `input`.
    pub(super) fn of(field: &Field<'_>, input: &Input) -> Option<Self> {
        let listed = matches!(input, Input::Texts(_) | Input::IdLists(_));
        let ids = matches!(input, Input::Ids(_) | Input::IdLists(_));
        Self::new(field, listed, input.count(), ids)
    }

    /// The items of `field` if it is a text or a list of nothing but texts.
    pub(super) fn texts(field: &Field<'_>) -> Option<Self> {
        if field.is_string() {
            return Self::new(field, false, 1, false);
        }
        let items: Vec<&RawValue> = serde_json::from_str(field.text()?).ok()?;
        let plain = items.iter().all(|item| kind(item.get()) == Kind::String);
        (plain && (1..=INPUTS_MAX).contains(&items.len())).then(|| Self::new(field, true, items.len(), false))?
    }

    fn new(field: &Field<'_>, listed: bool, count: usize, ids: bool) -> Option<Self> {
        let value = field.span()?;
        let inner = if listed { value.start + 1..value.end - 1 } else { value.clone() };
        Some(Self { value, inner, count: u32::try_from(count).ok()?, ids })
    }
}
