"""A real vLLM's KV events: what the gateway believes of its cache is what its `cached_tokens` say.

Everything is sent to the engine behind the gateway's back first, so that the gateway knows of it by the events alone.
"""

import json

import pytest

from clients import sdk
from conftest import SLOW, Engine, free_port, model, require
from processes import Gateway, eventually, gauge

# Tokens in a block of vLLM's on a CPU, and the blocks that it gets here: so few that caches overflow.
BLOCK, BLOCKS = 128, 24


@pytest.fixture(scope="module")
def setting():
    require("vllm")
    ports = free_port(), free_port()
    config = {"enable_kv_cache_events": True, "publisher": "zmq"}
    config |= {"endpoint": f"tcp://*:{ports[0]}", "replay_endpoint": f"tcp://*:{ports[1]}"}
    options = ["--kv-events-config", json.dumps(config), "--num-gpu-blocks-override", BLOCKS]
    with Engine("vllm", "smollm2", *options) as engine, Gateway(model(engine)) as gateway:
        eventually("all of the cache to be known", lambda: gauge(gateway.ops, "forebay_worker_kv_events") == 2)
        with sdk(engine.url, timeout=SLOW) as direct, sdk(gateway.url, timeout=SLOW) as client:
            yield gateway, direct, client


def text(number, words=500):
    return " ".join(f"{number}{at}" for at in range(words // 4))


def chat(client, number, **extra):
    messages = [{"role": "system", "content": text(number)}, {"role": "user", "content": "Go on."}]
    return client.chat.completions.create(model="smollm2", messages=messages, max_tokens=1, extra_body=extra)


def completion(client, number, **extra):
    return client.completions.create(model="smollm2", prompt=text(number), max_tokens=1, extra_body=extra)


def ids(client, number, **extra):
    """A prompt that ends with a block: vLLM computes all of the last block again."""
    prompt = [(number * 31 + at) % 4000 + 100 for at in range(4 * BLOCK)]
    return client.completions.create(model="smollm2", prompt=prompt, max_tokens=1, extra_body=extra)


def received(gateway):
    return gauge(gateway.ops, "forebay_kv_events_total")


def behind_its_back(setting, ask, number, **extra):
    """Has the engine answer, and waits until its events say that it has the prompt."""
    gateway, direct, _ = setting
    before = received(gateway)
    ask(direct, number, **extra)
    eventually("the engine's events", lambda: received(gateway) > before)


def agree(setting, ask, number, **extra):
    """What the gateway expected in the cache is what was there; gives that."""
    gateway, _, client = setting
    before = received(gateway)
    answer = ask(client, number, **extra)
    row = gateway.row(answer._request_id)
    details = answer.usage.prompt_tokens_details
    cached = (details.cached_tokens if details else None) or 0
    if answer.usage.prompt_tokens // BLOCK > cached // BLOCK:
        eventually("the events of what is new", lambda: received(gateway) > before)
    assert row["matched_tokens"] == cached, row
    return cached


@pytest.mark.parametrize("ask", [chat, completion, ids])
@pytest.mark.parametrize("extra", [{}, {"cache_salt": "mine"}], ids=["plain", "salted"])
def test_what_is_believed_is_what_is_cached(setting, ask, extra):
    number = 100 + 10 * [chat, completion, ids].index(ask) + len(extra)
    behind_its_back(setting, ask, number, **extra)
    assert agree(setting, ask, number, **extra) >= 2 * BLOCK
    # Again, by what the gateway itself sent there.
    assert agree(setting, ask, number, **extra) >= 2 * BLOCK
    # The same words under another salt are in nobody's cache.
    assert agree(setting, ask, number, cache_salt="another's") == 0


def test_what_was_dropped_is_not_believed_in(setting):
    for number in range(200, 210):
        behind_its_back(setting, ids, number)
    found = [agree(setting, ids, number) for number in (209, 200, 208, 201)]
    assert found[0] == 3 * BLOCK and found[1] == 0, found
