"""KV events over the real ZeroMQ: libzmq subscribes to the simulated engine, and publishes to the gateway."""

import struct
from contextlib import contextmanager

import httpx2
import msgpack
import pytest
import zmq

from clients import sdk
from processes import PATIENCE, Gateway, Worker, eventually, gauge, get, model

PROMPT = list(range(100, 170))
BLOCK = 16


@contextmanager
def socket(kind, address=None):
    """A socket of libzmq; connected, or bound to a free port."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.set(zmq.RCVTIMEO, int(PATIENCE * 1000))
        socket.set(zmq.LINGER, 0)
        if address:
            socket.connect(address)
        yield socket


def sources(worker):
    rank = get(f"{worker.url}/kv_event_sources").json()["0"]
    assert (rank["enable_kv_cache_events"], rank["publisher"], rank["topic"]) == (True, "zmq", "")
    return [rank[name].replace("*", "127.0.0.1") for name in ("endpoint", "replay_endpoint")]


def ask(worker, prompt, **more):
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "ignore_eos": True} | more
    answer = httpx2.post(f"{worker.url}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text


def number_of(frame):
    return struct.unpack(">Q", frame)[0]


def replayed(address, start):
    """Every batch from `start` on, as a replay tells it."""
    with socket(zmq.DEALER, address) as dealer:
        dealer.send_multipart([b"", struct.pack(">Q", start)])
        found = []
        while True:
            empty, topic, number, payload = dealer.recv_multipart()
            assert (empty, topic) == (b"", b"")
            if number == b"\xff" * 8:
                assert payload == b""
                return found
            found.append((number_of(number), msgpack.unpackb(payload)))


FIELDS = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys"]
FIELDS += ["group_idx", "kv_cache_spec_kind"]


def named(event):
    """An event of either form as a map."""
    return event if isinstance(event, dict) else dict(zip(["type", *FIELDS], event, strict=False))


@pytest.mark.parametrize("form", [[], ["--kv-events-arrays"]])
def test_libzmq_reads_what_the_simulated_engine_publishes(start, form):
    flags = ["--kv-events", "tcp://127.0.0.1:0", "--kv-events-replay", "tcp://127.0.0.1:0", *form]
    worker = start(Worker(*flags))
    events, replay = sources(worker)
    with socket(zmq.SUB, events) as subscriber, socket(zmq.SUB, events) as other:
        subscriber.subscribe(b"")
        other.subscribe(b"another topic")
        # The first batch may be published before the subscription is there; the replay has it.
        ask(worker, PROMPT)
        first = eventually("the first batch", lambda: replayed(replay, 0))
        [(zero, [time, [event], rank])] = first
        event = named(event)
        assert (zero, rank, event["type"]) == (0, 0, "BlockStored") and time > 1.7e9
        assert event["token_ids"] == PROMPT[:64] and event["block_size"] == BLOCK
        assert (event["parent_block_hash"], event["medium"], event["extra_keys"]) == (None, "GPU", [None] * 4)
        assert all(isinstance(name, int if form else bytes) for name in event["block_hashes"])

        def next_batch():
            ask(worker, [1, 2, 3] * 20)
            return subscriber.poll(50)

        eventually("the subscription", next_batch)
        seen = []
        while subscriber.poll(50):
            seen.append(subscriber.recv_multipart())
        ask(worker, PROMPT + PROMPT, cache_salt="s")
        topic, number, payload = subscriber.recv_multipart()
        assert topic == b"" and number_of(number) == replayed(replay, 0)[-1][0]
        salted = named(msgpack.unpackb(payload)[1][0])
        assert salted["extra_keys"] == [["s"]] + [None] * 7 and salted["token_ids"] == (PROMPT + PROMPT)[:128]
        assert set(salted["block_hashes"]).isdisjoint(event["block_hashes"])
        assert httpx2.post(f"{worker.url}/simulated/kv_events", json={"clear": True}).status_code == 200
        payload = subscriber.recv_multipart()[2]
        cleared = msgpack.unpackb(payload)[1]
        assert cleared == [["AllBlocksCleared"] if form else {"type": "AllBlocksCleared"}]
        assert not other.poll(0), "another topic"


def test_the_gateway_reads_what_libzmq_publishes(start):
    """A publisher as vLLM's: PUB and ROUTER of libzmq, for a worker that publishes nothing itself."""
    worker = start(Worker())
    with socket(zmq.PUB) as publisher, socket(zmq.ROUTER) as router:
        addresses = [f"tcp://127.0.0.1:{s.bind_to_random_port('tcp://127.0.0.1')}" for s in (publisher, router)]
        keys = f'kv_events = "{addresses[0]}"\nkv_events_replay = "{addresses[1]}"\n'
        gateway = start(Gateway(model([worker]) + keys))

        def batch(first, count, parent=None):
            names = [bytes([first + at] * 32) for at in range(count)]
            ids = PROMPT[: count * BLOCK]
            event = {"type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": ids}
            return msgpack.packb([1.0, [event | {"block_size": BLOCK, "lora_id": None, "medium": "GPU"}], 0])

        kept = [batch(1, 1), batch(1, 2), batch(1, 3), batch(1, 4)]

        def answer_replay():
            client, empty, start_at = router.recv_multipart()
            assert empty == b""
            for number, payload in list(enumerate(kept))[number_of(start_at) :]:
                router.send_multipart([client, b"", b"topic", struct.pack(">Q", number), payload])
            router.send_multipart([client, b"", b"", b"\xff" * 8, b""])
            return number_of(start_at)

        def indexed():
            return gauge(gateway.ops, "forebay_prefix_index_blocks")

        assert answer_replay() == 0
        eventually("what was before", lambda: indexed() == 4)
        assert gauge(gateway.ops, "forebay_worker_kv_events") == 2
        with sdk(gateway.url) as client:
            answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=1)
        assert gateway.row(answer._request_id)["matched_tokens"] == 64
        # Number 4 gets lost: the gateway asks for it.
        kept += [batch(40, 1), batch(80, 1, parent=bytes([4] * 32))]
        publisher.send_multipart([b"topic", struct.pack(">Q", 5), kept[5]])
        assert answer_replay() == 4
        eventually("what came since", lambda: indexed() == 5)
        filled = 'forebay_kv_event_breaks_total{worker="w0",kind="filled"} 1\n'
        eventually("the gap to be counted", lambda: filled in get(f"{gateway.ops}/metrics").text)
