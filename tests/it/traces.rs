//! Traces as a collector gets them: a real gRPC server that reads them by the official definitions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::support::body::{ANSWER, FINISH, chat, delta, streamed};
use super::support::client;
use super::support::eventually;
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, Step, json, stream};

const CHAT: &str = "/v1/chat/completions";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

#[derive(Clone, Default)]
struct Collector {
    exports: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    /// Of each export.
    rejects: i64,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.exports.lock().unwrap().push(request.into_inner());
        let partial = ExportTracePartialSuccess { rejected_spans: self.rejects, error_message: "too many".to_owned() };
        let partial_success = (self.rejects > 0).then_some(partial);
        Ok(Response::new(ExportTraceServiceResponse { partial_success }))
    }
}

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        Self::that_rejects(0).await
    }

    async fn that_rejects(rejects: i64) -> (Self, SocketAddr) {
        let collector = Self { rejects, ..Self::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let service = TraceServiceServer::new(collector.clone());
        let serving = tonic::transport::Server::builder().add_service(service);
        TaskTracker::new().spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
        (collector, address)
    }

    /// All spans of the trace of this request, by name, once they are there.
    fn spans(&self, request: &str) -> BTreeMap<String, Span> {
        eventually("the request's spans", || {
            let exports = self.exports.lock().unwrap();
            let spans = || exports.iter().flat_map(|export| &export.resource_spans).flat_map(|all| &all.scope_spans);
            let spans: Vec<&Span> = spans().flat_map(|scope| &scope.spans).collect();
            let own = spans.iter().find(|span| text(span, "forebay.request").as_deref() == Some(request))?;
            let of_it = spans.iter().filter(|span| span.trace_id == own.trace_id);
            Some(of_it.map(|span| (span.name.clone(), (*span).clone())).collect())
        })
    }
}

/// Nobody listens there.
fn nowhere() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address")
}

fn value(span: &Span, key: &str) -> Option<Value> {
    span.attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value
}

fn text(span: &Span, key: &str) -> Option<String> {
    match value(span, key) {
        Some(Value::StringValue(text)) => Some(text),
        _ => None,
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A gateway that tells this collector; its model says `more`.
fn start(recorder: &Recorder, collector: SocketAddr, more: &str) -> Gateway {
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n{more}", tokenizer()));
    let gateway = Gateway::start_unready(&format!("otlp = \"http://{collector}\"\n"), &models, &[]);
    gateway.until_ready();
    gateway
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_requests_way_is_told_to_the_collector() {
    let (collector, address) = Collector::start().await;
    let asking = tokio::task::spawn_blocking(move || {
        let recorder = Recorder::start("m", vec![stream(&[&delta("one"), &delta("two"), FINISH])]);
        let gateway = start(&recorder, address, "");
        let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
        let answer = client::post_with(gateway.client, CHAT, &[&parent, "tracestate: a=1,b=2"], &streamed("hello"));
        assert_eq!(answer.stream_end(), Ok(()));
        let post = recorder.posts().pop().expect("a request");
        let spans = collector.spans(answer.header("x-request-id").expect("a name"));

        let names: Vec<&str> = spans.keys().map(String::as_str).collect();
        assert_eq!(names, ["POST /v1/chat/completions", "chat m", "first_token", "prepare", "queue"]);
        let [root, attempt, first, prepare, queue] = std::array::from_fn(|at| &spans[names[at]]);
        assert!(spans.values().all(|span| hexadecimal(&span.trace_id) == TRACE));
        assert_eq!(hexadecimal(&root.parent_span_id), PARENT);
        for child in [attempt, prepare, queue] {
            assert_eq!(child.parent_span_id, root.span_id, "{}", child.name);
        }
        assert_eq!(first.parent_span_id, attempt.span_id);
        assert_eq!((root.kind, attempt.kind, queue.kind), (2, 3, 1), "server, client, internal");
        // The engine stands below the attempt.
        let told = format!("00-{TRACE}-{}-01", hexadecimal(&attempt.span_id));
        assert_eq!((post.header("traceparent"), post.header("tracestate")), (Some(&*told), Some("a=1,b=2")));
        // One after the other, and all within the request.
        let time = |span: &Span| (span.start_time_unix_nano, span.end_time_unix_nano);
        assert!(spans.values().all(|span| time(span).0 <= time(span).1));
        assert!(spans.values().all(|span| time(root).0 <= time(span).0 && time(span).1 <= time(root).1));
        assert!(time(prepare).1 <= time(queue).0 && time(queue).1 <= time(attempt).0);
        assert!(time(first).0 == time(attempt).0 && time(first).1 <= time(attempt).1);

        for (span, key, expected) in [
            (root, "http.route", Value::StringValue(CHAT.to_owned())),
            (root, "http.request.method", Value::StringValue("POST".to_owned())),
            (root, "http.response.status_code", Value::IntValue(200)),
            (attempt, "gen_ai.operation.name", Value::StringValue("chat".to_owned())),
            (attempt, "gen_ai.provider.name", Value::StringValue("vllm".to_owned())),
            (attempt, "gen_ai.request.model", Value::StringValue("m".to_owned())),
            (attempt, "gen_ai.request.stream", Value::BoolValue(true)),
            (attempt, "gen_ai.usage.output_tokens", Value::IntValue(2)),
            (attempt, "forebay.worker", Value::StringValue("w0".to_owned())),
        ] {
            assert_eq!(value(span, key), Some(expected), "{key}");
        }
        assert!(
            matches!(value(attempt, "gen_ai.response.time_to_first_chunk"), Some(Value::DoubleValue(s)) if s > 0.0)
        );
        assert_eq!(value(root, "error.type"), None);

        // Whoever came before decides what is recorded; what is not, passes as it is.
        let unsampled = format!("traceparent: 00-{TRACE}-{PARENT}-00");
        client::post_with(gateway.client, CHAT, &[&unsampled], &streamed("unsampled"));
        let passed = recorder.posts().pop().expect("a request");
        assert_eq!(passed.header("traceparent"), unsampled.strip_prefix("traceparent: "));

        // What cannot be read begins a new trace; a refusal is an error.
        let answer = client::post_with(gateway.client, CHAT, &["traceparent: 00-0-0-01"], "{}");
        let refused = collector.spans(answer.header("x-request-id").expect("a name"));
        let root = refused.get("POST /v1/chat/completions").expect("the request");
        assert_eq!((refused.len(), root.parent_span_id.len()), (1, 0));
        assert_eq!(value(root, "http.response.status_code"), Some(Value::IntValue(400)));
        assert_eq!(
            (text(root, "error.type").as_deref(), root.status.as_ref().map(|s| s.code)),
            (Some("refused"), Some(2))
        );
        assert_eq!(gateway.metric("forebay_spans_dropped_total"), 0.0);
    });
    asking.await.expect("all is told");
}

#[test]
fn without_a_collector_requests_are_served_and_spans_counted() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = start(&recorder, nowhere(), "");
    for number in 0..10 {
        assert_eq!(gateway.post(CHAT, &chat(&format!("{number}"), "")).status, 200);
    }
    let dropped = eventually("all of them to be dropped", || {
        Some(gateway.metric("forebay_spans_dropped_total")).filter(|dropped| *dropped >= 50.0)
    });
    assert_eq!(dropped, 50.0, "five of each request");
    eventually("a word on it", || {
        gateway.process.err().contains("the collector does not take all traces").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_a_collector_does_not_take_are_counted() {
    let (collector, address) = Collector::that_rejects(2).await;
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = start(&recorder, address, "");
    let answer = gateway.post(CHAT, &chat("a", ""));
    collector.spans(answer.header("x-request-id").expect("every answer is named"));
    eventually("two of them to be dropped", || (gateway.metric("forebay_spans_dropped_total") == 2.0).then_some(()));
    eventually("the collector's reason", || gateway.process.err().contains("too many").then_some(()));
}

#[test]
fn a_call_that_can_be_shared_stands_in_the_trace_of_the_first() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    let gateway = start(&recorder, nowhere(), "coalesce = true\n");
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let answer = client::post_with(gateway.client, CHAT, &[&parent], &chat("hello", r#","temperature":0"#));
    assert_eq!((answer.status, answer.header("x-forebay-cache")), (200, Some("miss")));
    let post = recorder.posts().pop().expect("a request");
    let told = post.header("traceparent").expect("a parent");
    assert!(told.contains(TRACE) && !told.contains(PARENT), "below the request's own span: {told}");
}

#[test]
fn calls_of_several_and_of_one_of_them_are_told_apart() {
    let answer = |data: &str| json("200 OK", &format!(r#"{{"object":"list","data":[{data}],"model":"m"}}"#));
    let one = answer(r#"{"object":"embedding","index":0,"embedding":[0.5]}"#);
    let recorder = Recorder::start("m", vec![[vec![Step::Gate], one.clone()].concat(), one]);
    // Two of three tokens fill a call. They get an answer that is not an answer to both.
    let gateway = start(&recorder, nowhere(), "[model.micro_batch]\nmax_delay_ms = 10000\nmax_tokens = 6\n");
    let mut clients = [1, 2, 3].map(|number| {
        let mut client = client::Connection::to(gateway.client);
        let parent = format!("traceparent: 00-{number:032x}-{PARENT}-01");
        client.post("/v1/embeddings", &[&parent], br#"{"model":"m","input":[1,2,3]}"#);
        recorder.await_posts(1);
        client
    });
    let posts = recorder.await_posts(4);
    recorder.go_on();
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
    let told: BTreeSet<&str> = posts.iter().filter_map(|post| post.header("traceparent")).collect();
    assert_eq!((posts.len(), told.len()), (4, 4), "{told:?}");
}
