# `make demo` and `make test` need Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
# An index to take torch from, for example https://download.pytorch.org/whl/cpu for the small CPU build.
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Processes that share the tests; each computes with one thread.
TEST_JOBS ?= 2
BENCH_ARGS ?=
BENCH_SHAPES ?= gpt2-small gpt2-medium gpt2-large
BENCH_LLAMA_LAYERS ?= 8 32
FUZZ_RUNS ?= 10000
FUZZ_DIR ?= .fuzz
MUTANTS ?= 150
SEED ?= 0
MUTATION_PROCESSES ?= 2
MUTATION_REPORT ?= mutation-report.json
OLDEST_VENV ?= .venv-oldest
OLDEST_TESTS ?= tests/linalg tests/weights tests/test_common.py tests/test_kernels.py tests/test_persistence.py
DEMO_DIR ?= demo-report

# Tests of pages read contrast and names of controls with it.
AXE := axe-core@4.14.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types contracts docs bench bench-page fuzz mutation test-oldest ci-browser clean distclean

help:
	@echo "make demo        install, analyse the bundled model, write $(DEMO_DIR)/report.html"
	@echo "make test        run the tests and the examples in all docstrings"
	@echo "make lint        style of code and docstrings (make format mends what it can)"
	@echo "make types       static types"
	@echo "make contracts   which module may import which"
	@echo "make docs        build the documentation into docs/_build/html and check its links"
	@echo "make bench       side-by-side benchmark against TransformerLens and loops over pairs"
	@echo "make bench-page  measure everything (hours) and write docs/benchmarks.rst"
	@echo "make fuzz        feed readers of files with FUZZ_RUNS inputs each, guided by coverage"
	@echo "make mutation    change MUTANTS places of skhead.linalg and skhead.stats, one at a time: do tests notice?"
	@echo "make test-oldest some of the tests with the oldest requirements that pyproject.toml allows"
	@echo "make ci-browser  install chromium and axe-core where they are missing and can be had"
	@echo "make clean       remove what was built; make distclean also removes $(VENV)"
	@echo "Variables: PYTHON=python3.12  TORCH_INDEX=https://download.pytorch.org/whl/cpu  PYTEST_ARGS='-k graph'  TEST_JOBS=4"
	@echo "SKHEAD_MODELS=DIR  real trained weights for tests and benchmarks"

# Environments. Each stamp holds one set of extras; a later set contains the earlier ones.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("skhead needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another one, for example make PYTHON=python3.12 demo" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.lens: $(REQUIREMENTS) $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[lens]'
	@touch $@

$(VENV)/.test: $(REQUIREMENTS) $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[lens,test]'
	@touch $@ $(VENV)/.lens

$(VENV)/.dev: $(REQUIREMENTS) $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.lens

demo: $(VENV)/.lens
	$(BIN)/skhead demo -o $(DEMO_DIR)
	@echo "Open in a browser: file://$(abspath $(DEMO_DIR))/report.html"

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile \
	    --doctest-modules skhead tests $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	rm -rf docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	$(BIN)/python scripts/check_links.py docs/_build/html
	$(BIN)/python scripts/check_gallery.py docs/_build/html
	@echo "Open in a browser: file://$(abspath docs/_build/html)/index.html"

bench: $(VENV)/.lens
	$(BIN)/python benchmarks/peer.py $(BENCH_ARGS)

bench-page: $(VENV)/.lens
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/hot_paths.py --json benchmarks/results/hot-paths.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	set -e; for shape in $(BENCH_SHAPES); do \
	    $(BIN)/python benchmarks/peer.py --shape $$shape $(BENCH_ARGS) \
	        --json benchmarks/results/peer-$$shape.json; \
	done
	set -e; for task in pk cs; do \
	    $(BIN)/python benchmarks/peer.py --shape gpt2-xl --tasks $$task $(BENCH_ARGS) \
	        --json benchmarks/results/peer-gpt2-xl-$$task.json; \
	done
	set -e; for layers in $(BENCH_LLAMA_LAYERS); do \
	    $(BIN)/python benchmarks/peer.py --shape llama-3-8b --layers $$layers $(BENCH_ARGS) \
	        --json benchmarks/results/peer-llama-3-8b-$$layers.json; \
	done
	$(BIN)/python benchmarks/make_page.py

$(OLDEST_VENV)/.test: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints-oldest.txt $(TORCH)
	$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oldest.txt -e '.[test]'
	@touch $@

test-oldest: $(OLDEST_VENV)/.test
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS) $(PYTEST_ARGS)

# atheris is no requirement of anything else, and has wheels for some versions of Python only.
$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) install --quiet 'atheris>=3.0'
	@touch $@

fuzz: $(VENV)/.fuzz
	for target in headers indices configs tokenizers bases estimators; do \
	    $(BIN)/python scripts/fuzz.py $$target $(FUZZ_RUNS) $(FUZZ_DIR) || exit 1; \
	done

# cosmic-ray is no requirement of anything else either.
$(VENV)/.mutation: $(VENV)/.test
	$(PIP) install --quiet 'cosmic-ray>=8.7'
	@touch $@

mutation: $(VENV)/.mutation
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutation_check.py --mutants $(MUTANTS) --seed $(SEED) \
	    --processes $(MUTATION_PROCESSES) --json $(MUTATION_REPORT)

ci-browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then \
	    echo "a browser is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
	else \
	    echo "no browser found, and no right to install one: tests marked 'browser' will be skipped"; \
	fi
	@if test -f $(VENV)/node_modules/axe-core/axe.min.js; then \
	    echo "axe-core is installed"; \
	elif command -v npm >/dev/null; then \
	    npm install --prefix $(VENV) --no-save --no-package-lock --ignore-scripts --no-audit --no-fund $(AXE) \
	        || echo "npm could not fetch $(AXE): tests of contrast will be skipped"; \
	else \
	    echo "no npm: tests of contrast by axe-core will be skipped"; \
	fi

clean:
	rm -rf build dist $(DEMO_DIR) $(MUTATION_REPORT) docs/_build docs/api/generated docs/gallery docs/sg_execution_times.rst
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find skhead tests examples benchmarks scripts docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(OLDEST_VENV) $(FUZZ_DIR)
