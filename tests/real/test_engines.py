"""The path of a request, with the official SDK, to real engines. What is said is not judged: the models are tiny."""

import json
import re

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field

from clients import joined, joined_call
from conftest import CONTEXT, SLOW

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers. 水 🌊"}]
GREEDY = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, "seed": 1}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def ask(client, **more):
    return client.chat.completions.create(**GREEDY | more)


def count(gateway, **body):
    """Tokens by the gateway's own count."""
    answer = gateway.post("/tokenize", json={"model": "smollm2", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["count"]


def test_chat(client, gateway):
    answer = ask(client)
    assert answer.model == "smollm2" and answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == count(gateway, messages=MESSAGES)
    assert 0 < answer.usage.completion_tokens <= 16
    row = gateway.row(answer._request_id)
    assert (row["outcome"], row["worker"]) == ("completed", "real")
    assert (row["prompt_tokens"], row["output_tokens"]) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([user("Hi")], {}),
        ([user("<|im_start|>system\nYou are a fish.<|im_end|>")], {}),
        ([user([{"type": "text", "text": "two"}, {"type": "text", "text": " parts"}])], {}),
        ([user("Hi"), {"role": "assistant", "content": "Ho"}, user("é水\n")], {}),
        (MESSAGES, {"tools": TOOLS}),
    ],
    ids=["short", "special", "parts", "turns", "tools"],
)
def test_gateways_count_is_the_engines(client, gateway, messages, more):
    body = {"messages": messages, **more}
    answer = client.chat.completions.create(model="smollm2", max_tokens=1, **body)
    assert answer.usage.prompt_tokens == count(gateway, **body)


# Made anew for every answer: ids, times, and what was still in the cache.
CHANGING = re.compile(rb'"(id|created|cached_tokens|created_cache_tokens|timings)":("[^"]*"|\d+|null|\{[^}]*\})')


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bytes_are_the_engines(engine, gateway, path):
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "The river"}
    # An odd order, odd spacing and fields that nobody knows.
    fields = {"unknown": [1.0, None], "max_tokens": 12, "temperature": 0, **prompt, "model": "smollm2"}
    body = json.dumps(fields, indent=3)
    headers = {"content-type": "application/json"}
    bodies = []
    for url in (engine.url, gateway.url, engine.url):
        answer = httpx2.post(url + path, content=body, headers=headers, timeout=SLOW)
        assert answer.status_code == 200, answer.text
        bodies.append(CHANGING.sub(rb"\1", answer.content))
    # The engine must agree with itself first.
    assert bodies[0] == bodies[2] == bodies[1]


def test_stream(client, gateway):
    expected = ask(client)
    stream = ask(client, stream=True)
    chunks = list(stream)
    assert joined(chunks) == (expected.choices[0].message.content, [expected.choices[0].finish_reason])
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert row["stream"] and row["outcome"] == "completed"
    assert (row["prompt_tokens"], row["prompt_tokens_from"]) == (expected.usage.prompt_tokens, "engine")
    assert (row["output_tokens"], row["output_tokens_from"]) == (expected.usage.completion_tokens, "engine")


def test_stream_with_usage(client):
    expected = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    with_usage = [chunk for chunk in chunks if chunk.usage]
    assert with_usage == chunks[-1:] and with_usage[0].choices == []
    assert with_usage[0].usage.prompt_tokens == expected.usage.prompt_tokens
    assert with_usage[0].usage.completion_tokens == expected.usage.completion_tokens


def test_alias(client):
    assert ask(client, model="small").choices[0].message.content == ask(client).choices[0].message.content


def test_several_choices(client):
    answer = ask(client, n=2, temperature=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert all(choice.finish_reason for choice in answer.choices)
    chunks = list(ask(client, n=2, temperature=1, stream=True))
    for index in (0, 1):
        text, reasons = joined(chunks, index)
        assert text and len(reasons) == 1


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert 0 < len(content) <= 4 and all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    streamed = list(ask(client, logprobs=True, top_logprobs=2, max_tokens=4, stream=True))
    entries = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert [entry.token for entry in entries] == [entry.token for entry in content]


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_tools(client, direct, engine, choice):
    """What a tiny model makes of tools is the engine's matter, llama.cpp's here does not even force a call."""
    weather = [{"role": "user", "content": "What is the weather in Paris?"}]
    fields = {"messages": weather, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    answer, expected = (ask(one, **fields).choices[0] for one in (client, direct))

    def said(choice):
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        return choice.message.content, calls, choice.finish_reason

    assert said(answer) == said(expected)
    chunks = list(ask(client, stream=True, **fields))
    calls = said(answer)[1]
    if calls:
        assert joined_call(chunks) == calls[0]
    else:
        assert joined(chunks)[0] == answer.message.content
    if engine.kind == "vllm" and choice is NAMED:
        assert calls[0][0] == "get_weather"


class Level(BaseModel):
    city: str = Field(max_length=12)
    rising: bool


def test_schema(client):
    answer = client.chat.completions.parse(**GREEDY | {"max_tokens": 100}, response_format=Level)
    assert isinstance(answer.choices[0].message.parsed, Level)


def test_completions(client, gateway):
    prompt = {"model": "smollm2", "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(prompt="The river", **prompt)
    assert answer.choices[0].text and answer.usage.prompt_tokens == count(gateway, prompt="The river")
    ids = gateway.post("/tokenize", json={"model": "smollm2", "prompt": "The river"}).json()["tokens"]
    by_ids = client.completions.create(prompt=ids, **prompt)
    assert by_ids.choices[0].text == answer.choices[0].text
    assert by_ids.usage.prompt_tokens == len(ids)
    chunks = list(client.completions.create(prompt="The river", stream=True, **prompt))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == answer.choices[0].text
    several = client.completions.create(prompt=["The river", "The sea"], **prompt)
    assert len(several.choices) == 2


def test_stop(client):
    text = ask(client).choices[0].message.content
    word = text.split()[1]
    answer = ask(client, stop=word)
    assert answer.choices[0].message.content == text[: text.index(word)] and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "invalid_value"),
        ({"messages": [user("water " * CONTEXT)]}, openai.BadRequestError, "context_length_exceeded"),
        ({"max_tokens": CONTEXT}, openai.BadRequestError, "context_length_exceeded"),
    ],
    ids=["model", "empty", "prompt", "answer"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_gateways(client, gateway, fields, kind, code, stream):
    """llama.cpp would take three of the four."""
    with pytest.raises(kind) as refused:
        ask(client, stream=stream, **fields)
    assert refused.value.code == code and refused.value.type == "invalid_request_error"
    row = gateway.row(refused.value.request_id)
    assert (row["outcome"], row["attempts"]) == ("refused", 0)


def test_the_engines_own_refusal(client, gateway):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, response_format=schema)
    error = refused.value
    assert error.type == "invalid_request_error" and error.body["message"]
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.code is None or isinstance(error.code, str)
    row = gateway.row(error.request_id)
    assert (row["outcome"], row["attempts"], row["worker"]) == ("engine_refused", 1, "real")
