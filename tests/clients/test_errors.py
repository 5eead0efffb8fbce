"""Refusals: the SDK raises the right exception, and no worker hears of the request."""

import openai
import pytest

from clients import sdk
from conftest import BODY_BYTES, CONTEXT
from processes import Gateway, Worker, model

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def unheard(workers):
    """Fails the test when a worker got a request that runs the model."""
    before = [worker.begun() for worker in workers]
    yield
    assert [worker.begun() for worker in workers] == before


def chat(client, **more):
    return client.chat.completions.create(**{"model": "m", "messages": MESSAGES, **more})


CALLS = {
    "chat": chat,
    "completions": lambda client, **more: client.completions.create(**{"model": "m", "prompt": "Hi", **more}),
    "embeddings": lambda client, **more: client.embeddings.create(**{"model": "m", "input": "Hi", **more}),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@EVERY_CALL
def test_unknown_model(client, unheard, gateway, call):
    with pytest.raises(openai.NotFoundError) as refused:
        call(client, model="gpt-5")
    error = refused.value
    assert (error.code, error.type, error.param) == ("model_not_found", "invalid_request_error", "model")
    assert "gpt-5" in error.message
    row = gateway.row(error.request_id)
    assert (row["status"], row["outcome"], row["attempts"]) == (404, "refused", 0) and "model" not in row


def test_unknown_model_streamed(client, unheard):
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-5", stream=True)


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        ("chat", "messages", "Hi"),
        ("chat", "messages", [{"role": 5, "content": "Hi"}]),
        ("chat", "messages", ["Hi"]),
        ("chat", "max_tokens", "many"),
        ("chat", "max_tokens", 1.5),
        ("chat", "max_completion_tokens", -1),
        ("chat", "n", 0),
        ("chat", "n", "three"),
        ("chat", "stream_options", "usage"),
        ("chat", "tools", "hammer"),
        ("completions", "prompt", 5),
        ("completions", "prompt", [1.5]),
        ("completions", "prompt", ["a", 1]),
        ("completions", "max_tokens", []),
        ("embeddings", "input", {"text": "Hi"}),
        ("embeddings", "input", [[-1]]),
    ],
)
def test_wrong_value(client, unheard, call, field, value):
    with pytest.raises(openai.BadRequestError) as refused:
        CALLS[call](client, extra_body={field: value})
    error = refused.value
    assert error.type == "invalid_request_error" and error.code in ("invalid_type", "invalid_value")
    assert error.param.split("[")[0].split(".")[0] == field and field in error.message
    assert error.request_id


def test_stream_of_a_wrong_type(client, unheard):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"stream": "yes"})
    assert refused.value.param == "stream"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"model": "m"}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES}, "model"),
        ("/v1/completions", {"model": "m"}, "prompt"),
        ("/v1/embeddings", {"model": "m"}, "input"),
        ("/v1/chat/completions", {"model": None, "messages": MESSAGES}, "model"),
    ],
)
def test_missing_field(gateway, unheard, path, body, param):
    answer = gateway.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", None),
        (b'"m"', None),
        (b'{"model":"m","messages":[{"role":"user","content":"Hi"}]} x', "invalid_json"),
        (b'{"model":"m","model":"other","messages":[{"role":"user","content":"Hi"}]}', "duplicate_parameter"),
        (b'{"model":"m","mod\\u0065l":"other","messages":[{"role":"user","content":"Hi"}]}', "duplicate_parameter"),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', "invalid_json"),
    ],
)
def test_body_that_cannot_be_read(gateway, unheard, content, code):
    answer = gateway.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert code is None or error["code"] == code
    assert answer.headers["x-request-id"]


def test_wrong_content_type(gateway, unheard):
    answer = gateway.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/metrics", "/v1", "/v1/chat/completions/", "/simulated/faults"])
def test_unknown_path(gateway, unheard, path):
    answer = gateway.post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": None, "code": None,
    }


def test_sdk_at_a_path_that_does_not_exist(client, unheard):
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(model="m", prompt="water")
    assert refused.value.type == "invalid_request_error"


def test_wrong_method(client, unheard):
    with pytest.raises(openai.APIStatusError) as refused:
        client.get("/chat/completions", cast_to=object)
    assert refused.value.status_code == 405 and refused.value.type == "invalid_request_error"


LONG = "water " * (2 * CONTEXT)


@pytest.mark.parametrize(
    ("call", "fields", "param"),
    [
        ("chat", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": LONG}], "stream": True}, "messages"),
        ("chat", {"max_tokens": CONTEXT}, "messages"),
        ("chat", {"max_completion_tokens": CONTEXT + 1}, "messages"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": [[1], [1] * CONTEXT]}, "prompt"),
        ("completions", {"prompt": [1] * CONTEXT, "max_tokens": 1}, "prompt"),
        ("embeddings", {"input": LONG}, "input"),
    ],
)
def test_too_long(client, unheard, call, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        CALLS[call](client, **fields)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.type == "invalid_request_error"
    assert str(CONTEXT) in refused.value.message
    assert refused.value.param == param


def test_exactly_as_long_as_the_context(client):
    answer = client.completions.create(model="m", prompt=[1] * (CONTEXT - 1), max_tokens=1)
    assert answer.usage.total_tokens == CONTEXT


def test_oversized_body(client, unheard):
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, messages=[{"role": "user", "content": "x" * BODY_BYTES}])
    error = refused.value
    assert (error.status_code, error.code, error.type) == (413, "request_too_large", "invalid_request_error")
    assert error.request_id
    # The client is usable afterwards.
    assert client.models.retrieve("m").id == "m"


@pytest.mark.parametrize(
    ("name", "value"),
    [("x-forebay-priority", "urgent"), ("x-forebay-deadline-ms", "soon"), ("x-forebay-deadline-ms", "0")],
)
def test_wrong_header(client, unheard, name, value):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_headers={name: value})
    assert refused.value.param == name


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"top_p": 2}, "top_p must be in"),
        ({"logprobs": True, "top_logprobs": 50}, "greater than max allowed"),
        ({"response_format": SCHEMA}, "nonsense"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "multimodal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_own_refusal(client, gateway, fields, said, stream):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        chat(client, stream=stream, **fields)
    error = refused.value
    assert error.type == "invalid_request_error"
    assert error.code is None or isinstance(error.code, str)
    assert set(error.body) == {"message", "type", "param", "code"}
    row = gateway.row(error.request_id)
    assert (row["status"], row["outcome"], row["attempts"]) == (400, "engine_refused", 1)


def test_keys(start, tmp_path):
    """The worker's key is the gateway's matter: a client's own key neither helps nor is it blamed."""
    worker = start(Worker("--api-key", "worker-secret"))
    (tmp_path / "key").write_text("worker-secret\n")
    keyed = start(Gateway(model([worker]) + f'api_key = {{ file = "{tmp_path}/key" }}\n'))
    with sdk(keyed.url) as client:
        assert chat(client).choices[0].message.content
    keyless = start(Gateway(model([worker]), ready=False))
    with sdk(keyless.url) as client, pytest.raises(openai.APIStatusError) as refused:
        chat(client, extra_headers={"authorization": "Bearer worker-secret"})
    # 401 would make the client throw its own key away.
    assert refused.value.status_code in (502, 503), refused.value
