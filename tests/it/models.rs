//! `GET /v1/models` and `GET /v1/models/{id}`: configured models and their aliases, in OpenAI's shape.

use super::support::client::{self, Answer};
use super::support::eventually;
use super::support::process::{Gateway, model};
use super::support::recorder::{Recorder, json};

/// Two models, of which the first is called by two aliases and the second has a slash and a longer context of its own.
fn serving() -> (Gateway, Recorder) {
    let recorder = Recorder::start("upstream-name", vec![json("200 OK", "{}")]);
    let second = format!(
        "[[model]]\nname = \"org/Model-2\"\nmax_model_len = 512\n[[model.worker]]\nname = \"other\"\nurl = \"http://{}\"\n",
        recorder.address
    );
    let models = model("m", &[recorder.address], "aliases = [\"gpt-4o-mini\", \"a b\"]\n") + &second;
    let gateway = Gateway::start_unready("", &models, &[]);
    // The context's length is the worker's own word.
    eventually("the worker to be known", || {
        (client::get(gateway.client, "/v1/models/m").json()["max_model_len"] == 4096).then_some(())
    });
    (gateway, recorder)
}

fn shown(answer: &Answer) -> serde_json::Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert!(answer.header("x-request-id").is_some());
    answer.json()
}

#[test]
fn models_and_aliases_are_listed() {
    let (gateway, _recorder) = serving();
    let list = shown(&client::get(gateway.client, "/v1/models"));
    assert_eq!(list["object"], "list");
    let data = list["data"].as_array().expect("an array");
    let entries: Vec<_> =
        data.iter().map(|e| (e["id"].as_str(), e["root"].as_str(), e["max_model_len"].as_u64())).collect();
    assert_eq!(
        entries,
        [
            (Some("m"), Some("m"), Some(4096)),
            (Some("gpt-4o-mini"), Some("m"), Some(4096)),
            (Some("a b"), Some("m"), Some(4096)),
            (Some("org/Model-2"), Some("org/Model-2"), Some(512)),
        ]
    );
    for entry in data {
        assert_eq!(entry["object"], "model");
        assert!(entry["created"].as_u64().is_some_and(|seconds| seconds > 1_700_000_000), "{entry}");
        assert!(entry["owned_by"].as_str().is_some_and(|owner| !owner.is_empty()), "{entry}");
    }
    assert!(!list.to_string().contains("upstream-name"), "an engine's own name stays inside: {list}");
}

#[test]
fn one_model_by_name_and_alias() {
    let (gateway, _recorder) = serving();
    let list = shown(&client::get(gateway.client, "/v1/models"));
    for (index, path) in ["m", "gpt-4o-mini", "a%20b", "org/Model-2"].iter().enumerate() {
        let one = shown(&client::get(gateway.client, &format!("/v1/models/{path}")));
        assert_eq!(one, list["data"][index], "{path}");
    }
    let escaped = shown(&client::get(gateway.client, "/v1/models/org%2FModel-2"));
    assert_eq!(escaped["id"], "org/Model-2", "the SDKs escape the slash");
}

#[test]
fn other_names_are_not_found() {
    let (gateway, recorder) = serving();
    for (path, code) in [
        ("/v1/models/M", "model_not_found"),
        ("/v1/models/upstream-name", "model_not_found"),
        ("/v1/models/org", "model_not_found"),
        ("/v1/models/m/", "model_not_found"),
        ("/v1/models/%00%22", "model_not_found"),
        ("/v1/models/%ff", "model_not_found"),
    ] {
        let answer = client::get(gateway.client, path);
        assert_eq!((answer.status, &answer.error()["code"]), (404, &code.into()), "{path}");
    }
    assert_eq!(client::get(gateway.client, "/v1/models/").status, 404);
    assert!(recorder.posts().is_empty());
}

#[test]
fn a_name_means_what_fits_it_best() {
    let recorder = Recorder::start("upstream-name", vec![json("200 OK", "{}")]);
    let named = |name: &str, extra: &str| {
        let worker = format!("[[model.worker]]\nname = \"{name}'s\"\nurl = \"http://{}\"\n", recorder.address);
        format!("[[model]]\nname = \"{name}\"\n{extra}\n{worker}")
    };
    let models = named("any", "aliases = [\"gpt-*\"]\ndefault = true")
        + &named("mini", "aliases = [\"gpt-*-mini\"]")
        + &named("llama@2", "")
        + &named("llama@10", "");
    let gateway = Gateway::start(&models);
    for (asked, model) in [
        (r#""model":"any","#, "any"),
        (r#""model":"gpt-4o","#, "any"),
        (r#""model":"gpt-4o-mini","#, "mini"),
        (r#""model":"local/mini","#, "mini"),
        (r#""model":"llama","#, "llama@10"),
        (r#""model":"llama@latest","#, "llama@10"),
        (r#""model":"llama@2","#, "llama@2"),
        ("", "any"),
        (r#""model":null,"#, "any"),
        (r#""model":"","#, "any"),
    ] {
        let answer = gateway.post("/v1/completions", &format!("{{{asked}\"prompt\":\"a\"}}"));
        assert_eq!((answer.status, answer.header("x-forebay-model")), (200, Some(model)), "{asked}: {}", answer.text());
        let sent: serde_json::Value =
            serde_json::from_slice(&recorder.posts().last().expect("it came").body).expect("JSON");
        assert_eq!((&sent["model"], &sent["prompt"]), (&"upstream-name".into(), &"a".into()), "{asked}");
    }
    for asked in ["gpt", "llama@3", "cloud/mini", "*"] {
        let answer = gateway.post("/v1/completions", &format!(r#"{{"model":"{asked}","prompt":"a"}}"#));
        assert_eq!((answer.status, &answer.error()["code"]), (404, &"model_not_found".into()), "{asked}");
    }
    let list = shown(&client::get(gateway.client, "/v1/models"));
    let ids: Vec<_> = list["data"].as_array().expect("an array").iter().map(|entry| entry["id"].clone()).collect();
    assert_eq!(ids, ["any", "mini", "llama@2", "llama@10"], "a pattern is no name");
    assert_eq!(shown(&client::get(gateway.client, "/v1/models/gpt-4o-mini"))["id"], "mini");
}
