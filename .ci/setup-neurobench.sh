#!/bin/sh
# Makes .neurobench: the package `neurobench`, beside the environment and not in it. It asks for torchaudio and tonic,
# which its operation counts never import, so only what they do import is installed: three small packages in pure Python.
# NeuroBench is an extra check, so where it cannot be had this says why in one line, leaves nothing behind, and succeeds.
set -u
cd "$(dirname "$0")/.."
target=.neurobench
requirements="neurobench==2.3.0 snntorch==1.0.0 tqdm<5"
stamp=$target/.setup-stamp

skip() {
    rm -rf "$target"
    echo "setup-neurobench: skipped: $1. Everything but the comparison with NeuroBench works without it."
    exit 0
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$requirements" ]; then
    exit 0
fi
[ -x .venv/bin/python ] || skip "there is no .venv, which setup.sh makes"

echo "setup-neurobench: making $target"
trap 'rm -rf "$target"; exit 130' INT TERM
rm -rf "$target"
# shellcheck disable=SC2086 # the requirements are words
if ! message=$(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$target" \
    $requirements 2>&1); then
    skip "pip could not install neurobench ($(printf '%s\n' "$message" | tail -n 1))"
fi
PYTHONPATH=$target .venv/bin/python -c 'import neurobench.benchmarks' >/dev/null 2>&1 ||
    skip "neurobench is installed but does not import"
echo '*' >"$target/.gitignore"
echo "$requirements" >"$stamp"
