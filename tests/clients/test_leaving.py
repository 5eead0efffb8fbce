"""Clients that leave: time-outs, closed streams, cancelled tasks. The worker must be free at once, and the journal must
say who ended it."""

import asyncio
import time

import openai
import pytest

from clients import sdk
from processes import eventually

# Longest until the worker is free, in seconds. The gateway's own bound is 0.1 s; the rest is for busy machines.
FREE_WITHIN = 1.0

# Some ten seconds of work.
LONG = {"model": "m", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 900}
FOREVER = {"ignore_eos": True}


@pytest.fixture
def freed(slow_worker):
    """Fails the test when the worker is not free soon after its body has ended."""
    assert slow_worker.running() == 0
    aborted = slow_worker.log()["sequences"]["aborted"]
    yield
    eventually("the worker to be free", lambda: slow_worker.running() == 0, FREE_WITHIN)
    assert slow_worker.log()["sequences"]["aborted"] > aborted


def busy(worker):
    return eventually("the worker to be busy", worker.running)


def left(gateway, request_id):
    row = gateway.row(request_id)
    assert row["outcome"] == "client_gone", row
    return row


@pytest.mark.parametrize("stream", [False, True])
def test_client_times_out(slow, slow_worker, freed, stream):
    identity = {"x-request-id": f"times-out-{stream}"}
    with sdk(slow.url) as client:
        before = time.monotonic()
        with pytest.raises(openai.APITimeoutError):
            impatient = client.with_options(timeout=0.4)
            # Nothing of a whole answer comes before its end; a stream is silent when the worker is.
            if stream:
                slow_worker.faults({"kind": {"stall": {"after": 3}}})
            request = LONG | {"stream": stream, "extra_body": FOREVER, "extra_headers": identity}
            list(impatient.chat.completions.create(**request))
        assert time.monotonic() - before < 5
    slow_worker.faults()
    row = left(slow, identity["x-request-id"])
    assert row["stream"] == stream and row["status"] == (200 if stream else 499)


def test_timeouts_are_retried_as_the_client_says(slow, slow_worker, freed):
    begun = slow_worker.begun()
    identity = {"x-request-id": "tried-twice"}
    with sdk(slow.url) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=1).chat.completions.create(
            **LONG, extra_body=FOREVER, extra_headers=identity
        )
    assert slow_worker.begun() == begun + 2

    def outcomes():
        return [row["outcome"] for row in slow.rows() if row["request"] == "tried-twice"]

    eventually("two rows", lambda: len(outcomes()) == 2)
    assert outcomes() == ["client_gone"] * 2


def test_closed_stream(slow, slow_worker, freed):
    with sdk(slow.url) as client:
        stream = client.chat.completions.create(**LONG, stream=True, extra_body=FOREVER)
        for _, chunk in zip(range(5), stream):
            assert chunk.choices
        assert busy(slow_worker) == 1
        stream.close()
        eventually("the worker to be free", lambda: slow_worker.running() == 0, FREE_WITHIN)
        row = left(slow, stream.response.headers["x-request-id"])
        # What was made until then is on record although no usage came.
        assert row["output_tokens"] >= 3 and row["output_tokens_from"] == "events"
        assert row["prompt_tokens"] > 0 and row["prompt_tokens_from"] == "tokenizer"


@pytest.mark.parametrize("stream", [False, True])
def test_cancelled_task(slow, slow_worker, freed, run, stream):
    identity = {"x-request-id": f"cancelled-{stream}"}

    async def leave():
        async with sdk(slow.url, openai.AsyncOpenAI) as client:

            async def read():
                answer = await client.chat.completions.create(
                    **LONG, stream=stream, extra_body=FOREVER, extra_headers=identity
                )
                async for _ in answer:
                    pass

            task = asyncio.create_task(read())
            await asyncio.to_thread(busy, slow_worker)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(
                eventually, "the worker to be free", lambda: slow_worker.running() == 0, FREE_WITHIN
            )

    run(leave())
    left(slow, identity["x-request-id"])


def test_one_of_many_leaves(slow, slow_worker, freed, run):
    async def scene():
        async with sdk(slow.url, openai.AsyncOpenAI) as client:

            async def read(number, tokens):
                body = LONG | {"messages": [{"role": "user", "content": f"Go on, {number}."}], "max_tokens": tokens}
                stream = await client.chat.completions.create(**body, stream=True, extra_body=FOREVER)
                return [choice.finish_reason async for chunk in stream for choice in chunk.choices][-1]

            leaver = asyncio.create_task(read(0, 900))
            others = [asyncio.create_task(read(number, 60)) for number in range(1, 4)]
            await asyncio.to_thread(eventually, "four to run", lambda: slow_worker.running() == 4)
            leaver.cancel()
            return await asyncio.gather(*others)

    assert run(scene()) == ["length"] * 3
