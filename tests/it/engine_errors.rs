//! What an engine refuses: its status and words stay, in OpenAI's shape, and nothing of where it runs.

use super::support::client::Answer;
use super::support::process::Gateway;
use super::support::recorder::{Recorder, json, json_with};

const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;

fn setting() -> (Gateway, Recorder) {
    let recorder = Recorder::start("m", vec![json("200 OK", "{}")]);
    (Gateway::before(&[recorder.address]), recorder)
}

fn ask(gateway: &Gateway) -> Answer {
    gateway.post("/v1/chat/completions", BODY)
}

/// Two good answers, so that the worker is not left alone for its failures.
fn recover(gateway: &Gateway, recorder: &Recorder) {
    recorder.play(json("200 OK", "{}"));
    for _ in 0..2 {
        assert_eq!(ask(gateway).status, 200);
    }
}

#[test]
fn refusals_keep_status_and_message() {
    let (gateway, recorder) = setting();
    for (status, body, message, code) in [
        // vLLM, with its numeric code.
        (
            "400 Bad Request",
            r#"{"error":{"message":"top_k must be -1 (disable), or at least 1, got 0.","type":"BadRequestError","param":"top_k","code":400}}"#,
            "top_k must be -1 (disable), or at least 1, got 0.",
            None,
        ),
        (
            "400 Bad Request",
            r#"{"error":{"message":"This model's maximum context length is 32 tokens. However, you requested 40.","type":"BadRequestError","param":"input_tokens","code":400}}"#,
            "This model's maximum context length is 32 tokens. However, you requested 40.",
            Some("context_length_exceeded"),
        ),
        (
            "404 Not Found",
            r#"{"error":{"message":"The model `org/real` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            "The model `org/real` does not exist.",
            Some("model_not_found"),
        ),
        // SGLang's flat shape, TGI's, FastAPI's, OpenAI's own.
        (
            "400 Bad Request",
            r#"{"object":"error","message":"bad","type":"BadRequest","param":null,"code":400}"#,
            "bad",
            None,
        ),
        (
            "422 Unprocessable Entity",
            r#"{"error":"`temperature` must be strictly positive","error_type":"validation"}"#,
            "`temperature` must be strictly positive",
            None,
        ),
        (
            "422 Unprocessable Entity",
            r#"{"detail":[{"loc":["body","n"],"msg":"too many","type":"x"}]}"#,
            "body.n: too many",
            None,
        ),
        (
            "409 Conflict",
            r#"{"error":{"message":"busy","type":"conflict","param":null,"code":"slot_taken"}}"#,
            "busy",
            Some("slot_taken"),
        ),
        ("413 Payload Too Large", "too big", "too big", None),
    ] {
        let before = recorder.posts().len();
        recorder.play(json(status, body));
        let answer = ask(&gateway);
        assert_eq!(answer.status.to_string(), status[..3], "{}", answer.text());
        let error = answer.error();
        assert_eq!((error["message"].as_str(), error["code"].as_str()), (Some(message), code), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(recorder.posts().len(), before + 1, "not tried again");
        let row = gateway.row(answer.header("x-request-id").expect("a name"));
        assert_eq!(row["outcome"], "engine_refused", "{row}");
    }
}

#[test]
fn a_body_without_words_still_has_the_shape() {
    let (gateway, recorder) = setting();
    for body in [
        "",
        "null",
        "[]",
        "{}",
        "<html><body>oops</body></html>",
        "\u{0}\u{1}",
        r#"{"error":null}"#,
        r#"{"error":{"message":7}}"#,
    ] {
        recorder.play(json("400 Bad Request", body));
        let answer = ask(&gateway);
        assert_eq!(answer.status, 400);
        let message = answer.error()["message"].as_str().expect("a message").to_owned();
        assert!(message.contains("400") && !message.contains("html"), "{message}");
    }
    // Longer than anybody reads, and without an end.
    let long = format!(r#"{{"error":{{"message":"{}","code":400}}}}"#, "long ".repeat(300_000));
    recorder.play(json("400 Bad Request", &long));
    let answer = ask(&gateway);
    assert_eq!(answer.status, 400);
    answer.error();
    assert!(answer.body.len() < 8192, "{}", answer.body.len());
}

/// The gateway's own key is no business of the client's: an SDK that reads 401 throws a good key away.
#[test]
fn a_key_that_the_engine_refuses_is_not_the_clients() {
    let (gateway, recorder) = setting();
    for status in ["401 Unauthorized", "403 Forbidden", "407 Proxy Authentication Required"] {
        recover(&gateway, &recorder);
        recorder.play(json_with(
            status,
            "www-authenticate: Bearer\r\n",
            r#"{"error":"Unauthorized: Bearer sk-secret-12345678"}"#,
        ));
        let answer = ask(&gateway);
        assert_eq!(answer.status, 502, "{}", answer.text());
        let error = answer.error();
        assert_eq!((&error["type"], &error["code"]), (&"server_error".into(), &"upstream_error".into()));
        assert!(!answer.text().contains("Unauthorized") && !answer.text().contains("sk-"), "{}", answer.text());
        assert_eq!(answer.header("www-authenticate"), None);
    }
}

#[test]
fn hosts_paths_and_keys_stay_inside() {
    let (gateway, recorder) = setting();
    for (said, secret) in [
        ("cannot reach http://10.1.2.3:8000/v1/x for you", "10.1.2.3"),
        ("connection to gpu-a.cluster.local:5557 failed", "gpu-a"),
        ("no file /opt/models/llama/config.json here", "/opt/models"),
        ("invalid key sk-abcdefgh12345678 given", "sk-abcdefgh"),
        ("Authorization: Bearer abc.def.ghi is wrong", "abc.def"),
        ("[Errno 2] '/root/.cache/huggingface/token'", "/root"),
    ] {
        for status in ["400 Bad Request", "500 Internal Server Error"] {
            recover(&gateway, &recorder);
            recorder.play(json(status, &serde_json::json!({"error": {"message": said, "code": 1}}).to_string()));
            let answer = ask(&gateway);
            assert_eq!(answer.status, if status.starts_with('4') { 400 } else { 502 });
            answer.error();
            assert!(!answer.text().contains(secret), "{}", answer.text());
            let address = recorder.address.to_string();
            assert!(!answer.text().contains(&address), "{}", answer.text());
        }
    }
}

/// What the engine cannot do with this model is the client's to know, and no fault of the worker.
#[test]
fn what_is_not_implemented_is_refused_once() {
    let (gateway, recorder) = setting();
    let said =
        r#"{"error":{"code":501,"message":"This server does not support embeddings.","type":"not_supported_error"}}"#;
    recorder.play(json("501 Not Implemented", said));
    for count in 1..=6 {
        let answer = gateway.post("/v1/embeddings", r#"{"model":"m","input":"hi"}"#);
        assert_eq!(answer.refusal(400), "unsupported_api");
        assert_eq!(answer.error()["message"], "This server does not support embeddings.");
        assert_eq!(gateway.row_of(&answer)["outcome"], "engine_refused");
        assert_eq!(recorder.posts().len(), count, "asked once, and still asked: the worker is well");
    }
}

/// Redirects lead nowhere; answers that are no answers are failures.
#[test]
fn strange_statuses_are_bad_gateways() {
    let (gateway, recorder) = setting();
    for (status, headers) in [
        ("307 Temporary Redirect", "location: http://127.0.0.1:1/v1/chat/completions/\r\n"),
        ("302 Found", "location: /elsewhere\r\n"),
        ("500 Internal Server Error", ""),
        ("502 Bad Gateway", ""),
        ("599 Odd", ""),
    ] {
        recover(&gateway, &recorder);
        recorder.play(json_with(status, headers, "{}"));
        let answer = ask(&gateway);
        assert_eq!(answer.status, 502, "{status}: {}", answer.text());
        assert_eq!(
            (&answer.error()["type"], &answer.error()["code"]),
            (&"server_error".into(), &"upstream_error".into())
        );
        assert_eq!(answer.header("location"), None);
    }
}

/// What stands where an engine was (a proxy's page, an empty answer) is no answer, whatever its status says.
#[test]
fn successes_that_are_none_are_failures() {
    let (gateway, recorder) = setting();
    for (what, status, headers, body) in [
        ("no content", "204 No Content", "", ""),
        ("a part", "206 Partial Content", "", "{}"),
        ("compressed", "200 OK", "content-encoding: gzip\r\n", "\u{1f}"),
    ] {
        recorder.play(json_with(status, headers, body));
        let answer = ask(&gateway);
        assert_eq!(answer.refusal(502), "upstream_error", "{what}");
        assert_eq!(gateway.row_of(&answer)["outcome"], "failed", "{what}");
        recover(&gateway, &recorder);
    }
    let page = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 16\r\n\r\n<h1>nginx</h1>\r\n";
    recorder.play(vec![super::support::recorder::Step::Write(page.into())]);
    let answer = ask(&gateway);
    assert_eq!(answer.refusal(502), "upstream_error");
    assert!(!answer.text().contains("nginx"), "{}", answer.text());
}
