"""What only vLLM has: `/tokenize`, refusals of values that llama.cpp takes, embeddings from a model of their own."""

import array
import threading

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


def at_once(ask, bodies):
    """The answers to these bodies, all asked at the same time."""
    answers = [None] * len(bodies)

    def one(at):
        answers[at] = ask(bodies[at])

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(bodies))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
    return [answer.json() for answer in answers]


def calls(gateway, kind):
    """Calls and requests that the gateway counts for micro-batches."""
    lines = [line.rsplit(" ", 1) for line in httpx2.get(f"{gateway.ops}/metrics").text.splitlines()]
    values = dict(line for line in lines if len(line) == 2)
    return [float(values.get(f'forebay_micro_batch_size_{of}{{kind="{kind}"}}', 0)) for of in ("count", "sum")]


# Whether what vLLM computes depends on what else is in its batch is the kernels' matter. MiniLM in bfloat16 on a CPU (vLLM
# 0.32, eager) gave the very same numbers alone and among 31 others; on a GPU the last bits may differ, as they do when the
# engine itself batches what came apart.
@pytest.mark.parametrize(
    ("path", "body", "values"),
    [
        ("/v1/embeddings", lambda text: {"input": text}, lambda item: item["embedding"]),
        ("/v1/rerank", lambda text: {"query": "water", "documents": [text, "sand"]}, lambda item: [item["relevance_score"]]),
        ("/v1/score", lambda text: {"text_1": "water", "text_2": [text, "sand"]}, lambda item: [item["score"]]),
    ],
)
def test_merged_answers_are_those_of_calls_apart(minilm, path, body, values):
    engine, gateway = minilm
    kind = path.rsplit("/", 1)[1]
    bodies = [{"model": "minilm"} | body(f"The water number {at} runs through turbine {at * 7}.") for at in range(32)]
    before = calls(gateway, kind)
    merged = at_once(lambda body: gateway.post(path, json=body), bodies)
    made, asked = (after - was for after, was in zip(calls(gateway, kind), before, strict=True))
    assert asked == 32 and made <= 16
    for request, answer in zip(bodies, merged, strict=True):
        alone = httpx2.post(engine.url + path, json=request, timeout=SLOW).json()
        items = [found.get("data") or found["results"] for found in (answer, alone)]
        assert [[item["index"] for item in found] for found in items] == [[item["index"] for item in items[1]]] * 2
        assert close(*([values(item) for item in found] for found in items))
        if kind == "embeddings":
            assert answer["usage"] == alone["usage"]
        assert answer.keys() == alone.keys()
