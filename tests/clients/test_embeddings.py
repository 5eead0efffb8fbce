"""`/v1/embeddings`. The SDK asks for base64 when its caller says nothing, and decodes it."""

import array
import base64

import openai
import pytest

from clients import sdk

TEXTS = ["The water is high.", "水と 🌊", "The water is low."]


def ask(client, **more):
    return client.embeddings.create(**{"model": "m", "input": TEXTS, **more})


def vectors(answer):
    return [entry.embedding for entry in answer.data]


def as_float32(vector):
    return array.array("f", vector).tolist()


@pytest.fixture(scope="module")
def ids(gateway):
    return [gateway.post("/tokenize", json={"model": "m", "prompt": text}).json()["tokens"] for text in TEXTS]


def test_default_is_base64_of_the_floats(client, direct, ids):
    answer, floats = ask(client), ask(client, encoding_format="float")
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert vectors(answer) == [as_float32(vector) for vector in vectors(floats)] == vectors(ask(direct))
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in vectors(answer))
    assert answer.usage.prompt_tokens == sum(map(len, ids)) == answer.usage.total_tokens


def test_base64_on_the_wire(gateway, client):
    body = {"model": "m", "input": TEXTS[0], "encoding_format": "base64"}
    text = gateway.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    vector = array.array("f", base64.b64decode(text, validate=True)).tolist()
    assert [vector] == vectors(ask(client, input=TEXTS[0]))


def test_one_text_is_a_list_of_one(client):
    assert vectors(ask(client, input=TEXTS[0])) == vectors(ask(client))[:1]


def test_token_ids(client, ids):
    expected = vectors(ask(client))
    assert vectors(ask(client, input=ids)) == expected
    assert vectors(ask(client, input=ids[1])) == expected[1:2]


def test_journal(client, gateway, ids):
    row = gateway.row(ask(client)._request_id)
    assert (row["api"], row["outcome"], row["output_tokens"]) == ("embeddings", "completed", 0)
    assert row["prompt_tokens"] == sum(map(len, ids))


def test_dimensions(client):
    answer = ask(client, dimensions=8)
    assert [len(vector) for vector in vectors(answer)] == [8, 8, 8]


def test_dimensions_that_the_engine_refuses(client):
    with pytest.raises(openai.BadRequestError, match="dimensions must be between 1 and 32") as refused:
        ask(client, dimensions=33)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.code is None or isinstance(refused.value.code, str)


def test_other_name(client):
    assert vectors(ask(client, model="llama")) == vectors(ask(client))


def test_async(gateway, client, run):
    async def embed():
        async with sdk(gateway.url, openai.AsyncOpenAI) as client:
            return vectors(await ask(client))

    assert run(embed()) == vectors(ask(client))
