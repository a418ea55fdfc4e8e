# Set-up, demo and tests. `make demo` and `make test` build .venv themselves; TORCH= picks another torch build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test lint docs bench coverage setup gpu clean

setup: $(READY)

$(READY): pyproject.toml setup.py Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

demo: $(READY)
	$(PY) -m spade_fast.quickstart

# On a machine with a GPU: tests, compute-sanitizer, every benchmark, one JSON.
gpu: $(READY)
	$(PY) -m benchmarks.gpu --out runs/gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal --durations 15

# Lines and branches that the tests reach; fails below the floor of pyproject.toml.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term:skip-covered

docs: $(READY)
	$(PY) -m mkdocs build --strict

bench: $(READY)
	$(PY) -m pytest benchmarks --benchmark-only

clean:
	rm -rf .venv build dist site *.egg-info
