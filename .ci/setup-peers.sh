#!/bin/sh
# Makes .venv-peers: simulators that ours is compared with, on the Python of .venv. `make setup-peers` calls it.
# They are an extra check, so where they cannot be had this says why in one line, leaves nothing behind, and succeeds.
set -u
cd "$(dirname "$0")/.."
target=.venv-peers
requirements="sanafe==2.2.9 numpy"
stamp=$target/.setup-stamp

has_peers() {
    "$1" -c 'import sys, importlib.metadata, numpy, sanafe
raise SystemExit("sanafe==" + importlib.metadata.version("sanafe") not in sys.argv[1].split())' \
        "$requirements" >/dev/null 2>&1
}

skip() {
    rm -rf "$target"
    echo "setup-peers: skipped: $1. Everything but the comparison with SANA-FE works without it."
    exit 0
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$requirements" ] && [ -x "$target/bin/python" ]; then
    exit 0
fi

if ! has_peers "$target/bin/python"; then
    python=.venv/bin/python
    [ -x "$python" ] || skip "there is no .venv; run \`make setup\` first"
    echo "setup-peers: making $target with $("$python" --version)"
    trap 'rm -rf "$target"; exit 130' INT TERM
    rm -rf "$target"
    "$python" -m venv "$target" >/dev/null 2>&1 || skip "$python cannot make a virtual environment"
    # shellcheck disable=SC2086 # the requirements are words
    if ! message=$("$target/bin/python" -m pip install --quiet --disable-pip-version-check $requirements 2>&1); then
        skip "pip could not install sanafe ($(printf '%s\n' "$message" | tail -n 1))"
    fi
    has_peers "$target/bin/python" || skip "sanafe is installed but does not import"
fi
echo "$requirements" >"$stamp"
