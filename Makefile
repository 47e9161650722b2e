# make demo   sets up, then fits, trains, probes and samples on scikit-learn's digits
# make test   sets up, then runs the tests (make test-slow: those marked slow)
# make coverage  which lines of the library the tests run, and whether they are 90%
# make check  lint, format and types
# make docs   builds the documentation into build/site; warnings are errors
# make dist   builds wheel and sdist into dist/, checks them, and runs the quickstart from the installed wheel
# make test-oldest  runs the tests with the oldest PyTorch of pyproject.toml, in build/oldest
# make bench  measures what the README promises, in about 20 minutes on two quiet cores (make bench-full: in hours);
#             with MNIST=FOLDER EMOJI=ZIP EDM=CHECKOUT MODEL=RUN all of it

PYTHON ?= python3
BIN := .venv/bin
# Its samplers, which ours are tested against, need no more of what k-diffusion depends on.
K_DIFFUSION := k-diffusion torchdiffeq torchsde trampoline
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process 2

.PHONY: setup demo test test-slow coverage check format docs dist test-oldest bench bench-full clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or newer, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(K_DIFFUSION)
	touch $@

demo: setup
	$(LAUNCH) -m train configs/digits.yaml

# A process a core, each with one thread: threads that share a core spend their time waiting for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses logical --dist worksteal

coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses logical --dist worksteal --cov --cov-report=term-missing:skip-covered

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	mkdir -p build # of what the library offers, every type is known: a long list, shown if it is not so
	PATH="$(CURDIR)/$(BIN):$$PATH" basedpyright --verifytypes gaussnet --ignoreexternal > build/types.txt || \
		{ cat build/types.txt; exit 1; }

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/check_dist.py dist

# All else as pinned, but for what PyTorch itself asks for in one version.
OLDEST := torch==2.6.0 torchvision==0.21.0

build/oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/oldest
	sed -E '/^(torch|torchvision|sympy)==/d' constraints.txt > build/oldest/constraints.txt
	build/oldest/bin/python -m pip install --quiet --constraint build/oldest/constraints.txt $(OLDEST) --editable '.[train,dev]'
	build/oldest/bin/python -m pip install --quiet --constraint build/oldest/constraints.txt --no-deps $(K_DIFFUSION)
	touch $@

test-oldest: build/oldest/installed
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -m "not slow" --numprocesses logical --dist worksteal

BENCH := $(BIN)/python benchmarks/bench.py --mnist "$(MNIST)" --emoji "$(EMOJI)" --edm "$(EDM)" --model "$(MODEL)"

bench: setup
	$(BENCH)

bench-full: setup
	$(BENCH) --full
	$(BIN)/python benchmarks/bypass_report.py > /dev/null

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis
