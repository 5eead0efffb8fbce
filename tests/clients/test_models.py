"""`/v1/models`: what there is, by its names."""

import openai
import pytest

from clients import sdk
from conftest import CONTEXT


def test_models_and_aliases_are_listed(client):
    models = {entry.id: entry for entry in client.models.list()}
    assert list(models) == ["m", "llama", "org/other"]
    assert all(entry.object == "model" and entry.created > 1_700_000_000 for entry in models.values())
    assert [entry.root for entry in models.values()] == ["m", "m", "org/other"]
    assert {entry.max_model_len for entry in models.values()} == {CONTEXT}


@pytest.mark.parametrize("name", ["m", "llama", "org/other"])
def test_one_model(client, name):
    assert client.models.retrieve(name).id == name


def test_one_model_that_does_not_exist(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nothing")
    assert refused.value.code == "model_not_found"
    assert "nothing" in refused.value.message
    assert refused.value.request_id


def test_async_client(gateway, run):
    async def names():
        async with sdk(gateway.url, openai.AsyncOpenAI) as client:
            return [entry.id async for entry in client.models.list()]

    assert run(names()) == ["m", "llama", "org/other"]
