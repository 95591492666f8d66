# make demo: trains on cluttered digits, in minutes.  make test: the tests.  make test-slow: the slow tests.
# PYTHON=python3.12 uses another Python.
PYTHON ?= python3
RUN = .venv/bin/python
TEST = $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal
# bfloat16 only if the CPU has instructions for it; otherwise it is slow.
DTYPE = $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bfloat16 || echo float)

.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "setuptools<81" wheel
	.venv/bin/pip install --quiet --no-build-isolation -r requirements.txt pytest pytest-xdist ruff tensorboard
	touch $@

.PHONY: demo test test-slow
demo: .venv/installed
	$(RUN) tables.py demo --folder logs/my_demo --jobs 2 --dtype $(DTYPE)
	$(RUN) visualize.py logs/my_demo/WRN-16-2_seed0 logs/my_demo/WRN-16-1_AT_WRN-16-2_seed0 \
	       logs/my_demo/WRN-16-1_seed0 --dataset ClutteredDigits --output logs/my_demo/attention.png

test: .venv/installed
	.venv/bin/ruff check .
	$(TEST) -m "not slow"

test-slow: .venv/installed
	$(TEST) -m slow
