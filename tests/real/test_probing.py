"""`forebay serve` without a configuration finds an engine at its usual port."""

import socket

import openai
import pytest

from clients import joined, sdk
from conftest import CONTEXT, SLOW, Engine
from processes import Gateway

USUAL_PORT = 8080


def test_llamacpp_is_found(start):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", USUAL_PORT)) == 0:
            pytest.skip(f"port {USUAL_PORT} is taken")
    start(Engine("llamacpp", port=USUAL_PORT))
    gateway = start(Gateway.probing())
    gateway.line(rf"found llamacpp at http://127.0.0.1:{USUAL_PORT}/?, serving smollm2")
    with sdk(gateway.url, timeout=SLOW) as client:
        assert "smollm2" in [entry.id for entry in client.models.list()]
        messages = [{"role": "user", "content": "Name a river."}]
        raw = client.chat.completions.with_raw_response.create(model="smollm2", messages=messages, max_tokens=8)
        assert raw.headers["x-forebay-worker"] == f"127.0.0.1:{USUAL_PORT}"
        assert raw.parse().choices[0].message.content
        row = gateway.row(raw.headers["x-request-id"])
        assert (row["prompt_tokens"], row["prompt_tokens_from"]) == (raw.parse().usage.prompt_tokens, "engine")
        chunks = list(client.chat.completions.create(model="smollm2", messages=messages, max_tokens=8, stream=True))
        assert len(joined(chunks)[1]) == 1
        # Counts are estimates without a tokenizer, and no reason to refuse: that is the engine's own word.
        with pytest.raises(openai.BadRequestError) as refused:
            long = [{"role": "user", "content": "water " * CONTEXT}]
            client.chat.completions.create(model="smollm2", messages=long)
        assert refused.value.code == "context_length_exceeded"
        assert gateway.row(refused.value.request_id)["outcome"] == "engine_refused"
