#!/bin/sh
# Makes .venv-interop: the libraries that NIR files are exchanged with and training is compared with, on the Python of .venv
# and with the torch that is in it. `make setup-interop` calls it. They are oracles and peers, and no dependency.
# Where they cannot be had this says why in one line, leaves nothing behind, and succeeds.
set -u
cd "$(dirname "$0")/.."
target=.venv-interop
# one version of nir and nirtorch for all; Sinabs asks for an older nir, and works with this one
peers="norse==1.1.0 snntorch==1.0.0 sinabs==3.1.3 spikingjelly==2.0.0 nir==1.0.8 nirtorch==2.6"
needs="numpy h5py matplotlib onnxruntime==1.32.0 loguru>=0.7,<1 pbr<8" # all that they import here; the rest would bring CUDA
stamp=$target/.setup-stamp

has_peers() {
    "$1" -c 'import sys, importlib.metadata as found, norse.torch, snntorch.import_nir, sinabs.nir, onnxruntime
import spikingjelly.activation_based.nir_exchange
wanted = dict(word.split("==") for word in sys.argv[1].split())
raise SystemExit(any(found.version(name) != version for name, version in wanted.items()))' "$peers" >/dev/null 2>&1
}

skip() {
    rm -rf "$target"
    echo "setup-interop: skipped: $1. Everything but the comparison with these libraries (\`make interop\`, \`make bench-train\`) works without it."
    exit 0
}

install() {
    "$target/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2>&1
}

python=.venv/bin/python
[ -x "$python" ] || skip "there is no .venv; run \`make setup\` first"
torch=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("torch").partition("+")[0])' 2>/dev/null) ||
    skip "there is no torch in .venv; run \`make setup\` first"
wanted="torch==$torch $peers $needs"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -x "$target/bin/python" ]; then
    exit 0
fi

echo "setup-interop: making $target with $("$python" --version) and torch $torch"
trap 'rm -rf "$target"; exit 130' INT TERM
rm -rf "$target"
"$python" -m venv "$target" >/dev/null 2>&1 || skip "$python cannot make a virtual environment"
# shellcheck disable=SC2086 # the requirements are words
message=$(install "torch==$torch" $needs) ||
    skip "pip could not install torch and what the libraries need ($(printf '%s\n' "$message" | tail -n 1))"
# shellcheck disable=SC2086
message=$(install --no-deps $peers) ||
    skip "pip could not install $peers ($(printf '%s\n' "$message" | tail -n 1))"
has_peers "$target/bin/python" || skip "$peers are installed but do not import"
echo "$wanted" >"$stamp"
