"""Real engines with real, small models: where they are, and how they are started.

Their scripts lie in `$FOREBAY_SHARED_DIR/real-engines`, what the scripts installed in `$REAL_ENGINES_DIR`. What is not
there is skipped with its reason. vLLM takes a minute to start and some gigabytes of memory: its tests run with
`FOREBAY_TEST_VLLM=1`.
"""

import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))

from clients import sdk  # noqa: E402
from processes import PATIENCE, ROOT, Gateway, Process, eventually, gauge  # noqa: E402

SHARED = Path(os.environ.get("FOREBAY_SHARED_DIR", ROOT / "../shared")).resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
INSTALLED = Path(os.environ.get("REAL_ENGINES_DIR", CACHE / "real-engines"))

# Tokens of prompt and answer that the engines' `smollm2` takes.
CONTEXT = 2048

# Name of the script and program: what it must have installed, seconds until it serves, and its series of metrics that
# says how many requests run.
KINDS = {
    "llamacpp": (["llamacpp/bin/python", "models/smollm2.gguf"], 60, "llamacpp:requests_processing"),
    "vllm": (["vllm/bin/vllm", "models/smollm2", "models/minilm"], 300, "vllm:num_requests_running"),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require(kind):
    """Skips, saying why, when this engine is not to be had."""
    if not (SHARED / "real-engines").is_dir():
        pytest.skip(f"{SHARED}/real-engines not found")
    if kind == "vllm" and os.environ.get("FOREBAY_TEST_VLLM") != "1":
        pytest.skip("vLLM takes minutes: set FOREBAY_TEST_VLLM=1")
    for path in KINDS[kind][0]:
        if not (INSTALLED / path).exists():
            pytest.skip(f"{INSTALLED / path} not found: run {SHARED}/real-engines/setup.sh {kind}")


class Engine(Process):
    """A real engine on a port of its own; ready when made. It has `smollm2` unless told otherwise."""

    def __init__(self, kind, *options, port=None):
        require(kind)
        self.kind, self.port = kind, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        script = SHARED / "real-engines" / f"start-{kind}.sh"
        environment = {"REAL_ENGINES_DIR": str(INSTALLED)}
        super().__init__(["bash", script, self.port, *options], INSTALLED, environment, start_new_session=True)
        try:
            eventually(f"{kind} to be ready", self._healthy, KINDS[kind][1])
        except BaseException:
            self.close()
            raise

    def _healthy(self):
        assert self.child.poll() is None, "".join(self.lines)
        try:
            return httpx2.get(f"{self.url}/health", timeout=PATIENCE).status_code == 200
        except httpx2.TransportError:
            return False

    def running(self):
        """Requests under way, by its own count."""
        return gauge(self.url, KINDS[self.kind][2])

    def close(self):
        # vLLM is more than one process.
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        super().close()


def model(engine, tokenizer=SHARED / "tokenizers/smollm2", name="smollm2", **keys):
    """TOML of the model `name`, which is also `small`, on this engine."""
    lines = ["[[model]]", f'name = "{name}"', 'aliases = ["small"]', f'tokenizer = "{tokenizer}"']
    lines += [f"{key} = {value}" for key, value in keys.items()]
    return "\n".join([*lines, "[[model.worker]]", 'name = "real"', f'url = "{engine.url}"']) + "\n"


@pytest.fixture(scope="session", params=KINDS)
def engine(request):
    with Engine(request.param) as engine:
        yield engine


@pytest.fixture(scope="session")
def gateway(engine):
    with Gateway(model(engine)) as gateway:
        yield gateway


# Real models answer slowly on a busy machine without a GPU, and compile grammars at their first use.
SLOW = 120.0


@pytest.fixture(scope="session")
def client(gateway):
    with sdk(gateway.url, timeout=SLOW) as client:
        yield client


@pytest.fixture(scope="session")
def direct(engine):
    """The SDK at the engine itself: what the gateway's answers are held against."""
    with sdk(engine.url, timeout=SLOW) as client:
        yield client


@pytest.fixture
def start():
    """Starts engines and gateways that only one test uses."""
    with ExitStack() as stack:
        yield stack.enter_context
