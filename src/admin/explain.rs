//! `GET /admin/v1/decisions/{request}`: why a request went where it went, by its `x-request-id`.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use forebay_scheduler::{Cause, Leg, Unfit, term_names};
use http::StatusCode;
use serde_json::Value;

use super::wire::{Candidate, Decision, Explained, LeftOut, Refusal, When};
use super::{Admin, Named, health, refuse, rounded};
use crate::dispatch::{self, Decided, Moment, Weighed};
use crate::telemetry::metrics::CLASSES;

/// Longest name that a refusal repeats.
const SHOWN_CHARS_MAX: usize = 200;

pub(super) async fn one(State(admin): State<Arc<Admin>>, Named(request): Named) -> Response {
    match admin.dispatch.explain(&request) {
        Ok(explained) => Json(answer(explained)).into_response(),
        Err(not_kept) => {
            let request: String = request.chars().take(SHOWN_CHARS_MAX).collect();
            refuse(StatusCode::NOT_FOUND, Some("request_not_kept"), format!("`{request}` is {not_kept}."))
        }
    }
}

fn answer(explained: dispatch::Explained) -> Explained {
    let state = match (&explained.refusal, explained.under_way) {
        (Some(_), _) => "refused",
        (None, true) => "under_way",
        (None, false) => "ended",
    };
    Explained {
        request: explained.name,
        model: explained.model.map(|model| model.to_string()),
        class: CLASSES.get(explained.class as usize).copied().unwrap_or_default().to_owned(),
        prompt_tokens: explained.prompt_tokens,
        arrived: when(explained.arrived),
        state: state.to_owned(),
        queued_seconds: rounded(explained.queued.as_secs_f64()),
        sent: explained.sent.iter().map(ToString::to_string).collect(),
        refusal: explained.refusal.map(|(reason, retry_after)| refusal(reason, retry_after)),
        decisions: explained.decisions.into_iter().map(decision).collect(),
    }
}

fn refusal(reason: forebay_scheduler::Refusal, retry_after: Option<Duration>) -> Refusal {
    use forebay_scheduler::Refusal as Reason;
    let name = match reason {
        Reason::QueueFull => "queue_full",
        Reason::DeadlineInfeasible => "deadline_infeasible",
        Reason::DeadlineTooShort => "deadline_too_short",
        Reason::DeadlinePassed => "deadline_passed",
        Reason::TimedOut => "timed_out",
        Reason::NoWorker => "no_worker",
        Reason::AdapterUnavailable => "adapter_unavailable",
        Reason::AttemptsExhausted { .. } => "attempts_exhausted",
        Reason::Busy { .. } => "busy",
        Reason::PoolUnknown => "pool_unknown",
        Reason::TooLarge => "too_large",
    };
    let message = match reason {
        Reason::AttemptsExhausted { last } => format!("{reason}, the last one because {last}"),
        reason => reason.to_string(),
    };
    Refusal { reason: name.to_owned(), message, retry_after_seconds: retry_after.map(|wait| wait.as_secs_f64()) }
}

fn decision(decided: Decided) -> Decision {
    let cause = match decided.cause {
        Cause::Arrival => "arrival",
        Cause::Retry => "retry",
        Cause::Rescore => "rescore",
        Cause::Held => "held",
        Cause::Expiry => "expiry",
    };
    let winner = |of: fn(Leg) -> bool| {
        let mut won = decided.candidates.iter().filter(|candidate| candidate.winner && of(candidate.leg));
        won.next().map(|winner| winner.worker.to_string())
    };
    Decision {
        cause: cause.to_owned(),
        decided: when(decided.at),
        winner: winner(|leg| leg != Leg::Decode).or_else(|| winner(|_| true)),
        decode_winner: winner(|leg| leg == Leg::Decode),
        candidates: decided.candidates.into_iter().map(candidate).collect(),
        left_out: decided
            .left_out
            .into_iter()
            .map(|out| LeftOut { worker: out.worker.to_string(), reason: unfit(out.why).to_owned() })
            .collect(),
    }
}

fn unfit(why: Unfit) -> &'static str {
    match why {
        Unfit::Draining => "draining",
        Unfit::Gpu => "gpu_fault",
        Unfit::Health(state) => health(state),
    }
}

fn leg(leg: Leg) -> &'static str {
    match leg {
        Leg::Whole => "whole",
        Leg::Prefill => "prefill",
        Leg::Decode => "decode",
    }
}

fn candidate(weighed: Weighed) -> Candidate {
    let names = term_names().into_iter().map(str::to_owned);
    Candidate {
        worker: weighed.worker.to_string(),
        winner: weighed.winner,
        leg: leg(weighed.leg).to_owned(),
        health: weighed.health.map_or("left", health).to_owned(),
        matched_tokens: weighed.matched_tokens,
        terms: names.zip(weighed.terms.into_iter().map(|seconds| Value::from(rounded(seconds)))).collect(),
        seconds: rounded(weighed.seconds),
    }
}

fn when(moment: Moment) -> When {
    let since = moment.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    When {
        unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        ago_seconds: rounded(moment.ago.as_secs_f64()),
    }
}
