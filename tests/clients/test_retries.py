"""Workers that fail, as the SDK sees it: not at all while another can answer, and as one clean exception otherwise."""

import openai
import pytest

from clients import joined, sdk
from processes import TERM, Gateway, Worker, eventually, get, model

MESSAGES = [{"role": "user", "content": "How deep is the water?"}]
STATUS = {"status": {"code": 500}}


def ask(client, **more):
    return client.chat.completions.create(**{"model": "m", "messages": MESSAGES, **more})


@pytest.fixture
def pair(start):
    """Two workers of their own and a gateway, since failures leave traces in what the gateway thinks of a worker."""
    workers = [start(Worker()) for _ in range(2)]
    return workers, start(Gateway(model(workers)))


@pytest.mark.parametrize(
    "fault",
    [
        STATUS,
        {"status": {"code": 503}},
        {"status": {"code": 429}},
        {"status": {"code": 429, "retry_after": 1}},
        {"cut": {"after": 0}},
        {"cut": {"after": 0, "reset": True}},
        {"error": {"after": 0}},
    ],
    ids=lambda fault: "-".join([*fault, *map(str, next(iter(fault.values())).values())]),
)
def test_another_worker_answers(pair, fault):
    workers, gateway = pair
    with sdk(gateway.url) as client:

        def answer(stream):
            prompt = [{"role": "user", "content": f"How deep is the water, {stream}? " * 100}]
            raw = client.chat.completions.with_raw_response.create(
                model="m", messages=prompt, stream=stream, max_tokens=20, extra_body={"ignore_eos": True}
            )
            text = joined(raw.parse())[0] if stream else raw.parse().choices[0].message.content
            return text, raw.headers["x-forebay-worker"], gateway.row(raw.headers["x-request-id"])

        for stream in (False, True):
            expected, first, row = answer(stream)
            assert row["attempts"] == 1
            # It has the prompt in its cache, so the next such request is sent there first.
            workers[int(first[1])].faults({"kind": fault})
            begun = sum(worker.begun() for worker in workers)
            text, second, row = answer(stream)
            workers[int(first[1])].faults()
            assert text == expected and second != first
            assert (row["outcome"], row["worker"]) == ("completed", second)
            # An overloaded worker is tried again after a second, if the other was overloaded just before.
            assert row["attempts"] == sum(worker.begun() for worker in workers) - begun
            assert row["attempts"] in ((2, 3) if fault.get("status", {}).get("code") in (429, 503) else (2,))


def test_all_workers_fail(pair):
    workers, gateway = pair
    for worker in workers:
        worker.faults({"kind": STATUS})
    # Our own attempts are spent: the SDK, which would try twice again, is told not to.
    with sdk(gateway.url, max_retries=2) as client, pytest.raises(openai.InternalServerError) as failed:
        ask(client)
    error = failed.value
    assert (error.status_code, error.type) == (502, "server_error") and isinstance(error.code, str)
    assert error.response.headers["x-should-retry"] == "false"
    (row,) = gateway.ended(1)
    assert (row["outcome"], row["status"]) == ("failed", 502)
    assert 2 <= row["attempts"] == sum(worker.begun() for worker in workers) <= 3


@pytest.mark.parametrize(
    "cut",
    [
        {"cut": {"after": 4}},
        {"cut": {"after": 4, "reset": True}},
        {"error": {"after": 4}},
        {"garbage": {"after": 4}},
    ],
    ids=["end", "reset", "error", "garbage"],
)
def test_cut_in_the_middle_of_a_stream(pair, cut):
    workers, gateway = pair
    for worker in workers:
        worker.faults({"kind": cut})
    with sdk(gateway.url, max_retries=2) as client:
        stream = ask(client, stream=True)
        with pytest.raises(openai.APIError) as broken:
            list(stream)
    assert not isinstance(broken.value, openai.APIConnectionError), "an error event, not a broken connection"
    assert broken.value.message and broken.value.type == "server_error" and isinstance(broken.value.code, str)
    row = gateway.row(stream.response.headers["x-request-id"])
    # After the first byte nothing is tried again.
    assert (row["outcome"], row["attempts"]) == ("cut", 1)
    assert sum(worker.begun() for worker in workers) == 1


def test_silent_in_the_middle_of_a_stream(start):
    worker = start(Worker())
    worker.faults({"kind": {"stall": {"after": 4}}})
    gateway = start(Gateway(model([worker], idle_seconds=1)))
    with sdk(gateway.url) as client, pytest.raises(openai.APIError) as broken:
        list(ask(client, stream=True))
    assert not isinstance(broken.value, openai.APIConnectionError) and broken.value.code == "upstream_error"
    eventually("the worker to be free", lambda: worker.running() == 0)


@pytest.mark.parametrize("size", ["small", "large"])
def test_cut_in_the_middle_of_a_whole_answer(start, size):
    worker = start(Worker(speed=1000.0))
    worker.faults({"kind": {"cut": {}}})
    gateway = start(Gateway(model([worker])))
    # Half of some 3 MB is more than the gateway holds back to be able to try again.
    large = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1800, "extra_body": {"ignore_eos": True}}
    with sdk(gateway.url) as client, pytest.raises(openai.APIError) as broken:
        ask(client, **(large if size == "large" else {}))
    (row,) = gateway.ended(1)
    if size == "small":
        assert isinstance(broken.value, openai.InternalServerError) and broken.value.status_code == 502
        assert row["outcome"] == "failed"
    else:
        # Half of it is out under status 200: the connection breaks, so that nobody takes it for the whole.
        assert isinstance(broken.value, openai.APIConnectionError)
        assert row["outcome"] == "cut"


def test_no_worker_and_the_sdks_retries(start):
    worker = start(Worker())
    gateway = start(Gateway(model([worker])))
    worker.close()
    with sdk(gateway.url) as client, pytest.raises(openai.InternalServerError):
        ask(client)  # The gateway notices at the latest now.
    eventually("the gateway to know", lambda: get(f"{gateway.ops}/readyz").status_code == 503)
    with sdk(gateway.url, max_retries=1) as client, pytest.raises(openai.InternalServerError) as refused:
        ask(client)
    error = refused.value
    assert (error.status_code, error.code, error.type) == (503, "no_worker", "service_unavailable_error")
    wait = float(error.response.headers["retry-after"])
    first, second = gateway.ended(3)[1:]
    assert first["outcome"] == second["outcome"] == "refused"
    # By itself the SDK would wait half a second.
    assert second["time"] - first["time"] >= wait >= 1


def test_worker_comes_back(start):
    worker = start(Worker())
    gateway = start(Gateway(model([worker])))
    worker.faults({"kind": STATUS})
    with sdk(gateway.url) as client:
        with pytest.raises(openai.InternalServerError):
            ask(client)
        worker.faults()

        def answered():
            try:
                return ask(client).choices[0].message.content
            except openai.InternalServerError:
                return None

        assert eventually("an answer", answered)


def test_deadline(start):
    worker = start(Worker())
    worker.faults({"kind": {"hang": {}}})
    gateway = start(Gateway(model([worker])))
    with sdk(gateway.url, max_retries=2) as client, pytest.raises(openai.InternalServerError) as late:
        ask(client, extra_headers={"x-forebay-deadline-ms": "300"})
    error = late.value
    assert (error.status_code, error.code) == (504, "deadline_exceeded")
    assert error.response.headers["x-should-retry"] == "false"
    (row,) = gateway.ended(1)
    assert 300 <= row["total_ms"] < 3000


def test_keep_alive_comments_are_no_token(start):
    # A second until the first token, with a comment every 50 ms.
    worker = start(Worker("--prefill-tokens-per-s", 1000, "--sse-keep-alive-interval", 0.05, speed=1.0))
    gateway = start(Gateway(model([worker])))
    with sdk(gateway.url) as client:
        stream = client.completions.create(model="m", prompt=[5] * 1000, max_tokens=3, stream=True)
        assert "".join(choice.text for chunk in stream for choice in chunk.choices)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert row["output_tokens"] == 3 and row["ttft_ms"] > 900


def test_stream_under_way_survives_the_gateways_end(start):
    worker = start(Worker(speed=2.0))
    gateway = start(Gateway(model([worker])))
    with sdk(gateway.url) as client:
        stream = ask(client, stream=True, max_tokens=100, extra_body={"ignore_eos": True})
        chunks = [next(stream)]
        gateway.signal(TERM)
        chunks += stream
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
        assert gateway.wait() == 0
        with pytest.raises(openai.APIConnectionError):
            ask(client)
