# `make` sets up and distils 8 Gaussians (a second time it prints the results again: runs/8gaussians-sl);
# `make test` runs everything that must hold.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: toy test lint

toy: .venv/ready
	$(RUN) distill.py

test: lint
	$(RUN) -m pytest

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@
