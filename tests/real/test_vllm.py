"""What only vLLM has: `/tokenize`, refusals of values that llama.cpp takes, embeddings from a model of their own."""

import array

import httpx2
import openai
import pytest

from clients import sdk
from conftest import INSTALLED, SLOW, Engine, model, require
from processes import Gateway

MESSAGES = [{"role": "user", "content": "Name three rivers. 水 🌊"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
TEXTS = ["The water is high.", "水と 🌊", "The water is low."]

only_vllm = pytest.mark.parametrize("engine", ["vllm"], indirect=True)


@only_vllm
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Water, 水, 🌊 <|im_start|> x"}),
        ("/tokenize", {"prompt": "Water", "add_special_tokens": False, "return_token_strs": True}),
        ("/tokenize", {"prompt": ""}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/tokenize", {"messages": MESSAGES, "tools": TOOLS}),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}),
        ("/detokenize", {"tokens": [1, 504, 28, 2]}),
        ("/detokenize", {"tokens": []}),
        ("/detokenize", {"tokens": [504, 4_000_000_000]}),
    ],
)
def test_tokenize_is_vllms(engine, gateway, path, body):
    body = {"model": "smollm2"} | body
    expected = httpx2.post(engine.url + path, json=body, timeout=SLOW)
    answer = gateway.post(path, json=body)
    assert (answer.status_code, answer.json()) == (expected.status_code, expected.json())


@only_vllm
def test_detokenize_refuses_what_vllm_refuses(engine, gateway):
    body = {"model": "smollm2", "tokens": [-1]}
    assert httpx2.post(f"{engine.url}/detokenize", json=body, timeout=SLOW).status_code == 400
    assert gateway.post("/detokenize", json=body).status_code == 400


@only_vllm
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "multimodal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_own_refusals(client, fields, said, stream):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.chat.completions.create(**{"model": "smollm2", "messages": MESSAGES, "stream": stream, **fields})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.code is None or isinstance(refused.value.code, str)


@only_vllm
def test_vendor_fields(client, gateway):
    extra = {"return_token_ids": True, "ignore_eos": True, "min_tokens": 3}
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=6, extra_body=extra)
    counted = gateway.post("/tokenize", json={"model": "smollm2", "messages": MESSAGES}).json()
    assert answer.prompt_token_ids == counted["tokens"]
    assert len(answer.choices[0].token_ids) == 6


@pytest.fixture(scope="module")
def minilm():
    require("vllm")
    with Engine("vllm", "minilm") as engine:
        with Gateway(model(engine, INSTALLED / "models/minilm", "minilm")) as gateway:
            yield engine, gateway


def vectors(answer):
    return [entry.embedding for entry in answer.data]


def close(some, others):
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b, strict=True)]
    return all(abs(a - b) < 1e-3 for a, b in pairs) and pairs


def test_embeddings(minilm):
    engine, gateway = minilm
    with sdk(gateway.url, timeout=SLOW) as client, sdk(engine.url, timeout=SLOW) as direct:
        answer = client.embeddings.create(model="minilm", input=TEXTS)
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert {len(vector) for vector in vectors(answer)} == {384}
        floats = client.embeddings.create(model="small", input=TEXTS, encoding_format="float")
        assert close(vectors(answer), [array.array("f", vector).tolist() for vector in vectors(floats)])
        assert close(vectors(answer), vectors(direct.embeddings.create(model="minilm", input=TEXTS)))
        counts = [gateway.post("/tokenize", json={"model": "minilm", "prompt": text}).json()["count"] for text in TEXTS]
        assert answer.usage.prompt_tokens == sum(counts)
        assert gateway.row(answer._request_id)["prompt_tokens"] == sum(counts)
        ids = gateway.post("/tokenize", json={"model": "minilm", "prompt": TEXTS[0]}).json()["tokens"]
        assert close(vectors(client.embeddings.create(model="minilm", input=ids)), vectors(answer)[:1])
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="minilm", input="water " * 300)
        assert refused.value.code == "context_length_exceeded"
        assert gateway.row(refused.value.request_id)["outcome"] == "refused"
