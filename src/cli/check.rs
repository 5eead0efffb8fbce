//! `forebay check`: says every mistake of a configuration file.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{WRONG_USE, gateway};

/// Check a configuration file and say every mistake in it.
///
/// Example: forebay check --config forebay.toml
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The file.
    #[arg(long, env = "FOREBAY_CONFIG", default_value = "forebay.toml")]
    config: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    match gateway::reader(Vec::new()).load(&arguments.config) {
        Ok(config) => {
            let workers: usize = config.models.iter().map(|model| model.workers.len()).sum();
            say!("{}: {} models, {workers} workers, no mistakes", arguments.config.display(), config.models.len());
            ExitCode::SUCCESS
        }
        Err(mistakes) => {
            eprintln!("{mistakes}");
            ExitCode::from(WRONG_USE)
        }
    }
}
