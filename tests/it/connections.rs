//! Connections toward workers: what happens on them stays between the gateway and the worker.

use std::convert::Infallible;
use std::io::Write as _;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::task::TaskTracker;

use super::support::body::{ANSWER, chat};
use super::support::eventually;
use super::support::process::{Gateway, Worker, model, tokenizer};
use super::support::recorder::{Recorder, Step, json};

const CHAT: &str = "/v1/chat/completions";

/// A gateway that tries a request once.
fn once(recorder: &Recorder) -> Gateway {
    let extra = format!("tokenizer = {:?}\nattempts_max = 1\n", tokenizer());
    Gateway::start(&model("m", &[recorder.address], &extra))
}

#[test]
fn a_connection_that_the_worker_just_closed_goes_unnoticed() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = once(&recorder);
    for round in 0..10 {
        assert_eq!(gateway.post(CHAT, &chat(&format!("first {round}"), "")).status, 200);
        // Closed when the next request is on its way, without a word: as an engine's own keep-alive ends.
        recorder.play_all(vec![vec![Step::Reset], json("200 OK", ANSWER)]);
        let answer = gateway.post(CHAT, &chat(&format!("second {round}"), ""));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let row = gateway.row_of(&answer);
        assert_eq!((&row["attempts"], &row["outcome"]), (&1.into(), &"completed".into()), "{row}");
    }
    // Once each, and once more on a new connection.
    let posts = recorder.posts();
    assert_eq!(posts.len(), 30);
    for [first, closed, again] in posts.chunks(3).map(|three| [&three[0], &three[1], &three[2]]) {
        assert_eq!(closed.body, again.body);
        assert_ne!(first.body, closed.body);
        assert_ne!(closed.header("x-request-id"), again.header("x-request-id"));
    }
    assert_eq!(gateway.metric("forebay_retries_total{reason=\"reset\"}"), 0.0);
    assert_eq!(gateway.metric("forebay_worker_health_score{worker=\"w0\"}"), 1.0);
}

/// Who hangs up on a new connection did not close an idle one.
#[test]
fn a_name_that_leads_elsewhere_is_followed() {
    let directory = tempfile::tempdir().expect("a directory");
    let hosts = directory.path().join("hosts");
    let leads_to = |address: &str| std::fs::write(&hosts, format!("{address} worker.example\n")).expect("written");
    leads_to("127.0.0.1");
    let first = Worker::start(&["--model", "m"]);
    let port = first.address.port();
    let models =
        format!("[[model]]\nname = \"m\"\n[[model.worker]]\nname = \"w\"\nurl = \"http://worker.example:{port}\"\n");
    let Some(gateway) = Gateway::start_with_hosts(&hosts, &models) else {
        // Past what the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "skipped: a_name_that_leads_elsewhere_is_followed needs a mount namespace");
        return;
    };
    assert_eq!(gateway.post(CHAT, &chat("first", "")).status, 200);
    assert_eq!(first.finished(), 1);

    // The server goes, and comes back elsewhere under its name.
    let second = Recorder::start_at(([127, 0, 0, 2], port).into(), "m", vec![json("200 OK", ANSWER)]);
    leads_to("127.0.0.2");
    drop(first);
    eventually("an answer from where the name leads now", || {
        (gateway.post(CHAT, &chat("second", "")).status == 200).then_some(())
    });
    assert_eq!(second.posts().iter().filter(|post| post.path() == CHAT).count(), 1);
}

#[test]
fn a_new_connection_that_closes_is_a_failure() {
    let recorder = Recorder::start("m", vec![vec![Step::Reset]]);
    let gateway = once(&recorder);
    for round in 0..5 {
        let answer = gateway.post(CHAT, &chat(&format!("round {round}"), ""));
        assert_eq!(answer.refusal(502), "upstream_error");
        let row = gateway.row_of(&answer);
        assert_eq!((&row["attempts"], &row["outcome"]), (&1.into(), &"failed".into()), "{row}");
        let posts = recorder.posts();
        let asked = posts.iter().filter(|post| post.body == chat(&format!("round {round}"), "").as_bytes()).count();
        // Twice where a connection of the probes was used first.
        assert!((1..=2).contains(&asked), "asked {asked} times");
    }
}

/// The worker speaks HTTP/2 in the clear, as its configuration says: probes, polls and requests share a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_speaks_http2() {
    let (sender, connections) = std::sync::mpsc::channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    TaskTracker::new().spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = sender.send(());
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service_fn(as_an_engine));
            TaskTracker::new().spawn(serving);
        }
    });
    let asking = tokio::task::spawn_blocking(move || {
        let extra = format!("tokenizer = {:?}\n", tokenizer());
        let gateway = Gateway::start(&format!("{}http2 = true\n", model("m", &[address], &extra)));
        for number in 0..50 {
            let answer = gateway.post(CHAT, &chat(&format!("{number}"), ""));
            assert_eq!((answer.status, answer.text().as_str()), (200, ANSWER));
        }
        connections.try_iter().count()
    });
    // One for a while each to probe it, to poll it, and to send it requests.
    let connections = asking.await.expect("every answer");
    assert!(connections <= 5, "{connections} connections for 50 requests");
}

async fn as_an_engine(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = match request.uri().path() {
        "/v1/models" => {
            r#"{"object":"list","data":[{"id":"m","object":"model","owned_by":"vllm","max_model_len":4096}]}"#
        }
        "/version" => r#"{"version":"0.32.0"}"#,
        "/v1/chat/completions" => ANSWER,
        _ => "",
    };
    let answer = Response::builder().header("content-type", "application/json");
    Ok(answer.body(Full::new(Bytes::from_static(body.as_bytes()))).expect("an answer"))
}
