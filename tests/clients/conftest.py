"""What the tests share: two fast workers behind a gateway, a slow one behind another, and SDK clients for each."""

import asyncio
from contextlib import ExitStack

import pytest

from clients import sdk
from processes import PATIENCE, Gateway, Worker, model

# Small, so that a prompt over the context and a body over the limit are cheap to make.
CONTEXT = 2048
BODY_BYTES = 64 << 10


@pytest.fixture(scope="session")
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def workers(stack):
    return [stack.enter_context(Worker("--max-model-len", CONTEXT)) for _ in range(2)]


@pytest.fixture(scope="session")
def gateway(stack, workers):
    """Two workers of the model `m`, also called `llama`, and of `org/other`, which is `m` to them."""
    models = model(workers, aliases=["llama"]) + model(workers, name="org/other")
    return stack.enter_context(Gateway(models, server=f"body_bytes_max = {BODY_BYTES}"))


@pytest.fixture(scope="session")
def client(stack, gateway):
    return stack.enter_context(sdk(gateway.url))


@pytest.fixture(scope="session")
def direct(stack, workers):
    """The SDK at a worker itself: what the gateway's answers are held against."""
    return stack.enter_context(sdk(workers[0].url))


@pytest.fixture(scope="session")
def slow_worker(stack):
    """Some 90 tokens a second: there is time to leave."""
    return stack.enter_context(Worker(speed=1.0))


@pytest.fixture(scope="session")
def slow(stack, slow_worker):
    return stack.enter_context(Gateway(model([slow_worker])))


@pytest.fixture
def start():
    """Starts workers and gateways that only one test uses."""
    with ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def run():
    """Runs a test's coroutine within a bound."""

    def within(coroutine):
        return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))

    return within
