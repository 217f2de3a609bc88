# `make help` lists the targets. Each does its own set-up, once for every change of what it depends on.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup setup-lava setup-peers setup-neurobench setup-interop demo test test-slow fuzz bench-chip bench-onnx bench-train bench-quantization interop accuracy accuracy-run check lint types structure format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

setup: $(SETUP) ## virtual environment in .venv with spikeport and its tools

$(SETUP): pyproject.toml constraints.txt .ci/setup.sh
	@PYTHON="$(PYTHON)" .ci/setup.sh

setup-lava: $(SETUP) ## second environment in .venv-lava with Lava, where a Python 3.10 can be had
	@.ci/setup-lava.sh

setup-peers: $(SETUP) ## third environment in .venv-peers with the simulators that ours is compared with
	@.ci/setup-peers.sh

setup-neurobench: $(SETUP) ## NeuroBench beside the environment, in .neurobench; its operation counts are an oracle
	@.ci/setup-neurobench.sh

setup-interop: $(SETUP) ## environment in .venv-interop with the libraries that our files and our training are compared with
	@.ci/setup-interop.sh

demo: setup setup-lava ## train, convert, verify and report on the digits, results in runs/digits
	$(BIN)/spikeport run digits -o runs/digits

test: setup setup-lava setup-peers setup-neurobench ## every test but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup setup-lava ## the slow tests
	$(BIN)/python -m pytest -m slow

fuzz: setup ## the readers on files that nobody would write, for about an hour; `make test` tries some hundreds
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest --timeout=0 tests/test_*_fuzz.py

bench-chip: setup setup-lava setup-peers ## the chip simulator beside SANA-FE and Lava; exit status 1 where a must is missed
	$(BIN)/python bench/chip.py --json docs/chip-speed.json --plot docs/chip-speed.png

bench-onnx: setup ## accuracy of a converted ANN against the number of steps; exit status 1 where a must is missed
	$(BIN)/python bench/onnx_accuracy.py --json docs/onnx-accuracy.json --plot docs/onnx-accuracy.png

bench-train: setup setup-interop ## the trainer beside snnTorch and SpikingJelly; exit status 1 where a must is missed
	$(BIN)/python bench/train_speed.py --store docs/train-speed

bench-quantization: setup ## accuracy and spikes at 8 to 2 bits of trained runs; exit status 1 where a must is missed
	$(BIN)/python bench/quantization.py

interop: setup setup-lava setup-interop ## NIR both ways with other libraries, and networks that they trained; exit status 1 on a miss
	$(BIN)/python bench/interop.py

accuracy: setup ## the accuracy of the published methods from stored results; exit status 1 where a must is missed
	$(BIN)/python bench/accuracy.py

NAME ?= mnist
SEED ?= 1
accuracy-run: setup setup-lava ## one of these results again from scratch: make accuracy-run NAME=mnist SEED=1
	$(BIN)/python bench/accuracy.py run $(NAME) --seed $(SEED)

check: lint types structure ## every static check; `make -k check` goes on after a failure

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

structure: setup
	$(BIN)/python -m pytest -q tests/test_import_direction.py tests/test_repository.py

format: setup ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build output
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find models converters deploy tests hw_tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the environments
	rm -rf .venv .venv-lava .venv-peers .venv-interop .neurobench .links *.egg-info
