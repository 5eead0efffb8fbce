//! `/generate` and `/generate_stream`, for servers that have no OpenAI routes.

use bytes::Bytes;
use forebay_proto::peek::COMPLETION_TOKENS;
use serde_json::{Map, Value, json};

use super::{NAME, finish_reason, grammar};
use crate::engines::{
    Asked, Members, Prepared, Translation, Unsupported,
    answer::Translator,
    chunks::{Chunks, Cost, Piece},
    fields::refuse_unheeded,
};

/// Its parameters that have the names and meanings that others have for them.
const SAME: [&str; 6] = ["seed", "top_p", "top_k", "typical_p", "repetition_penalty", "frequency_penalty"];
/// The first two by the template, which is written here.
const HEEDED: &[&str] = &[
    "reasoning_effort",
    "chat_template_kwargs",
    "top_k",
    "typical_p",
    "repetition_penalty",
    "response_format",
    "stop",
    "truncate_prompt_tokens",
];

pub(super) fn adapt(asked: &Asked, members: &Members<'_>) -> Result<Prepared, Unsupported> {
    refuse_unheeded(NAME, members, HEEDED)?;
    if members.get("tools").is_some_and(|tools| tools != "[]") {
        return Err(Unsupported::field(NAME, "tools"));
    }
    let inputs = match &asked.written.text {
        Some(text) => text.clone(),
        None => prompt(members)?,
    };
    let path = if asked.streamed { "/generate_stream" } else { "/generate" };
    let body = json!({"inputs": inputs, "parameters": parameters(asked, members)}).to_string();
    let model = members.get_as("model").unwrap_or_default();
    let translation = Some(Translation::new(Native(Chunks::new(asked.api, model))));
    Ok(Prepared { path, headers: &[], body: body.into(), translation })
}

fn prompt(members: &Members<'_>) -> Result<String, Unsupported> {
    match members.get_as::<Value>("prompt") {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(list)) if list.len() == 1 => {
            list.first().and_then(Value::as_str).map(str::to_owned).ok_or_else(|| Unsupported::field(NAME, "prompt"))
        }
        _ => Err(Unsupported::value(NAME, "prompt", "one text is taken, no list")),
    }
}

fn parameters(asked: &Asked, members: &Members<'_>) -> Map<String, Value> {
    let get = |name: &str| members.get_as::<Value>(name);
    let mut parameters = Map::new();
    parameters.insert("details".to_owned(), true.into());
    // Without it a whole answer does not tell the prompt's length.
    parameters.insert("decoder_input_details".to_owned(), (!asked.streamed).into());
    // For a chat it is what is left, as is its own.
    let completion = asked.written.text.is_none().then(|| json!(COMPLETION_TOKENS));
    if let Some(most) = get("max_completion_tokens").or_else(|| get("max_tokens")).or(completion) {
        parameters.insert("max_new_tokens".to_owned(), most);
    }
    let temperature = members.get_as::<f64>("temperature").unwrap_or(1.0);
    parameters.insert("do_sample".to_owned(), (temperature > 0.0).into());
    if temperature > 0.0 {
        parameters.insert("temperature".to_owned(), temperature.into());
    }
    for name in SAME {
        // Refused in place of "all of them".
        let idle = name == "top_p" && members.get_as::<f64>(name) == Some(1.0);
        if let Some(value) = get(name).filter(|_| !idle) {
            parameters.insert(name.to_owned(), value);
        }
    }
    if let Some(most) = get("truncate_prompt_tokens") {
        parameters.insert("truncate".to_owned(), most);
    }
    match get("stop") {
        Some(Value::String(stop)) => drop(parameters.insert("stop".to_owned(), json!([stop]))),
        Some(list) => drop(parameters.insert("stop".to_owned(), list)),
        None => {}
    }
    if let Some(grammar) = get("response_format").as_ref().and_then(grammar) {
        parameters.insert("grammar".to_owned(), grammar);
    }
    parameters
}

struct Native(Chunks);

impl Translator for Native {
    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) -> bool {
        let Ok(own) = serde_json::from_slice::<Value>(data) else { return false };
        let Some(token) = own.get("token") else { return false };
        let details = own.get("details").filter(|details| !details.is_null());
        let special = token.get("special").and_then(Value::as_bool).unwrap_or_default();
        let text = token.get("text").and_then(Value::as_str).filter(|_| !special).unwrap_or_default();
        let finish = details.and_then(|details| details.get("finish_reason")?.as_str()).map(finish_reason);
        self.0.piece(Piece { text: text.to_owned(), finish, ..Piece::default() }, out);
        if let Some(details) = details {
            let count = |key| details.get(key).and_then(Value::as_u64).unwrap_or_default();
            let cost = Cost { prompt_tokens: count("input_length"), output_tokens: count("generated_tokens") };
            self.0.end(cost, out);
        }
        true
    }

    fn whole(&mut self, body: &Bytes) -> Option<Bytes> {
        let own: Value = serde_json::from_slice(body).ok()?;
        let details = own.get("details")?;
        let piece = Piece {
            text: own.get("generated_text")?.as_str()?.to_owned(),
            finish: Some(finish_reason(details.get("finish_reason")?.as_str()?)),
            ..Piece::default()
        };
        let cost = Cost {
            prompt_tokens: details.get("prefill").and_then(Value::as_array).map_or(0, Vec::len) as u64,
            output_tokens: details.get("generated_tokens").and_then(Value::as_u64).unwrap_or_default(),
        };
        Some(self.0.whole(piece, cost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::{Api, Engine, tgi::Tgi};

    fn asked(api: Api, body: &str, streamed: bool, text: Option<&str>) -> Asked {
        let mut asked = Asked::new(api, body.to_owned().into(), streamed);
        asked.server.openai_routes = false;
        asked.written.text = text.map(str::to_owned);
        asked
    }

    #[test]
    fn requests() {
        let body = r#"{"model":"m","prompt":["hi"],"temperature":0,"top_p":1.0,"top_k":5,"stop":"x","max_tokens":3}"#;
        let prepared = Tgi.adapt(asked(Api::Completions, body, true, None)).expect("it can");
        let sent: Value = serde_json::from_slice(&prepared.body).expect("JSON");
        let expected = json!({"inputs": "hi", "parameters": {"details": true, "decoder_input_details": false,
            "max_new_tokens": 3, "do_sample": false, "top_k": 5, "stop": ["x"]}});
        assert_eq!((prepared.path, sent), ("/generate_stream", expected));
        let chat = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":0.5}"#;
        let prepared = Tgi.adapt(asked(Api::ChatCompletions, chat, false, Some("<user>hi"))).expect("it can");
        let sent: Value = serde_json::from_slice(&prepared.body).expect("JSON");
        assert_eq!(
            (prepared.path, &sent["inputs"], &sent["parameters"]["temperature"]),
            ("/generate", &"<user>hi".into(), &0.5.into())
        );
        assert!(sent["parameters"].get("max_new_tokens").is_none());
        for (body, field) in [(r#"{"prompt":["a","b"]}"#, "prompt"), (r#"{"prompt":"a","tools":[{}]}"#, "tools")] {
            let refused = Tgi.adapt(asked(Api::Completions, body, false, None)).expect_err("it cannot");
            assert_eq!(refused.param.as_deref(), Some(field));
        }
    }

    #[test]
    fn streams_wherever_they_are_cut() {
        let token = |text: &str, rest: &str| {
            format!(
                "data:{{\"index\":1,\"token\":{{\"id\":1,\"text\":{text:?},\"special\":{}}},{rest}}}\n\n",
                text == "</s>"
            )
        };
        let details = r#"{"finish_reason":"eos_token","generated_tokens":3,"seed":null,"input_length":5}"#;
        let last = &format!(r#""generated_text":"Kyōto 🦀","details":{details}"#);
        let open = r#""generated_text":null,"details":null"#;
        let stream = [token("Kyō", open), token("to 🦀", open), ":\n\n".to_owned(), token("</s>", last)].concat();
        let bytes = Bytes::from(stream);
        for cut in 0..=bytes.len() {
            let mut translation = Translation::new(Native(Chunks::new(Api::ChatCompletions, "m".to_owned())));
            let mut out = translation.push(bytes.slice(..cut)).expect("short").to_vec();
            out.extend_from_slice(&translation.push(bytes.slice(cut..)).expect("short"));
            out.extend_from_slice(&translation.finish(None));
            let text = String::from_utf8(out).expect("UTF-8");
            let events: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
            assert_eq!(events.len(), 5, "{text}");
            let chunk = |at: usize| serde_json::from_str::<Value>(events[at]).expect("JSON");
            let said = |at: usize| chunk(at)["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
            assert_eq!((said(0).as_deref(), said(1).as_deref(), said(2)), (Some("Kyō"), Some("to 🦀"), None));
            assert_eq!(chunk(2)["choices"][0]["finish_reason"], "stop");
            assert_eq!(chunk(3)["usage"], json!({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}));
            assert_eq!(events[4], "[DONE]");
        }
    }

    #[test]
    fn whole_answers() {
        let body =
            br#"{"generated_text":"hi","details":{"finish_reason":"length","generated_tokens":1,"prefill":[{},{}]}}"#;
        let mut native = Native(Chunks::new(Api::Completions, "m".to_owned()));
        let answer: Value =
            serde_json::from_slice(&native.whole(&Bytes::from_static(body)).expect("an answer")).expect("JSON");
        assert_eq!(
            (&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]),
            (&"hi".into(), &"length".into())
        );
        assert_eq!(answer["usage"]["total_tokens"], 3);
        for none in [&b"{}"[..], b"[]", b"", br#"{"generated_text":"x"}"#] {
            assert!(native.whole(&Bytes::copy_from_slice(none)).is_none());
        }
    }
}
