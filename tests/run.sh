#!/usr/bin/env bash
# Everything that must hold, in one command: format, lints, unit, property, wire and doc tests, the scheduler beside its
# rivals, the official OpenAI SDK, and a real llama.cpp server where one is set up. What this machine lacks is installed
# when it may be; what is left out is said at the end. With CI=true nothing may be left out.
#
#   tests/run.sh            all of it
#   tests/run.sh test …     only these parts: fmt clippy test schedule clients real
#   FOREBAY_TEST_VLLM=1     also asks a real vLLM, where one is set up (some minutes)
set -uo pipefail
cd "$(dirname "$0")/.."
export FOREBAY_SHARED_DIR="${FOREBAY_SHARED_DIR:-$PWD/../shared}"
parts=("$@"); [ ${#parts[@]} -gt 0 ] || parts=(fmt clippy test schedule clients real)
left_out=() failed=()
# What a build may have, so that nothing of it goes untested, and one build for all parts.
all=(--features kubernetes)

say() { printf '\n== %s\n' "$*"; }
leave_out() { left_out+=("$1"); printf 'left out: %s\n' "$1"; }
wanted() { local part; for part in "${parts[@]}"; do [ "$part" = "$1" ] && return 0; done; return 1; }
step() { local name=$1; shift; say "$name"; local began=$SECONDS; "$@" || failed+=("$name"); echo "($name: $((SECONDS - began)) s)"; }
component() { cargo "$1" --version >/dev/null 2>&1 || rustup component add "$2" >/dev/null 2>&1; cargo "$1" --version >/dev/null 2>&1; }

command -v cargo >/dev/null || { echo 'Rust is needed: https://rustup.rs'; exit 1; }
command -v cc >/dev/null || { echo 'A C compiler is needed (Debian: apt-get install gcc)'; exit 1; }

if wanted fmt; then
  if component fmt rustfmt; then step fmt cargo fmt --all --check; else leave_out 'format check: no rustfmt'; fi
fi
if wanted clippy; then
  if component clippy clippy; then step clippy cargo clippy --locked --workspace --all-targets "${all[@]}" -- -D warnings; else leave_out 'lints: no clippy'; fi
fi
if wanted test; then
  step test cargo test --locked --workspace "${all[@]}"
  step doc env RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps "${all[@]}" --quiet
fi

if wanted schedule; then step schedule cargo bench --locked --bench scheduling -- --quick; fi

# A virtual environment with the pinned clients; made again when the pins change.
clients_venv() {
  local venv=tests/clients/.venv pins=tests/clients/requirements.txt
  if [ ! -x "$venv/bin/python" ] || ! cmp -s "$pins" "$venv/pins"; then
    rm -rf "$venv"
    python3 -m venv "$venv" || return 1
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$pins" || return 1
    cp "$pins" "$venv/pins"
  fi
}

if wanted clients; then
  say 'clients: the official SDK'
  if ! command -v python3 >/dev/null; then
    leave_out 'official SDK: no python3'
  elif ! clients_venv; then
    rm -rf tests/clients/.venv
    leave_out 'official SDK: its packages could not be installed (Debian also needs python3-venv)'
  else
    step build cargo build --locked "${all[@]}"
    step clients tests/clients/.venv/bin/python -m pytest -q tests/clients
  fi
fi

if wanted real; then
  say 'real: a real llama.cpp server'
  engines="${REAL_ENGINES_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/real-engines}"
  setup="$FOREBAY_SHARED_DIR/real-engines/setup.sh"
  if [ ! -d "$engines/llamacpp" ] && [ -n "${CI:-}" ] && [ -f "$setup" ]; then bash "$setup" llamacpp || true; fi
  if [ ! -d "$FOREBAY_SHARED_DIR/real-engines" ]; then
    printf 'skipped: %s/real-engines not found\n' "$FOREBAY_SHARED_DIR"
  elif ! clients_venv; then
    leave_out 'real engines: the official SDK is not installed'
  else
    step build cargo build --locked "${all[@]}"
    step real tests/clients/.venv/bin/python -m pytest -q -rs tests/real
  fi
fi

say 'result'
for part in "${left_out[@]:-}"; do [ -n "$part" ] && echo "left out: $part"; done
for part in "${failed[@]:-}"; do [ -n "$part" ] && echo "FAILED: $part"; done
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
if [ -n "${CI:-}" ] && [ ${#left_out[@]} -gt 0 ]; then echo 'in CI nothing may be left out'; exit 1; fi
echo 'all passed'
