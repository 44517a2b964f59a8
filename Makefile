PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moves right
# Processes that share the tests; each takes up to 4 GB.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q

# Tests start many processes, which read the packages' bytecode where it may be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow lint format hooks docs pictures bench report clean messages test-versions

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: export COGVIDEOX_SPLASH_TUNED = demo/tuned
demo: $(VENV)/.installed  ## set up, tune without a TPU, generate a video
	$(BIN)/python -m tuning.sweep search.max_trials=5 results_dir=demo/results
	$(BIN)/python -m tuning.choose
	$(BIN)/python -m pipeline.generate prompt="$(PROMPT)" model=tiny output_dir=demo/videos results_path=demo/results/generate.jsonl
	@echo; echo "Look at:"; ls demo/results/sweeps/*/heatmap.png demo/videos/*/*.mp4

test: $(VENV)/.installed-dev lint  ## set up, then lint, type-check and test: what CI runs
	$(PYTEST) -n $(TEST_WORKERS) --durations=10

test-fast: $(VENV)/.installed-dev  ## the tests that compile little and start no slow process
	$(PYTEST) -n $(TEST_WORKERS) -m 'not slow and not compile'

test-slow: $(VENV)/.installed-dev  ## the tests of minutes each, which `make test` leaves out
	$(PYTEST) -m slow --durations=0

lint: $(VENV)/.installed-dev  ## ruff, its formatter and mypy; they change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## apply the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generator is pinned: the protobuf that runs the messages must be as new as its own (6.31.1).
messages:  ## generate splash_workbench/profiles/xla_pb2.py again, after a change of xla.proto
	$(PYTHON) -m venv .cache/protoc
	.cache/protoc/bin/pip install --quiet grpcio-tools==1.74.0
	.cache/protoc/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. splash_workbench/profiles/xla.proto

hooks: $(VENV)/.installed-dev  ## check what CI checks, but for the long tests, before each commit
	$(BIN)/pre-commit install

# Every run is kept in .benchmarks. To compare: make bench; git checkout OTHER; make bench BENCH=--benchmark-compare
# (the last run kept; =0003 names one; --benchmark-compare-fail=median:20% makes a slower one fail).
bench: $(VENV)/.installed-dev  ## benchmarks of what runs here, kept; BENCH=--benchmark-compare: beside the last
	$(PYTEST) benchmarks --benchmark-only --benchmark-autosave --benchmark-columns=median,iqr,rounds $(BENCH)

report: $(VENV)/.installed  ## what is on record as one page: results/report/index.html
	$(BIN)/python -m tuning.report

docs: $(VENV)/.installed-dev  ## the site of README.md and docs/: build/site/index.html; a broken link fails
	$(BIN)/python docs/make_commands.py
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/.installed  ## draw the pictures of README.md and docs/ from the records
	$(BIN)/python docs/pictures/make.py
	$(BIN)/python tests/architecture.py

clean:  ## delete what tools leave behind; the environment, caches of the user and results stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The two ends of the ranges in pyproject.toml, in environments of their own. On x86-64 each brings a CUDA build of torch:
# several GB. The offline model is for one jaxlib: what it predicts is left out, and what compiles, but for the kernel and a few runs.
OLDEST := jax==0.10.2 jaxlib==0.10.2 torch==2.11.0
NEWEST := jax==0.11.2 jaxlib==0.11.2 torch==2.13.0
# PYTHON: 3.12 or newer, which JAX 0.11 needs.
test-versions: test-versions-OLDEST test-versions-NEWEST  ## tests with the oldest and newest JAX and torch that are accepted
test-versions-%:
	$(PYTHON) -m venv .cache/versions/$*
	.cache/versions/$*/bin/python -m pip install --quiet --editable '.[test]' $($*)
	.cache/versions/$*/bin/python -m pytest -q -m 'not slow and not compile' --ignore=tests/pipeline/predict tests/splash_attn tests/splash_workbench tests/pipeline
	.cache/versions/$*/bin/python -m pytest -q tests/splash_attn/test_kernel.py tests/pipeline/runs/test_request_run.py tests/pipeline/runs/test_resume.py tests/pipeline/runs/test_preview.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[offline]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed $@
