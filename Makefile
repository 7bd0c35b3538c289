# `make train` and `make test` do everything that they need on a fresh machine.
PYTHON ?= python3

.PHONY: train test clean

train: .venv/installed
	.venv/bin/python cli.py train

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --numprocesses auto --dist loadgroup

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

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
