//! Requests as they go out, and answers wherever they are cut.

use std::path::Path;

use bytes::Bytes;
use forebay_tokens::{Special, Tokenizer};
use http::{HeaderMap, HeaderValue, StatusCode};
use prost::Message;
use serde_json::{Value, json};

use super::{
    wire::{
        DataType, InferParameter, ModelConfig, ModelInferRequest, ModelInferResponse, ModelInput, ModelOutput,
        ModelStreamInferResponse, ModelTransactionPolicy, infer_parameter::ParameterChoice,
        model_infer_response::InferOutputTensor,
    },
    *,
};
use crate::{Error, engines::answer::Translator};

const TEXT: &str = "Kyōto 大阪 🦀 naïve — end";

fn tokenizer() -> Arc<Tokenizer> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("simulated-engine/model");
    Arc::new(Tokenizer::from_dir(&directory).expect("the simulated engine's tokenizer"))
}

fn tensors(inputs: &[(&str, DataType)], output: &str, decoupled: bool) -> Arc<Tensors> {
    let input = |(name, kind): &(&str, DataType)| ModelInput {
        name: (*name).to_owned(),
        data_type: (*kind).into(),
        ..Default::default()
    };
    let config = ModelConfig {
        max_batch_size: 8,
        input: inputs.iter().map(input).collect(),
        output: vec![ModelOutput { name: output.to_owned(), ..Default::default() }],
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled }),
        ..Default::default()
    };
    Arc::new(Tensors::of(&config, true).expect("it generates text"))
}

fn by_text(decoupled: bool) -> Arc<Tensors> {
    let inputs = [
        ("text_input", DataType::TypeString),
        ("max_tokens", DataType::TypeInt32),
        ("stop_words", DataType::TypeString),
        ("temperature", DataType::TypeFp32),
        ("top_k", DataType::TypeInt32),
        ("top_p", DataType::TypeFp32),
        ("random_seed", DataType::TypeUint64),
        ("stream", DataType::TypeBool),
    ];
    tensors(&inputs, "text_output", decoupled)
}

fn by_ids() -> Arc<Tensors> {
    let inputs = [
        ("input_ids", DataType::TypeInt32),
        ("input_lengths", DataType::TypeInt32),
        ("request_output_len", DataType::TypeInt32),
        ("end_id", DataType::TypeInt32),
        ("stop_words_list", DataType::TypeInt32),
        ("streaming", DataType::TypeBool),
        ("runtime_top_k", DataType::TypeInt32),
    ];
    tensors(&inputs, "output_ids", true)
}

fn asked(api: Api, body: &str, tensors: &Arc<Tensors>) -> Asked {
    let mut asked = Asked::new(api, body.to_owned().into(), true);
    asked.server.tensors = Some(Arc::clone(tensors));
    asked
}

/// Names, shapes and raw values of a request.
fn sent(prepared: &Prepared) -> (ModelInferRequest, Value) {
    let (head, message) = prepared.body.split_at(5);
    assert_eq!(head, [&[0][..], &u32::try_from(message.len()).expect("short").to_be_bytes()].concat());
    let request = ModelInferRequest::decode(message).expect("a request");
    assert_eq!(request.inputs.len(), request.raw_input_contents.len());
    let tensors = request.inputs.iter().zip(&request.raw_input_contents);
    let value = tensors.map(|(tensor, raw)| (tensor.name.clone(), json!([tensor.datatype, tensor.shape, raw])));
    let value = value.collect::<serde_json::Map<_, _>>().into();
    (request, value)
}

#[test]
fn a_text_goes_out_with_all_that_openai_leaves_to_its_defaults() {
    let body = r#"{"model":"ensemble","prompt":"é","max_tokens":3,"stop":["a","bc"]}"#;
    let prepared = Triton.adapt(asked(Api::Completions, body, &by_text(true))).expect("it can");
    assert_eq!((prepared.path, prepared.headers[0]), (STREAM, ("content-type", "application/grpc")));
    let (request, inputs) = sent(&prepared);
    assert_eq!(request.model_name, "ensemble");
    assert!(request.parameters.contains_key("triton_enable_empty_final_response"));
    assert_eq!(inputs["text_input"], json!(["BYTES", [1, 1], [2, 0, 0, 0, 0xc3, 0xa9]]));
    assert_eq!(inputs["max_tokens"], json!(["INT32", [1, 1], [3, 0, 0, 0]]));
    assert_eq!(inputs["stop_words"], json!(["BYTES", [1, 2], [1, 0, 0, 0, b'a', 2, 0, 0, 0, b'b', b'c']]));
    assert_eq!(inputs["temperature"], json!(["FP32", [1, 1], 1.0_f32.to_le_bytes()]));
    assert_eq!(inputs["top_p"], json!(["FP32", [1, 1], 1.0_f32.to_le_bytes()]));
    assert_eq!(inputs["top_k"], json!(["INT32", [1, 1], [0, 0, 0, 0]]));
    assert_eq!(inputs["stream"], json!(["BOOL", [1, 1], [1]]));
    let seed = |body: &str| sent(&Triton.adapt(asked(Api::Completions, body, &by_text(true))).expect("it can")).1;
    assert_ne!(seed(body)["random_seed"], inputs["random_seed"], "two requests are two draws");
    let greedy = seed(r#"{"prompt":["x"],"temperature":0,"seed":7}"#);
    assert_eq!(greedy["random_seed"], json!(["UINT64", [1, 1], 7_u64.to_le_bytes()]));
    assert_eq!((&greedy["top_k"][2], greedy.get("temperature")), (&json!([1, 0, 0, 0]), None));
    assert_eq!(greedy["max_tokens"][2], json!([16, 0, 0, 0]));
    // A model that answers once is asked once.
    let once = Triton.adapt(asked(Api::Completions, body, &by_text(false))).expect("it can");
    assert_eq!((once.path, &sent(&once).1["stream"]), (INFER, &json!(["BOOL", [1, 1], [0]])));
}

#[test]
fn a_conversation_goes_out_as_text_or_ids() {
    let mut chat = asked(Api::ChatCompletions, r#"{"messages":[],"max_tokens":5}"#, &by_text(true));
    chat.written.text = Some("<|start|>user".to_owned());
    assert_eq!(sent(&Triton.adapt(chat).expect("it can")).1["text_input"][2][4], b'<');
    let mut chat = asked(Api::ChatCompletions, r#"{"messages":[],"stop_token_ids":[8,9],"temperature":0}"#, &by_ids());
    chat.written.tokenizer = Some(tokenizer());
    chat.written.ids = Some(vec![5, 6, 700]);
    chat.written.room = Some(40);
    let inputs = sent(&Triton.adapt(chat).expect("it can")).1;
    assert_eq!(inputs["input_ids"], json!(["INT32", [1, 3], [5, 0, 0, 0, 6, 0, 0, 0, 0xbc, 2, 0, 0]]));
    assert_eq!(
        (&inputs["input_lengths"][2], &inputs["request_output_len"][2]),
        (&json!([3, 0, 0, 0]), &json!([40, 0, 0, 0]))
    );
    assert_eq!(inputs["end_id"][2], json!(tokenizer().end().expect("an end token").to_le_bytes()));
    let words = [8, 9, 1, 2].into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>();
    assert_eq!(inputs["stop_words_list"], json!(["INT32", [1, 2, 2], words]));
}

#[test]
fn what_the_model_has_no_input_for_is_refused_by_name() {
    for (tensors, body, field) in [
        (by_text(true), r#"{"prompt":"a","n":2}"#, "n"),
        (by_text(true), r#"{"prompt":"a","top_p":-1}"#, "top_p"),
        (by_text(true), r#"{"prompt":"a","temperature":"hot"}"#, "temperature"),
        (by_text(true), r#"{"prompt":"a","presence_penalty":0.5}"#, "presence_penalty"),
        (by_text(true), r#"{"prompt":"a","response_format":{"type":"json_object"}}"#, "response_format"),
        (by_text(true), r#"{"prompt":"a","stop_token_ids":[1]}"#, "stop_token_ids"),
        (by_text(true), r#"{"prompt":["a","b"]}"#, "prompt"),
        (by_text(true), r#"{"prompt":[1,2]}"#, "prompt"),
        (by_text(true), r#"{"prompt":"a","max_tokens":0}"#, "max_tokens"),
        (by_text(true), r#"{"prompt":"a","stop":7}"#, "stop"),
        (by_text(true), r#"{"prompt":"a","tools":[{}]}"#, "tools"),
        (by_ids(), r#"{"prompt":"a"}"#, "prompt"),
        // What is there in another form is not taken for what is not there.
        (by_text(true), r#"{"prompt":"a","seed":"abc"}"#, "seed"),
        (by_text(true), r#"{"prompt":"a","seed":18446744073709551615}"#, "seed"),
        (by_text(true), r#"{"prompt":"a","seed":7.0}"#, "seed"),
        (by_text(true), r#"{"prompt":"a","min_tokens":-1}"#, "min_tokens"),
        (by_text(true), r#"{"prompt":"a","min_tokens":4.0}"#, "min_tokens"),
        (by_text(true), r#"{"prompt":"a","max_tokens":1.5}"#, "max_tokens"),
        (by_text(true), r#"{"prompt":"a","top_k":1.5}"#, "top_k"),
        (by_text(true), r#"{"prompt":"a","bad_words":"x"}"#, "bad_words"),
        (by_text(true), r#"{"prompt":"a","stop_token_ids":"x"}"#, "stop_token_ids"),
        (by_ids(), r#"{"prompt":"a","stop_token_ids":[7,2147483648]}"#, "stop_token_ids"),
        (by_ids(), r#"{"prompt":"a","stop_token_ids":[-1]}"#, "stop_token_ids"),
        (by_text(true), r#"{"prompt":"a","ignore_eos":"no"}"#, "ignore_eos"),
        (by_text(true), r#"{"prompt":"a","ignore_eos":true}"#, "ignore_eos"),
        (by_text(true), r#"{"prompt":"a","tools":{}}"#, "tools"),
        (by_text(true), r#"{"prompt":"a","temperature":1e39}"#, "temperature"),
        (by_text(true), r#"{"prompt":"a","repetition_penalty":0}"#, "repetition_penalty"),
    ] {
        let refused = Triton.adapt(asked(Api::Completions, body, &tensors)).expect_err(body);
        assert_eq!(refused.param.as_deref(), Some(field), "{body}");
    }
    for idle in [
        r#"{"prompt":"a","presence_penalty":0,"repetition_penalty":1,"response_format":{"type":"text"},"stop":[]}"#,
        r#"{"prompt":"a","tools":[ ],"stop_token_ids":[ ],"bad_words":[],"ignore_eos":false,"min_tokens":0,"top_k":-1}"#,
    ] {
        assert!(Triton.adapt(asked(Api::Completions, idle, &by_text(true))).is_ok(), "{idle}");
    }
    for (value, range) in
        [(r#""presence_penalty":3"#, "a number from -2 to 2"), (r#""top_p":0"#, "a number above 0 and not above 1")]
    {
        let body = format!(r#"{{"prompt":"a",{value}}}"#);
        let refused = Triton.adapt(asked(Api::Completions, &body, &by_text(true))).expect_err("out of range");
        assert!(refused.message.contains(&format!("{range} is taken")), "{}", refused.message);
    }
    let chat = asked(Api::ChatCompletions, "{}", &by_text(true));
    assert_eq!(Triton.adapt(chat).expect_err("no length").param.as_deref(), Some("max_tokens"));
}

/// One message of a stream: these outputs, each with its type's name and raw values.
fn response(outputs: &[(&str, Vec<i64>, Vec<u8>)], last: bool) -> ModelInferResponse {
    let flag = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
    let tensor = |(name, shape, _): &(&str, Vec<i64>, Vec<u8>)| InferOutputTensor {
        name: (*name).to_owned(),
        shape: shape.clone(),
        ..Default::default()
    };
    ModelInferResponse {
        parameters: [("triton_final_response".to_owned(), flag)].into(),
        outputs: outputs.iter().map(tensor).collect(),
        raw_output_contents: outputs.iter().map(|(.., raw)| raw.clone()).collect(),
        ..Default::default()
    }
}

fn said(text: &str, last: bool) -> Bytes {
    let raw = [&u32::try_from(text.len()).expect("short").to_le_bytes()[..], text.as_bytes()].concat();
    streamed(response(&[("text_output", vec![1], raw)], last))
}

fn streamed(response: ModelInferResponse) -> Bytes {
    grpc::frame(&ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) })
}

fn ids_said(ids: &[i32], last: bool) -> Bytes {
    // A row that is longer than what is valid in it.
    let raw: Vec<u8> = ids.iter().chain(&[-1]).flat_map(|id| id.to_le_bytes()).collect();
    let length = i64::try_from(ids.len()).expect("short");
    let valid = i32::try_from(ids.len()).expect("short").to_le_bytes().to_vec();
    streamed(response(&[("output_ids", vec![1, 1, length + 1], raw), ("sequence_length", vec![1, 1], valid)], last))
}

fn answers(output: Output, stops: &[&str]) -> Answers {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    Answers::new((Api::ChatCompletions, "m".to_owned()), output, stops, 1000).streamed(true).several(true)
}

/// All text of a stream, its finish reason and its counts.
fn read(translation: &mut Translation, pieces: &[Bytes]) -> (String, Value, Value) {
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&translation.push(piece.clone()).expect("frames"));
    }
    let (mut text, mut finish, mut usage) = (String::new(), Value::Null, Value::Null);
    for data in String::from_utf8(out).expect("UTF-8").split("\n\n").filter_map(|event| event.strip_prefix("data: ")) {
        if data == "[DONE]" {
            continue;
        }
        let chunk: Value = serde_json::from_str(data).expect("JSON");
        text += chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default();
        let told = |value: &mut Value, new: Option<&Value>| {
            if let Some(new) = new.filter(|new| !new.is_null()) {
                *value = new.clone();
            }
        };
        told(&mut finish, chunk.pointer("/choices/0/finish_reason"));
        told(&mut usage, chunk.get("usage"));
    }
    (text, finish, usage)
}

#[test]
fn ids_become_the_text_that_they_are_together_wherever_they_are_cut() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode(TEXT, Special::Omit).expect("ids");
    let is_broken = |id: &u32| tokenizer.decode(&[*id], Special::Omit).is_ok_and(|text| text.contains('\u{fffd}'));
    assert!(ids.iter().any(is_broken), "some characters have several tokens");
    let end = tokenizer.end().expect("an end token");
    for step in [1, 2, 3, 100] {
        let all: Vec<i32> = ids.iter().chain(&[end]).map(|&id| id.cast_signed()).collect();
        let steps = all.chunks(step).map(|ids| ids_said(ids, false));
        let stream: Vec<u8> = steps.chain([streamed(response(&[], true))]).flatten().collect();
        let stream = Bytes::from(stream);
        for cut in (0..=stream.len()).step_by(if step == 1 { 1 } else { 13 }) {
            let mut translation = Translation::new(answers(Output::ids(&tokenizer, &[]), &[]));
            let (text, finish, usage) = read(&mut translation, &[stream.slice(..cut), stream.slice(cut..)]);
            assert_eq!((text.as_str(), &finish), (TEXT, &json!("stop")), "steps of {step}, cut at {cut}");
            assert_eq!(usage["completion_tokens"], all.len(), "the end token counts, too");
        }
    }
}

#[test]
fn a_stop_word_ends_the_text_before_it_and_the_call() {
    for (stops, expected) in
        [(vec!["大阪"], "Kyōto "), (vec!["never", "naïve —", "e"], "Kyōto 大阪 🦀 naïv"), (vec!["K"], "")]
    {
        let all: Vec<Bytes> = TEXT.chars().map(|c| said(&c.to_string(), false)).collect();
        let fresh = || answers(Output::text(false, None), &stops);
        let mut answers = fresh();
        let mut out = Vec::new();
        let mut read = 0;
        for message in &all {
            assert!(answers.event(&message[5..], &mut out));
            read += 1;
            if answers.is_done() {
                break;
            }
        }
        assert!(read < all.len(), "it is done before the engine is");
        let out = String::from_utf8(out).expect("UTF-8");
        let mut translation = Translation::new(fresh());
        let (text, finish, usage) = self::read(&mut translation, &all);
        assert_eq!((text.as_str(), &finish), (expected, &json!("stop")), "{stops:?}");
        assert_eq!(usage["completion_tokens"], read, "one for each answer where nobody counts");
        assert!(out.ends_with("data: [DONE]\n\n"), "{out}");
    }
}

#[test]
fn text_that_is_repeated_is_told_once() {
    let ends: Vec<usize> = TEXT.char_indices().map(|(at, _)| at).skip(1).chain([TEXT.len()]).collect();
    let steps: Vec<Bytes> = ends.iter().map(|&end| said(&TEXT[..end], end == TEXT.len())).collect();
    let mut translation = Translation::new(answers(Output::text(true, Some(tokenizer())), &["zzz"]));
    let (text, finish, usage) = read(&mut translation, &steps);
    assert_eq!((text.as_str(), &finish), (TEXT, &json!("stop")));
    let counted = tokenizer().encode(TEXT, Special::Omit).expect("ids").len();
    assert_eq!(usage["completion_tokens"], counted, "counted here where the model does not");
}

#[test]
fn characters_that_a_repeated_text_breaks_are_told_once_they_are_whole() {
    for text in ["aé bcd", "Hi 😀 and é.", "😀é", "é", "a\u{fffd}b\u{fffd}"] {
        for step in 1..=text.len() {
            let mut ends: Vec<usize> = (0..text.len()).step_by(step).skip(1).collect();
            ends.push(text.len());
            let steps = ends.iter().map(|&end| said(&String::from_utf8_lossy(&text.as_bytes()[..end]), false));
            let steps: Vec<Bytes> = steps.chain([streamed(response(&[], true))]).collect();
            let mut translation = Translation::new(answers(Output::text(true, None), &[]));
            assert_eq!(read(&mut translation, &steps).0, text, "steps of {step}");
        }
    }
    for (steps, expected) in [
        // Cut off within a character.
        (&["a", "a\u{fffd}"][..], "a\u{fffd}"),
        // Decoders that take bytes for broken together.
        (&["é", "\u{fffd}\u{fffd}\u{fffd}", "é😀", "é😀!"], "é😀!"),
        // What is changed is said again, once.
        (&["I '", "I'm", "I'm here"], "I ''m here"),
    ] {
        let last = steps.len() - 1;
        let steps: Vec<Bytes> = steps.iter().enumerate().map(|(at, text)| said(text, at == last)).collect();
        let mut translation = Translation::new(answers(Output::text(true, None), &[]));
        assert_eq!(read(&mut translation, &steps).0, expected);
    }
}

#[test]
fn a_whole_answer_of_a_model_that_answers_once() {
    let prompt = [1, 2, 3];
    let tokenizer = tokenizer();
    let ids = tokenizer.encode(TEXT, Special::Omit).expect("ids");
    let all: Vec<u32> = prompt.iter().chain(&ids).copied().collect();
    let raw: Vec<u8> = all.iter().flat_map(|id| id.to_le_bytes()).collect();
    let length = i64::try_from(all.len()).expect("short");
    let message = response(&[("output_ids", vec![1, 1, length], raw)], false).encode_to_vec();
    let most = u32::try_from(ids.len()).expect("short");
    let output = Output::ids(&tokenizer, &prompt);
    let answers = Answers::new((Api::Completions, "m".to_owned()), output, Vec::new(), most);
    let mut answers = answers.without(prompt.len()).prompt_tokens(Some(3));
    assert!(answers.event(&message, &mut Vec::new()));
    let whole: Value = serde_json::from_slice(&answers.whole(&Bytes::new()).expect("whole")).expect("JSON");
    assert_eq!((&whole["choices"][0]["text"], &whole["choices"][0]["finish_reason"]), (&json!(TEXT), &json!("length")));
    assert_eq!((&whole["usage"]["prompt_tokens"], &whole["usage"]["completion_tokens"]), (&json!(3), &json!(most)));
}

#[test]
fn failures() {
    let failed = |message: &str| {
        grpc::frame(&ModelStreamInferResponse { error_message: message.to_owned(), infer_response: None })
    };
    let trailers = |code: &'static str| {
        HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static(code))])
    };
    for (message, code, status) in [
        ("Prompt length (9) exceeds maximum input length (4).", "0", StatusCode::BAD_REQUEST),
        ("Executor failed process requestId 7", "0", StatusCode::INTERNAL_SERVER_ERROR),
        ("", "14", StatusCode::SERVICE_UNAVAILABLE),
        ("", "3", StatusCode::BAD_REQUEST),
    ] {
        let mut whole = answers(Output::text(false, None), &[]).streamed(false);
        let mut out = Vec::new();
        if message.is_empty() {
            whole.status(grpc::Status::read(Some(&trailers(code))), &mut out);
        } else {
            assert!(whole.event(&failed(message)[5..], &mut out));
        }
        assert!(whole.is_done() && out.is_empty() && whole.whole(&Bytes::new()).is_none());
        assert!(
            matches!(whole.refused(), Error::Refused { status: refused, .. } if refused == status),
            "{message}{code}"
        );
    }
    // In a stream it is an event, and nothing follows it.
    let mut translation = Translation::new(answers(Output::text(false, None), &[]));
    let out = translation.push([said("a", false), failed("x"), said("b", true)].concat().into()).expect("frames");
    let out = String::from_utf8(out.to_vec()).expect("UTF-8");
    assert!(out.contains(r#""code":500"#) && !out.contains("[DONE]") && !out.contains(r#""b""#), "{out}");
    // A call that ends well before its answer does is no answer.
    let mut translation = Translation::new(answers(Output::text(false, None), &[]));
    assert!(!translation.push(said("a", false)).expect("frames").is_empty());
    assert!(translation.finish(Some(&trailers("0"))).is_empty());
    for wrong in [streamed(response(&[], false)), Bytes::from_static(&[0, 0, 0, 0, 2, 0xff, 0xff])] {
        let mut translation = Translation::new(answers(Output::text(false, None), &[]));
        assert!(matches!(translation.push(wrong), Err(Error::Unreadable)));
    }
}

#[test]
fn load() {
    let page = br#"nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 5
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 7
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 100
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 32
"#;
    let load = Triton.read_load(page).expect("a load");
    assert_eq!((load.running, load.waiting, load.kv_usage), (5, 2, Some(0.25)));
    assert_eq!((load.block_tokens, load.kv_tokens), (Some(32), Some(3200)));
    assert_eq!(Triton.read_load(b"nv_inference_pending_request_count{model=\"x\"} 0\n"), None);
}
