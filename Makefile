# `make demo` and `make test` are all a new machine needs. Both install first, and only when something changed.
#   PYTHON=python3.12                 another interpreter (3.11 or newer)
#   PIP_ARGS="--extra-index-url ..."  passed to pip, for instance an index with CPU builds of torch
#   VENV=elsewhere                    another place for the virtual environment

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-long test-slow leaderboard redteam gpu-check lint types docs dist sbom clean

help:
	@echo "make demo       install if needed, then erase a concept and write before/after pictures"
	@echo "make test       install if needed, then ruff, mypy and the fast tests"
	@echo "make test-long  the tests from end to end, which CI runs too"
	@echo "make test-slow  the slow tests; their outcome goes to results/slow_tests.json"
	@echo "make leaderboard  every method on the same prompts, into docs/; hours, can be stopped and continued"
	@echo "make redteam    attacks on a small set of erasers, into results/; hours, can be stopped and continued"
	@echo "make gpu-check  the cost of every run-time method on a GPU, with random weights of true size; six minutes"
	@echo "make lint       ruff and mypy only"
	@echo "make types      pyright on the package, a minute; CI runs it too"
	@echo "make docs       the documentation site, into build/site; runs the notebooks, checks links"
	@echo "make dist       wheel and source distribution, into dist/, checked; make sbom: the list of their parts"
	@echo "make clean      remove caches and build output (not $(VENV), not efface-out)"

# Also repairs an environment that was left without pip.
venv:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[emoji,dev]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/efface erase "a night at the pub" --model emoji-128 --concept alcohol --images 32 --seed 1000000 --overwrite --out efface-out/demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations 20

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long and not slow" -n auto --dist worksteal --durations 20

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/slow.py -n auto

leaderboard: $(STAMP)
	$(BIN)/python -m experiments run_time_sweep
	$(BIN)/python -m experiments editors_sweep
	$(BIN)/python -m experiments peers_sweep
	$(BIN)/python -m experiments leaderboard
	$(BIN)/python -m experiments docs

redteam: $(STAMP)
	$(BIN)/python -m experiments attacks
	$(BIN)/python -m experiments gradient_attacks

gpu-check: $(STAMP)
	$(BIN)/python -m experiments.gpu_check

# The tools of these two are not needed by tests. The build itself reads nothing from a network.
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[docs,release]"
	@touch $@

docs: $(DOCS)
	$(BIN)/python -m website notebooks --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m website check build/site
	@echo "To read it with search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

dist: $(DOCS)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	@test -z "$$(find dist -size +95M)" || { echo "A file of dist/ is over 95 MiB." >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel $(abspath $(BIN))/python -c "import efface; \
		assert 'build/wheel' in efface.__file__; efface.load('emoji')('a cat', num_inference_steps=1)"
	@ls -l dist

sbom: $(DOCS)
	@mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json $(BIN)/python

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests recipes -name node_modules -prune -o -name __pycache__ -type d -print | xargs rm -rf
