"""`/v1/chat/completions`, whole and streamed. The engine answers equal requests equally, so that what it says when
asked directly is the measure of what comes through the gateway."""

import asyncio

import openai
import pytest

from clients import joined, sdk
from processes import Gateway, Worker, model

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a forebay? 水と 🌊"}]


def ask(client, **more):
    return client.chat.completions.create(**{"model": "m", "messages": MESSAGES, **more})


def test_whole_answer(client, direct, gateway):
    answer, expected = ask(client), ask(direct)
    assert answer.object == "chat.completion"
    assert answer.choices == expected.choices and answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens == expected.usage.prompt_tokens > 10
    assert usage.completion_tokens == expected.usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    row = gateway.row(answer._request_id)
    assert row["outcome"] == "completed" and row["api"] == "chat" and row["model"] == "m" and not row["stream"]
    assert (row["prompt_tokens"], row["output_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)


def test_own_request_id_is_kept(client, gateway):
    answer = ask(client, extra_headers={"x-request-id": "mine-1.a"})
    assert answer._request_id == "mine-1.a"
    assert gateway.row("mine-1.a")["outcome"] == "completed"


def test_stream(client, gateway):
    expected = ask(client)
    stream = ask(client, stream=True)
    chunks = list(stream)
    assert joined(chunks) == (expected.choices[0].message.content, ["stop"])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert len(chunks) > 5
    # Usage that the gateway asked for itself stays hidden, in an own chunk or in any other.
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None and "usage" not in chunk.model_fields_set for chunk in chunks)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert row["stream"] and row["outcome"] == "completed"
    assert (row["prompt_tokens"], row["prompt_tokens_from"]) == (expected.usage.prompt_tokens, "engine")
    assert (row["output_tokens"], row["output_tokens_from"]) == (expected.usage.completion_tokens, "engine")


def test_stream_with_usage(client):
    expected = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == (expected.choices[0].message.content, ["stop"])
    with_usage = [chunk for chunk in chunks if chunk.usage]
    assert with_usage == chunks[-1:]
    assert with_usage[0].choices == []
    assert with_usage[0].usage.prompt_tokens == expected.usage.prompt_tokens
    assert with_usage[0].usage.completion_tokens == expected.usage.completion_tokens


def test_stream_with_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    assert all(chunk.usage for chunk in chunks)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 5


def test_async_whole_and_stream(gateway, client, run):
    expected = ask(client).choices[0].message.content

    async def both():
        async with sdk(gateway.url, openai.AsyncOpenAI) as client:
            whole = await ask(client)
            chunks = [chunk async for chunk in await ask(client, stream=True)]
            return whole.choices[0].message.content, joined(chunks)[0]

    assert run(both()) == (expected, expected)


def test_stream_helper_accumulates(client):
    with client.chat.completions.stream(model="m", messages=MESSAGES, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ask(client).choices[0].message.content
    assert final.usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_response_headers(client, stream):
    create = client.chat.completions.with_streaming_response.create
    with create(model="m", messages=MESSAGES, stream=stream) as response:
        headers = response.headers
        body = response.read()
    assert response.status_code == 200
    assert headers["x-forebay-worker"] in {"w0", "w1"}
    assert headers["x-forebay-model"] == "m"
    assert int(headers["x-forebay-queue-ms"]) >= 0
    assert int(headers["x-forebay-predicted-wait-ms"]) >= 0
    assert headers["x-request-id"]
    assert headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    assert body.endswith(b"data: [DONE]\n\n") == stream
    # Nothing else of the worker shows.
    assert "server" not in headers and "127.0.0.1" not in str(headers)


def test_raw_response_parses(client):
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert raw.parse().choices == ask(client).choices
    assert raw.http_response.headers["x-request-id"] == raw.parse()._request_id


@pytest.mark.parametrize("name", ["llama", "org/other"])
def test_other_names(client, direct, name):
    raw = client.chat.completions.with_raw_response.create(model=name, messages=MESSAGES)
    assert raw.headers["x-forebay-model"] == ("m" if name == "llama" else name)
    assert raw.parse().choices == ask(direct).choices
    chunks = list(ask(client, model=name, stream=True))
    assert joined(chunks)[0] == ask(direct).choices[0].message.content


def test_several_choices(client, direct):
    answer = ask(client, n=3, max_tokens=12)
    assert answer.choices == ask(direct, n=3, max_tokens=12).choices
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 36
    chunks = list(ask(client, n=3, max_tokens=12, stream=True))
    for choice in answer.choices:
        assert joined(chunks, choice.index) == (choice.message.content, ["length"])


def test_logprobs(client, direct):
    answer = ask(client, logprobs=True, top_logprobs=2, max_tokens=6)
    assert answer.choices == ask(direct, logprobs=True, top_logprobs=2, max_tokens=6).choices
    content = answer.choices[0].logprobs.content
    assert len(content) == 6 and all(len(entry.top_logprobs) == 2 for entry in content)
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(bytes(entry.bytes).decode() == entry.token and entry.logprob < 0 for entry in content)
    chunks = list(ask(client, logprobs=True, top_logprobs=2, max_tokens=6, stream=True))
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert streamed == content


def test_stop(client):
    text = ask(client).choices[0].message.content
    word = text.split()[3]
    answer = ask(client, stop=[word, "never said"])
    assert answer.choices[0].message.content == text[: text.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == word


def test_seed(client):
    texts = [ask(client, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(client, name):
    answer = ask(client, **{name: 5})
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_developer_role_and_content_parts(client, direct, gateway):
    messages = [
        {"role": "developer", "content": "Answer in verse."},
        {"role": "user", "content": [{"type": "text", "text": "What flows"}, {"type": "text", "text": " here?"}]},
        {"role": "assistant", "content": "Water.", "name": "river", "reasoning_content": "kept"},
        {"role": "user", "name": "somebody", "content": "More."},
    ]
    answer = ask(client, messages=messages)
    expected = ask(direct, messages=messages)
    assert answer.choices == expected.choices
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    # The gateway's own count is the engine's.
    counted = gateway.post("/tokenize", json={"model": "m", "messages": messages}).json()["count"]
    assert counted == answer.usage.prompt_tokens


def test_vendor_fields_reach_the_engine_and_come_back(client, gateway):
    extra = {"return_token_ids": True, "ignore_eos": True, "top_k": 5, "an_unknown_field": {"kept": [1, None]}}
    answer = ask(client, max_tokens=150, extra_body=extra)
    # By itself an answer ends after 120 tokens at most.
    assert answer.usage.completion_tokens == 150 and answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == 150
    counted = gateway.post("/tokenize", json={"model": "m", "messages": MESSAGES}).json()
    assert answer.prompt_token_ids == counted["tokens"]
    text = gateway.post("/detokenize", json={"model": "m", "tokens": answer.choices[0].token_ids}).json()["prompt"]
    # The answer ends at the last whole character.
    assert text.startswith(answer.choices[0].message.content)
    assert "kv_transfer_params" in answer.model_extra


def test_min_tokens_and_stop_token_ids(client):
    plain = ask(client, extra_body={"return_token_ids": True})
    ids = plain.choices[0].token_ids
    longer = ask(client, extra_body={"min_tokens": len(ids) + 40})
    assert longer.usage.completion_tokens > len(ids) + 40
    stopped = ask(client, extra_body={"stop_token_ids": [ids[4]], "return_token_ids": True})
    assert stopped.choices[0].token_ids == ids[: ids.index(ids[4]) + 1]
    assert stopped.choices[0].stop_reason == ids[4]


def test_priority_class_is_taken(client):
    for value in ("interactive", "default", "batch"):
        assert ask(client, max_tokens=1, extra_headers={"x-forebay-priority": value}).usage.completion_tokens == 1


def test_twenty_streams_at_once(gateway, direct, workers, run):
    questions = [[{"role": "user", "content": f"Question {number}: how deep is the water?"}] for number in range(20)]
    before = [worker.begun() for worker in workers]

    async def one(client, messages):
        stream = await ask(client, messages=messages, stream=True)
        return joined([chunk async for chunk in stream])

    async def all_of_them():
        async with sdk(gateway.url, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, messages) for messages in questions))

    answers = run(all_of_them())
    assert sum(worker.begun() for worker in workers) - sum(before) == 20
    assert all(worker.begun() > count for worker, count in zip(workers, before))
    for messages, (text, reasons) in zip(questions, answers):
        assert reasons == ["stop"]
        assert text == ask(direct, messages=messages).choices[0].message.content


def test_stream_that_goes_on_elsewhere(start):
    workers = [start(Worker("--recite")) for _ in range(2)]
    gateway = start(Gateway(model(workers, continue_streams=True)))
    client = start(sdk(gateway.url))
    expected = ask(client, max_tokens=20)
    for worker in workers:
        # Chats break off; what is left is no chat.
        worker.faults({"kind": {"cut": {"after": 6}}, "path": "/v1/chat/completions"})
    with ask(client, max_tokens=20, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert joined(chunks) == (expected.choices[0].message.content, ["length"])
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices and chunk.choices[0].delta.role] == ["assistant"]
    marks = [(chunk.model_extra or {}).get("forebay") for chunk in chunks]
    assert marks[0] is None and marks[-1]["continued"] == 1 and marks[-1]["worker"] in ("w0", "w1")
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.usage.prompt_tokens, 20)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["outcome"], row["attempts"], row["output_tokens"]) == ("completed", 2, 20)
