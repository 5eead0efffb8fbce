//! Chat templates, rendered as `transformers` renders them.
//!
//! A template is Jinja as `apply_chat_template` runs it: trimmed and left-stripped blocks, loop controls,
//! `raise_exception`, `strftime_now`, Python's `tojson`, Python's methods on strings and mappings, and refusals where
//! Python would raise a `TypeError` for looping over `None` or joining text with something else.
//!
//! Invariants: rendering ends, within [`FUEL`] steps and [`TEXT_BYTES_MAX`] bytes, whatever the conversation; it reads
//! nothing but its arguments, the clock included; a refusal by the template keeps the template's own words.
//!
//! Not here: reshaping a request's messages the way an engine does before it renders them (`chat`).

mod format;
mod python;
mod scan;

use std::panic::AssertUnwindSafe;
use std::time::SystemTime;

use minijinja::{Environment, ErrorKind};
use serde_json::Value as Json;

pub(crate) use self::format::ContentFormat;
use crate::chat::{Chat, Parsed};
use crate::config::SpecialTokens;
use crate::error::Error;

/// Steps a rendering may take. A conversation of a thousand messages takes some hundred thousand steps in the longest
/// templates known; only loops over all messages within a loop over all messages come near this.
const FUEL: u64 = 10_000_000;

/// Bytes a rendering may write: four times the largest context of today's models in bytes.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// Nested macro calls: a tool's JSON schema is walked by recursive macros, and JSON nests 128 deep at most.
const RECURSION_MAX: usize = 200;

const NAME: &str = "chat";

/// What `transformers` 5 puts behind the final message, to find where a continued message ends in the rendered text.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// One compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    format: ContentFormat,
    /// Whether the template's text mentions `content` at all, which a continued message needs.
    reads_content: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("special", &self.special).field("format", &self.format).finish()
    }
}

impl ChatTemplate {
    /// Compiles a template; `special` are the variables `bos_token`, `eos_token` and so on.
    ///
    /// # Errors
    /// [`Error::Render`] with the position, when it is no valid template.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self, Error> {
        let source = scan::normalize_newlines(source);
        let compile = |source| {
            let mut environment = python::environment()?;
            environment.set_fuel(Some(FUEL));
            environment.set_recursion_limit(RECURSION_MAX);
            environment.add_template_owned(NAME, source)?;
            Ok(environment)
        };
        let environment =
            compile(scan::rewrite(&source)).map_err(|error: minijinja::Error| Error::Render(error.to_string()))?;
        let format = format::detect(&source);
        Ok(Self { environment, special, format, reads_content: source.contains("content") })
    }

    /// Renders a conversation exactly as given, as `apply_chat_template` does: nothing of the messages is reshaped.
    ///
    /// # Errors
    /// [`Error::Refused`] with the template's own message, [`Error::Render`] where Python would raise,
    /// [`Error::TooMuch`] past the bounds of this module, [`Error::Field`] for what is not a chat at all.
    pub fn render(&self, chat: &Chat<'_>) -> Result<String, Error> {
        self.render_parsed(Parsed::new(chat)?)
    }

    pub(crate) fn content_format(&self) -> ContentFormat {
        self.format
    }

    pub(crate) fn render_parsed(&self, mut chat: Parsed) -> Result<String, Error> {
        let continued = if chat.continue_final_message { Some(self.tag_final_message(&mut chat)?) } else { None };
        let text = self.run(chat)?;
        match continued {
            Some(final_text) => cut_at_tag(text, &final_text),
            None => Ok(text),
        }
    }

    fn run(&self, chat: Parsed) -> Result<String, Error> {
        let now = chat.now;
        let list = |values: Vec<Json>| python::value(Json::Array(values));
        let mut variables = vec![("strftime_now".to_owned(), python::strftime_now(now))];
        variables.extend(self.special.0.iter().map(|(role, token)| (role.clone(), token.as_str().into())));
        variables.push(("tools".to_owned(), chat.tools.map_or(().into(), list)));
        variables.push(("documents".to_owned(), chat.documents.map_or(().into(), list)));
        variables.extend(chat.kwargs.into_iter().map(|(name, value)| (name, python::value(value))));
        variables.push(("messages".to_owned(), list(chat.messages)));
        variables.push(("add_generation_prompt".to_owned(), chat.add_generation_prompt.into()));
        let render = || {
            let mut out = Capped { bytes: Vec::new() };
            let template = self.environment.get_template(NAME)?;
            template.render_captured_to(minijinja::Value::from_pairs(variables), &mut out)?;
            Ok(out.bytes)
        };
        // the engine indexes without looking in odd corners (slices of what is empty, in 3.0.5), and its state is
        // this call's own, so nothing broken is left behind
        let bytes = std::panic::catch_unwind(AssertUnwindSafe(render))
            .map_err(|_| Error::Render("the template engine gave up".to_owned()))?
            .map_err(|error: minijinja::Error| explain(&error))?;
        String::from_utf8(bytes).map_err(|error| Error::Render(error.to_string()))
    }

    /// Appends [`CONTINUE_TAG`] to the last message's text and gives back that text without it.
    fn tag_final_message(&self, chat: &mut Parsed) -> Result<String, Error> {
        let refuse = |problem: &str| Error::field("continue_final_message", problem);
        if chat.add_generation_prompt {
            return Err(refuse("cannot be set together with `add_generation_prompt`"));
        }
        if !self.reads_content {
            return Err(refuse("is set, but the chat template does not read the content of messages"));
        }
        let content = chat.messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match content {
            None | Some(Json::Null) => return Err(refuse("is set, but the final message has no content to continue")),
            Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
            Some(other) => Some(other),
        };
        match text {
            Some(Json::String(text)) => {
                let plain = text.clone();
                text.push_str(CONTINUE_TAG);
                Ok(plain)
            }
            _ => Err(refuse("is set, but the final message has no text to continue")),
        }
    }
}

/// Ends the text where the continued message ends.
fn cut_at_tag(mut text: String, final_text: &str) -> Result<String, Error> {
    let tag = text.rfind(CONTINUE_TAG.trim_end()).filter(|_| text.contains(python::strip(final_text)));
    let Some(at) = tag else {
        return Err(Error::field("continue_final_message", "is set, but the chat template drops the final message"));
    };
    let spacing_kept = text.get(at..).is_some_and(|rest| rest.starts_with(CONTINUE_TAG));
    text.truncate(at);
    if !spacing_kept {
        text.truncate(python::strip_end(&text).len());
    }
    Ok(text)
}

/// Finds the cause of a failed rendering: the template's refusal, a bound of ours, or the conversation's shape.
fn explain(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<python::Raised>() {
            return Error::Refused(raised.0.clone());
        }
        if let Some(kind) = current.downcast_ref::<minijinja::Error>().map(minijinja::Error::kind)
            && matches!(kind, ErrorKind::OutOfFuel | ErrorKind::WriteFailure)
        {
            return Error::TooMuch;
        }
        cause = current.source();
    }
    Error::Render(error.to_string())
}

/// A buffer that refuses to grow past [`TEXT_BYTES_MAX`].
struct Capped {
    bytes: Vec<u8>,
}

impl std::io::Write for Capped {
    fn write(&mut self, more: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + more.len() > TEXT_BYTES_MAX {
            return Err(std::io::Error::other("rendered text too long"));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Seconds since 1970 and nanoseconds of a system time; before 1970 counts as 1970.
fn since_epoch(now: SystemTime) -> (i64, u32) {
    let elapsed = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX), elapsed.subsec_nanos())
}

#[cfg(test)]
mod tests;
