# make demo: everything on scikit-learn's digits, in minutes.  make test: the tests.  PYTHON=python3.12 picks another.
PYTHON ?= python3
RUN = .venv/bin/python
DIGITS = --dataset Digits --epochs 15 --epoch_step '[8,12]'

.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "setuptools<81" wheel
	.venv/bin/pip install --quiet --no-build-isolation -r requirements.txt pytest ruff tensorboard
	touch $@

.PHONY: demo test test-slow
demo: .venv/installed
	$(RUN) tables.py 1 --row WRN-16-1:WRN-16-2 --seeds 1 --folder logs/demo $(DIGITS)

test: .venv/installed
	.venv/bin/ruff check .
	$(RUN) -m pytest -m "not slow"

test-slow: .venv/installed
	$(RUN) -m pytest -m slow
