//! `--fault`: `crash@SECONDS:WORKER[:SECONDS]` or `slow=FACTOR@SECONDS:WORKER[:SECONDS]`.

use std::time::Duration;

use forebay_simulator::{Fault, FaultKind};

pub(super) fn parse(text: &str) -> Result<Fault, String> {
    read(text).ok_or_else(|| "as in crash@60:0:30 (worker 0, at 60 s, for 30 s) or slow=4@60:1 (to the end)".to_owned())
}

fn read(text: &str) -> Option<Fault> {
    let (kind, place) = text.split_once('@')?;
    let kind = match kind.split_once('=') {
        None if kind == "crash" => FaultKind::Crash,
        Some(("slow", factor)) => FaultKind::Slow(factor.parse().ok().filter(|factor| (0.01..=1e6).contains(factor))?),
        _ => return None,
    };
    let seconds = |text: &str| Duration::try_from_secs_f64(text.parse().ok()?).ok();
    let mut parts = place.split(':');
    let (at, worker) = (seconds(parts.next()?)?, parts.next()?.parse().ok()?);
    let lasts = match parts.next() {
        Some(text) => Some(seconds(text)?),
        None => None,
    };
    parts.next().is_none().then_some(Fault { at, worker, kind, lasts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_or_refused() {
        let seconds = Duration::from_secs;
        let crash = Fault { at: seconds(60), worker: 2, kind: FaultKind::Crash, lasts: Some(seconds(30)) };
        let slow = Fault { at: seconds(0), worker: 0, kind: FaultKind::Slow(2.5), lasts: None };
        assert_eq!(parse("crash@60:2:30"), Ok(crash));
        assert_eq!(parse("slow=2.5@0:0"), Ok(slow));
        for wrong in [
            "",
            "crash",
            "crash@",
            "crash@1",
            "crash@-1:0",
            "slow@1:0",
            "slow=0@1:0",
            "slow=nan@1:0",
            "crash=2@1:0",
            "crash@1:0:2:3",
            "crash@1:x",
            "melt@1:0",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
