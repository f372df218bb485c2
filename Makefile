# Every target works on a fresh clone: it sets up .venv from constraints.txt first, when that is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread per process and two processes side by side is the fast way on small models, and keeps results the same.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-faults test-services lint bench real docs dist
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/holdfast demo --output_dir holdfast-demo --seed 0

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every fault that a parallel run must survive, with real processes; `make test` holds one of each kind.
test-faults: $(READY)
	$(BIN)/python -m pytest -v -m "faults or not faults" tests/cli/test_faults.py

# With services that are really there: the report in Chromium, which is the system's own, and transformers' server.
test-services: $(VENV)/.services
	$(BIN)/python -m pytest -v -m services

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The allocator as the demo's processes have it (cli/workers.py says why): page faults are not what is measured.
bench: export MALLOC_MMAP_THRESHOLD_ := 1073741824
bench: export MALLOC_TRIM_THRESHOLD_ := 1073741824
bench: export MALLOC_TOP_PAD_ := 67108864
bench: $(READY)
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/method_cost.py

# A real chat model, installed from its Python package, hardened and attacked; long, and goes on where it was.
real: $(READY)
	$(BIN)/python benchmarks/real.py

# The site of docs/ and the docstrings, into site/; a broken link or anchor fails it.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --clean --quiet
	@echo 'wrote site/; for its search too: python3 -m http.server --directory site'

# Sdist and wheel, into dist/; the wheel is installed into an environment of its own and used there.
dist: $(VENV)/.dist
	$(BIN)/python .ci/check_dist.py

$(VENV)/.docs $(VENV)/.dist $(VENV)/.services: $(VENV)/.%: $(READY)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(READY): constraints.txt pyproject.toml
	@echo "Setting up $(VENV) (a minute or two) ..."
	$(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
