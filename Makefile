# `make train` and `make test` do everything that they need on a fresh machine.
PYTHON ?= python3

# The tests of files that are numbers and no more, which another machine rounds differently.
NUMBERS = $(patsubst %,tests/test_%.py,analytic_kl antithetic bias comparison distributions estimators evaluation \
	evidence intervals likelihoods plates posterior_gap run_once scales_and_masks testbed variance weights)
PYTEST = .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: train test test-slow test-rounding docs clean

train: .venv/installed
	.venv/bin/python cli.py train

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTEST) -m "not slow"

# What takes a third of the time of all tests: processes that train together, compilers, whole tables.
test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# As machines with other instructions and other numbers of threads would round.
test-rounding: .venv/installed-dev
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(NUMBERS)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 DNNL_MAX_CPU_ISA=AVX2 PYROVAE_THREADS=2 $(PYTEST) $(NUMBERS)

# The site, in site/index.html. PYROVAE_EXECUTE_NOTEBOOKS=true runs the notebooks for their figures, which takes minutes.
docs: .venv/installed-docs
	.venv/bin/mkdocs build --strict

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "pyrovae needs Python 3.10 or newer: make PYTHON=/path/to/python ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install --quiet --editable ".[dev]"
	touch .venv/installed $@

.venv/installed-docs: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install --quiet --editable ".[docs]"
	touch .venv/installed $@

clean:
	rm -rf .venv build site .cache *.egg-info .pytest_cache .ruff_cache .hypothesis
