# make run   trains two chains leave-one-domain-out and prints one table
# make test  lint, types and tests; make slow adds the long tests; make bench measures
PYTHON ?= python3
BIN := .venv/bin
.PHONY: run test slow bench clean

run: .venv/run
	$(BIN)/dgavg -m trainer=sma_ema_swa_basic,ma_basic

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest

slow: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

bench: .venv/test
	$(BIN)/python tests/benchmarks/chain_overhead.py
	$(BIN)/python tests/benchmarks/averages.py
	$(BIN)/python tests/benchmarks/subspace.py
	$(BIN)/python tests/benchmarks/links.py
	$(BIN)/python tests/benchmarks/decoding.py
	$(BIN)/python tests/benchmarks/scoring_cost.py
	$(BIN)/python tests/benchmarks/domainbed_way.py

.venv/run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/test: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,peers]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
