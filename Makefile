PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moves right

.DEFAULT_GOAL := help
.PHONY: help demo docs pictures report test test-slow bench lint format

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.installed  ## set up, tune without a TPU, generate a video
	$(BIN)/python -m tuning.sweep search.max_trials=5 results_dir=demo/results
	$(BIN)/python -m tuning.choose
	$(BIN)/python -m pipeline.generate prompt="$(PROMPT)" output_dir=demo/videos results_path=demo/results/generate.jsonl
	@echo; echo "Look at:"; ls demo/results/sweeps/*/heatmap.png demo/videos/*/*.mp4

report: $(VENV)/.installed  ## what is on record as one page: results/report/index.html
	$(BIN)/python -m tuning.report

test: $(VENV)/.installed-dev lint  ## set up, then lint, type-check and test
	$(BIN)/python -m pytest -q --durations=10

test-slow: $(VENV)/.installed-dev  ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -q -m slow --durations=10

# Every run is kept in .benchmarks. To compare: make bench; git checkout OTHER; make bench BENCH=--benchmark-compare
# (the last run kept; =0003 names one; --benchmark-compare-fail=median:20% makes a slower one fail).
bench: $(VENV)/.installed-dev  ## benchmarks of what runs here, kept; BENCH=--benchmark-compare: beside the last
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-autosave --benchmark-columns=median,iqr,rounds $(BENCH)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## apply the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev  ## the site of README.md and docs/: build/site/index.html; a broken link fails
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/.installed  ## draw the pictures of README.md and docs/ from the records
	$(BIN)/python docs/pictures/make.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@
