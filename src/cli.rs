//! The command line.

/// Writes a line to standard output, where somebody may have stopped to read.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

mod agent;
mod check;
mod demo;
mod figures;
mod gateway;
mod ops;
mod replay;
mod serve;
mod simulate;
mod simulated_worker;
mod table;
mod trace;
mod workers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// LLM inference front-end that stands directly in front of self-hosted GPU workers.
#[derive(Debug, Parser)]
#[command(name = "forebay", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(serve::Arguments),
    Demo(demo::Arguments),
    Check(check::Arguments),
    Agent(agent::Arguments),
    Simulate(simulate::Arguments),
    Replay(replay::Arguments),
    SimulatedWorker(simulated_worker::Arguments),
    Workers(workers::Arguments),
}

/// The process ended because it was used wrongly: bad arguments or configuration.
const WRONG_USE: u8 = 2;

/// Runs the command that the process was started with. 0: well, 1: failed, 2: wrong use.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(WRONG_USE) } else { ExitCode::SUCCESS };
        }
    };
    // What people read on the terminal should not be cut up by what operators read in logs.
    let quiet = !matches!(arguments.verb, Verb::Serve(_) | Verb::Agent(_));
    let filter = std::env::var("FOREBAY_LOG").unwrap_or_else(|_| if quiet { "warn" } else { "info" }.to_owned());
    crate::telemetry::logs::install(&filter);
    // A second installation (a test's) leaves the first in place, which is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match arguments.verb {
        Verb::Check(check) => check::run(&check),
        Verb::Simulate(simulate) => simulate::run(&simulate),
        Verb::Replay(replay) => block_on(replay::run(replay)),
        Verb::Agent(agent) => block_on(agent::run(agent)),
        Verb::Serve(serve) => block_on(serve::run(serve)),
        Verb::Demo(demo) => block_on(demo::run(demo)),
        Verb::SimulatedWorker(worker) => block_on(simulated_worker::run(worker)),
        Verb::Workers(workers) => block_on(workers::run(workers)),
    }
}

/// What a verb that was used wrongly says; everything else that fails ends with 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct WrongUse(String);

/// A number on the command line that must be above 0.
fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number above 0 is wanted".to_owned()),
    }
}

fn block_on(verb: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("forebay: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(verb);
    // What still blocks a thread (a disk that stands still) must not hold the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<WrongUse>() => {
            eprintln!("{error}");
            ExitCode::from(WRONG_USE)
        }
        Err(error) => {
            eprintln!("forebay: {error:#}");
            ExitCode::FAILURE
        }
    }
}
