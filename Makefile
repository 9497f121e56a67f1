# The commands of CONTRIBUTING.md. PYTHON picks the interpreter that the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: help env demo demo-tune test chaos check audit format clean

help:
	@echo "make demo    train jobs/demo.yaml on two workers and show what came out"
	@echo "make demo-tune  search jobs/tune/demo.yaml: a dozen runs under a budget, the best with three seeds"
	@echo "make test    run the tests"
	@echo "make chaos   inject hundreds of faults into runs, for half an hour"
	@echo "make check   ruff, mypy, import-linter and audit"
	@echo "make audit   known vulnerabilities of the versions in constraints.txt"
	@echo "make format  let ruff rewrite the code"

env: $(READY)

# torch first and alone: with a CPU build in place nothing pulls a CUDA one, and DeepSpeed's set-up imports it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/tidegate train jobs/demo.yaml
	@echo "see it: $(BIN)/tidegate ui"

demo-tune: $(READY)
	$(BIN)/tidegate tune jobs/tune/demo.yaml
	@echo "see it: $(BIN)/tidegate ui"

test: $(READY)
	$(BIN)/python -m pytest -m "not chaos and not long and not ray" -n logical --maxprocesses 8 --dist worksteal
	$(BIN)/python -m pytest -m "ray and not chaos and not long" --durations=25

chaos: $(READY)
	$(BIN)/python tests/chaos/inject.py 240
	$(BIN)/python -m pytest -m "chaos or long"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

audit: $(READY)
	$(BIN)/python .ci/audit.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
