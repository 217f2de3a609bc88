#!/bin/sh
# Makes .venv with spikeport (editable) and its development tools, and .links for static tools. `make setup` calls it.
set -eu
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    for candidate in "${PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>&1 | head -n 1)
    echo "setup: spikeport needs Python 3.11 or newer; ${PYTHON:-python3} is: ${found:-not there}." >&2
    echo "setup: install one and name it: make setup PYTHON=/path/to/python3.11" >&2
    return 1
}

if ! new_enough .venv/bin/python; then
    python=$(find_python)
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "setup: $python cannot make a virtual environment; on Debian and Ubuntu install python3-venv." >&2
        exit 1
    fi
fi

echo "setup: installing spikeport and its tools into .venv, which takes a few minutes"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'

# The three folders under the name by which they are imported, for mypy and for an editor's go-to-definition.
mkdir -p .links/spikeport
for folder in models converters deploy; do
    ln -sfn "../../$folder" ".links/spikeport/$folder"
done

touch .venv/.setup-stamp
