"""`/v1/completions`: every form of a prompt, whole and streamed."""

import pytest

PROMPT = "The water stands"


def ask(client, **more):
    return client.completions.create(**{"model": "m", "prompt": PROMPT, "max_tokens": 12, **more})


@pytest.fixture(scope="module")
def ids(gateway):
    return gateway.post("/tokenize", json={"model": "m", "prompt": PROMPT}).json()["tokens"]


def test_text(client, direct, ids, gateway):
    answer = ask(client)
    assert answer.object == "text_completion"
    assert answer.choices == ask(direct).choices and answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    row = gateway.row(answer._request_id)
    assert (row["api"], row["prompt_tokens"], row["output_tokens"]) == ("completions", len(ids), 12)


def test_token_ids_are_the_same_prompt(client, ids):
    assert ask(client, prompt=ids).choices == ask(client).choices
    assert ask(client, prompt=[ids]).choices == ask(client).choices


def test_several_prompts(client, direct):
    prompts = [PROMPT, "The river runs"]
    answer = ask(client, prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices == ask(direct, prompt=prompts, n=2).choices
    assert answer.usage.completion_tokens == 48
    # Prompt by prompt, choice by choice.
    for number, prompt in enumerate(prompts):
        alone = ask(client, prompt=prompt, n=2)
        assert [c.text for c in answer.choices[2 * number : 2 * number + 2]] == [c.text for c in alone.choices]


def test_several_prompts_streamed(client):
    prompts = [PROMPT, "The river runs"]
    whole = ask(client, prompt=prompts)
    chunks = list(ask(client, prompt=prompts, stream=True))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]


def test_default_length(client):
    answer = client.completions.create(model="m", prompt=PROMPT)
    assert answer.usage.completion_tokens == 16


def test_echo_and_logprobs(client, direct, ids):
    answer = ask(client, echo=True, logprobs=2)
    assert answer.choices == ask(direct, echo=True, logprobs=2).choices
    (choice,) = answer.choices
    assert choice.text == PROMPT + ask(client).choices[0].text
    assert len(choice.logprobs.tokens) == len(ids) + 12
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.text_offset[0] == 0
    assert "".join(choice.logprobs.tokens) == choice.text


def test_stream(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_with_usage(client, ids):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    with_usage = [chunk for chunk in chunks if chunk.usage]
    assert with_usage == chunks[-1:] and with_usage[0].choices == []
    assert (with_usage[0].usage.prompt_tokens, with_usage[0].usage.completion_tokens) == (len(ids), 12)


def test_vendor_fields(client, ids):
    answer = ask(client, extra_body={"return_token_ids": True})
    assert answer.choices[0].prompt_token_ids == ids
    assert len(answer.choices[0].token_ids) == 12
