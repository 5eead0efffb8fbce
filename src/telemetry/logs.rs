//! The process log: `tracing` events on standard error.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Installs the process log; `filter` as in `FOREBAY_LOG` (`info`, `forebay=debug,hyper=warn`).
///
/// JSON lines when standard error is not a terminal, text otherwise. A filter that cannot be read is said and
/// replaced by `info`. A second call in one process changes nothing.
pub fn install(filter: &str) {
    use std::io::IsTerminal;
    let (filter, complaint) = match EnvFilter::try_new(filter) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_span_events(FmtSpan::NONE);
    let installed = if std::io::stderr().is_terminal() {
        builder.with_target(false).try_init()
    } else {
        builder.json().with_ansi(false).try_init()
    };
    if let (Ok(()), Some(error)) = (installed, complaint) {
        tracing::warn!(%error, "FOREBAY_LOG cannot be read, logging at `info`");
    }
}
