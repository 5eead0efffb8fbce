//! `events-<policy>-<rate>-<seed>.jsonl`: all that happened in a cell, one JSON object a line.

use std::io::{self, Write};

use forebay_simulator::{Entry, Trace, What};
use serde::Serialize;

#[derive(Serialize)]
struct Line {
    /// With the microsecond as its last digit.
    t_ms: f64,
    event: &'static str,
    request: u32,
    #[serde(flatten)]
    facts: Facts,
}

#[derive(Default, Serialize)]
struct Facts {
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    in_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cached_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    out_tokens: Option<u32>,
}

pub(super) fn write(out: &mut impl Write, trace: &Trace, log: &[Entry]) -> io::Result<()> {
    for entry in log {
        let in_tokens = trace.rows.get(entry.request as usize).map(|row| row.prompt_tokens);
        let (event, facts) = facts(entry.what, in_tokens);
        let line = Line { t_ms: entry.at.0 as f64 / 1e3, event, request: entry.request, facts };
        serde_json::to_writer(&mut *out, &line)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

fn facts(what: What, in_tokens: Option<u32>) -> (&'static str, Facts) {
    let at = |worker| Facts { worker: Some(worker), ..Facts::default() };
    match what {
        What::Arrived => ("arrived", Facts { in_tokens, ..Facts::default() }),
        What::Placed { worker } => ("placed", at(worker)),
        What::Sent { worker } => ("sent", at(worker)),
        What::FirstToken { worker, cached_tokens } => {
            ("first_token", Facts { in_tokens, cached_tokens: Some(cached_tokens), ..at(worker) })
        }
        What::Preempted { worker } => ("preempted", at(worker)),
        What::Finished { worker, cached_tokens, output_tokens } => {
            let (cached_tokens, out_tokens) = (Some(cached_tokens), Some(output_tokens));
            ("finished", Facts { in_tokens, cached_tokens, out_tokens, ..at(worker) })
        }
        What::Shed => ("shed", Facts::default()),
        What::TimedOut => ("timed_out", Facts::default()),
        What::Refused => ("refused", Facts::default()),
        What::Failed => ("failed", Facts::default()),
    }
}
