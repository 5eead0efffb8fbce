"""Processes under test: started on free ports, asked over HTTP, killed at the end.

Nothing here sleeps to wait for a condition: `eventually` asks again and again, within a bound.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import httpx2

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "backends/simulated-engine/model"

# Longest wait for anything, in seconds. Machines are shared: generous, and never waited for when all is well.
PATIENCE = 20.0


def binary() -> Path:
    """The gateway under test, built beforehand (`cargo build`)."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = (ROOT / target / "debug/forebay").resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `cargo build` first")
    return path


def eventually(what, condition, patience=PATIENCE):
    """The first true value that `condition` gives; fails with `what` after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < until, f"waited {patience} s for {what}"
        time.sleep(0.01)


class Process:
    """A child whose output is collected line by line."""

    def __init__(self, arguments, directory, environment=None, **options):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.child = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=directory,
            env=kept | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            **options,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.child.stdout:
            self.lines.append(line)

    def line(self, pattern, patience=PATIENCE):
        """The match of the first line in which `pattern` is found."""

        def look():
            ended = self.child.poll() is not None
            if ended:
                self._reader.join(PATIENCE)
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            assert not ended, f"ended with {self.child.returncode} before `{pattern}`:\n{''.join(self.lines)}"
            return None

        return eventually(f"a line with `{pattern}`", look, patience)

    def signal(self, number):
        self.child.send_signal(number)

    def wait(self, patience=PATIENCE):
        return self.child.wait(patience)

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(PATIENCE)
        self._reader.join(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def get(url):
    return httpx2.get(url, timeout=PATIENCE)


def gauge(url, name):
    """The value of the first series of a metrics page that is called `name`, whatever its labels; 0 without one."""
    match = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", get(f"{url}/metrics").text, re.MULTILINE)
    return float(match.group(1)) if match else 0.0


class Worker(Process):
    """A simulated engine that serves the model `m`."""

    def __init__(self, *flags, speed=50.0):
        self._directory = tempfile.TemporaryDirectory()
        arguments = [binary(), "simulated-worker", "--port", 0, "--model", "m", "--speed", speed, *flags]
        super().__init__(arguments, self._directory.name)
        self.url = self.line(r"simulated .* at (http://\S+)").group(1)

    def faults(self, *faults):
        """What goes wrong from now on; nothing when empty."""
        answer = httpx2.post(f"{self.url}/simulated/faults", json={"faults": faults}, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text

    def log(self):
        return get(f"{self.url}/simulated/log").json()

    def begun(self):
        """Requests that run the model and reached this worker until now."""
        return self.log()["requests"]["begun"]

    def running(self):
        return self.log()["sequences"]["running"]

    def close(self):
        super().close()
        self._directory.cleanup()


class Gateway(Process):
    """A gateway. `models` is TOML that follows the `[server]` table, `server` are more keys of that table."""

    def __init__(self, models, server="", ready=True):
        self._directory = tempfile.TemporaryDirectory()
        self.directory = Path(self._directory.name)
        file = self.directory / "forebay.toml"
        listeners = 'listen = "127.0.0.1:0"\nops_listen = "127.0.0.1:0"\ndata_dir = "data"'
        file.write_text(f"[server]\n{listeners}\n{server}\n{models}")
        self._serve(["--config", file], ready)

    @classmethod
    def probing(cls):
        """Without a configuration: it looks for engines itself."""
        gateway = cls.__new__(cls)
        gateway._directory = tempfile.TemporaryDirectory()
        gateway.directory = Path(gateway._directory.name)
        gateway._serve([], True, {"FOREBAY_DATA_DIR": "data"})
        return gateway

    def _serve(self, arguments, ready, environment=None):
        super().__init__([binary(), "serve", *arguments], self.directory, environment)
        addresses = self.line(r"clients: (http://\S+)\s+operators: (http://\S+)")
        self.url, self.ops = addresses.groups()
        if ready:
            eventually("a worker to be up", lambda: get(f"{self.ops}/readyz").status_code == 200)

    def rows(self):
        """All rows of the journal, oldest first."""
        files = sorted((self.directory / "data/journal").glob("*.jsonl"))
        # The last line of a file may still be on its way.
        complete = (line for file in files for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n")
        return [json.loads(line) for line in complete]

    def ended(self, count):
        """The rows of the first `count` requests, as soon as all are there; fails when there are more."""
        eventually(f"{count} rows", lambda: len(self.rows()) >= count)
        rows = self.rows()
        assert len(rows) == count, rows
        return rows

    def row(self, request_id):
        """The row of the request with this `x-request-id`, as soon as it is there."""
        found = eventually(f"the row of {request_id}", lambda: [r for r in self.rows() if r["request"] == request_id])
        assert len(found) == 1, found
        return found[0]

    def post(self, path, **arguments):
        """A request that the SDK would not send."""
        return httpx2.post(f"{self.url}{path}", timeout=PATIENCE, **arguments)

    def close(self):
        super().close()
        self._directory.cleanup()


def model(workers, name="m", **keys):
    """TOML of a model on these workers, which are named `w0`, `w1`, …"""
    lines = ["[[model]]", f"name = {json.dumps(name)}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in ({"tokenizer": str(TOKENIZER)} | keys).items() if value]
    for index, worker in enumerate(workers):
        prefix = "w" if name == "m" else f"{name}-w"
        lines += ["[[model.worker]]", f'name = "{prefix}{index}"', f'url = "{worker.url}"']
        if name != "m":
            lines.append('model = "m"')
    return "\n".join(lines) + "\n"


TERM, KILL = signal.SIGTERM, signal.SIGKILL
