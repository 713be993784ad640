PYTHON ?= python3
SEED ?= 42
JOBS ?= 2
LONG_JOBS ?= 3
BIN := .venv/bin
INSTALLED := .venv/.installed

# A container may forbid .pyc files; then each of the hundreds of processes that the tests start
# would compile our modules again.
test test-long: export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-long lint clean

demo: $(INSTALLED)  ## encode → distil → sample on the bundled toy, from empty outputs
	$(BIN)/python scripts/demo.py --output demo --seed $(SEED)

test: $(INSTALLED)  ## all tests but the long ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not long"

# One more than cores: much of their time is waiting for time-outs and for processes that end.
test-long: $(INSTALLED)  ## the long tests; some open pages in Chromium: apt-get install chromium
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(LONG_JOBS) --dist loadfile -m long

lint: $(INSTALLED)  ## ruff, mypy and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# torch first and exactly as pinned: an open range would pull gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## remove the environment and everything that was made
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
