#!/bin/sh
# Makes .venv-lava: Lava on the only Python that it runs on, 3.10. `make setup-lava` calls it.
# Lava is an extra check, so where it cannot be had this says why in one line, leaves nothing behind, and succeeds.
set -u
cd "$(dirname "$0")/.."
target=.venv-lava
requirements="lava-nc==0.10.0 numpy==1.26.4" # its convolution fails on numpy 2
stamp=$target/.setup-stamp

is_python310() {
    "$1" -c 'import sys, venv, ensurepip; raise SystemExit(sys.version_info[:2] != (3, 10))' >/dev/null 2>&1
}

has_lava() {
    "$1" -c 'import sys, importlib.metadata, lava.magma.core.run_configs
raise SystemExit("lava-nc==" + importlib.metadata.version("lava-nc") not in sys.argv[1].split())' \
        "$requirements" >/dev/null 2>&1
}

skip() {
    rm -rf "$target"
    echo "setup-lava: skipped: $1. Everything but the comparison with Lava works without it."
    exit 0
}

# Prints the first Python 3.10 that answers. A pyenv shim of another version is on PATH and fails, hence the test runs.
find_python() {
    for candidate in "${SPIKEPORT_LAVA_PYTHON:-}" python3.10; do
        if [ -n "$candidate" ] && is_python310 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if version=$(pyenv latest 3.10 2>/dev/null) && candidate=$(pyenv prefix "$version" 2>/dev/null)/bin/python; then
        if is_python310 "$candidate"; then
            echo "$candidate"
            return
        fi
    fi
    uv=$(command -v uv || echo .venv/bin/uv)
    if [ ! -x "$uv" ] && [ -x .venv/bin/python ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check uv >/dev/null 2>&1
    fi
    if "$uv" python install --quiet 3.10 >/dev/null 2>&1 && candidate=$("$uv" python find 3.10 2>/dev/null); then
        if is_python310 "$candidate"; then
            echo "$candidate"
            return
        fi
    fi
    return 1
}

if [ -n "${SPIKEPORT_LAVA_PYTHON:-}" ] && has_lava "$SPIKEPORT_LAVA_PYTHON"; then
    echo "setup-lava: SPIKEPORT_LAVA_PYTHON has Lava already"
    exit 0
fi
if [ "$(cat "$stamp" 2>/dev/null)" = "$requirements" ] && [ -x "$target/bin/python" ]; then
    exit 0
fi

if ! has_lava "$target/bin/python"; then
    python=$(find_python) ||
        skip "no Python 3.10 found (looked at SPIKEPORT_LAVA_PYTHON, python3.10, pyenv, and for uv to fetch one)"
    echo "setup-lava: making $target with $("$python" --version)"
    trap 'rm -rf "$target"; exit 130' INT TERM
    rm -rf "$target"
    "$python" -m venv "$target" >/dev/null 2>&1 || skip "$python cannot make a virtual environment"
    # shellcheck disable=SC2086 # the requirements are words
    if ! message=$("$target/bin/python" -m pip install --quiet --disable-pip-version-check $requirements 2>&1); then
        skip "pip could not install lava-nc ($(printf '%s\n' "$message" | tail -n 1))"
    fi
    has_lava "$target/bin/python" || skip "lava-nc is installed but does not import"
fi
echo "$requirements" >"$stamp"
