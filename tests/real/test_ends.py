"""Clients that leave a real engine, and real engines that die under their clients."""

import json
import time

import httpx2
import openai
import pytest

from clients import sdk
from conftest import KINDS, SLOW, Engine, model
from processes import KILL, TERM, Gateway, eventually

# Minutes of work for a machine without a GPU.
LONG = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Tell a long story of a river."}],
    "max_tokens": 1500,
    "temperature": 1.0,
}
FOREVER = {"ignore_eos": True}

# Longest silence that the gateway allows, in seconds. A busy machine is slow between two tokens as well.
IDLE = 5


def free(engine, within):
    eventually("the engine to be free", lambda: engine.running() == 0, within)


def test_client_leaves_a_stream(engine, gateway):
    free(engine, SLOW)
    with sdk(gateway.url, timeout=SLOW) as client:
        stream = client.chat.completions.create(**LONG, stream=True, extra_body=FOREVER)
        for _, chunk in zip(range(4), stream):
            assert chunk.choices
        eventually("the engine to be busy", lambda: engine.running() == 1)
        stream.close()
        left = time.monotonic()
        free(engine, 2)
        print(f"{engine.kind}: free {time.monotonic() - left:.2f} s after a stream was closed")
    row = gateway.row(stream.response.headers["x-request-id"])
    assert row["outcome"] == "client_gone"
    assert row["prompt_tokens_from"] == "tokenizer" and row["prompt_tokens"] > 0
    assert row["output_tokens"] >= 2 and row["output_tokens_from"] == "events"


def test_client_leaves_a_whole_answer(engine, gateway):
    free(engine, SLOW)
    identity = {"x-request-id": f"leaves-{engine.kind}"}
    # llama.cpp often does not notice that the gateway has hung up: some seconds of work, not minutes.
    body = LONG | {"max_tokens": 1500 if engine.kind == "vllm" else 150}
    with sdk(gateway.url, timeout=httpx2.Timeout(SLOW, read=1.0)) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**body, extra_body=FOREVER, extra_headers=identity)
        left = time.monotonic()
        free(engine, 3 if engine.kind == "vllm" else SLOW)
        print(f"{engine.kind}: free {time.monotonic() - left:.2f} s after a client stopped waiting")
    row = gateway.row(identity["x-request-id"])
    assert row["outcome"] == "client_gone"
    assert row["prompt_tokens_from"] == "tokenizer" and row["prompt_tokens"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [TERM, KILL], ids=["SIGTERM", "SIGKILL"])
def test_engine_dies_under_a_stream(start, kind, number):
    engine = start(Engine(kind))
    gateway = start(Gateway(model(engine, idle_seconds=IDLE)))
    events, killed = [], None
    body = LONG | FOREVER | {"stream": True}
    with httpx2.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=SLOW) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 4 and killed is None:
                engine.signal(number)
                killed = time.monotonic()
    silence = time.monotonic() - killed
    # The answer ended well for HTTP, and badly for whoever reads it: with one error and nothing after it.
    errors = [json.loads(event).get("error") for event in events]
    assert errors[-1] and not any(errors[:-1])
    assert errors[-1]["type"] == "server_error" and errors[-1]["message"] and isinstance(errors[-1]["code"], str)
    assert silence < IDLE + 10
    print(f"{kind} {number.name}: error event after {silence:.2f} s: {errors[-1]}")
    row = gateway.row(answer.headers["x-request-id"])
    assert row["outcome"] == "cut" and row["output_tokens"] >= 2
    # Later requests do not hang on what is gone.
    with sdk(gateway.url, timeout=SLOW) as client, pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(**LONG)
    assert refused.value.status_code in (502, 503)


def test_sdk_sees_an_engine_die(start):
    engine = start(Engine("llamacpp"))
    gateway = start(Gateway(model(engine, idle_seconds=IDLE)))
    with sdk(gateway.url, timeout=SLOW) as client:
        stream = client.chat.completions.create(**LONG, stream=True, extra_body=FOREVER)
        next(stream)
        engine.signal(KILL)
        with pytest.raises(openai.APIError) as broken:
            list(stream)
    assert not isinstance(broken.value, openai.APIConnectionError) and broken.value.message
