# `make` sets up and distils 8 Gaussians (a second time it prints the results again: runs/8gaussians-sl);
# `make test` runs everything that must hold;
# `make page` builds the reading page, docs/index.html.
PYTHON ?= python3
# Where the reading page finds the project's files, for its links.
FILES ?= ..
RUN := .venv/bin/python

.PHONY: toy test lint page

toy: .venv/ready
	$(RUN) distill.py --resume_from_checkpoint latest

test: lint
	$(RUN) -m pytest

page: .venv/ready
	$(RUN) -m pip install --quiet pypandoc_binary
	$(RUN) -m docs.page --files $(FILES)

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@
