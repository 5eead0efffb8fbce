//! What can go wrong when a tokenizer is loaded, and when it is used.

use std::path::PathBuf;

/// Why a tokenizer could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{file}` is not what it should be: {message}")]
    Invalid { file: &'static str, message: String },
    #[error("the chat template `{name}` does not compile: {message}")]
    Template { name: String, message: String },
}

/// Why a text, a chat or a list of ids was refused. The messages may be shown to the client that sent it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The model's own template refused the conversation with these words (`raise_exception`).
    #[error("{0}")]
    Refused(String),
    /// The template could not be rendered with this conversation.
    #[error("the chat template cannot render this conversation: {0}")]
    Render(String),
    /// The template used more steps, or wrote more text, than any honest conversation needs.
    #[error("the chat template takes too long or writes too much for this conversation")]
    TooMuch,
    /// The model has no chat template, or none for this use.
    #[error("the model has no chat template")]
    NoTemplate,
    /// A field of the request does not have the type that a chat needs.
    #[error("`{field}` {problem}")]
    Field { field: String, problem: String },
    /// The tokenizer library refused.
    #[error("the tokenizer refused the text: {0}")]
    Tokenizer(String),
}

impl Error {
    pub(crate) fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { field: field.into(), problem: problem.into() }
    }
}
