# make demo: everything on scikit-learn's digits, in minutes.  make test: the tests.  PYTHON=python3.12 picks another.
PYTHON ?= python3
RUN = .venv/bin/python
DIGITS = --dataset Digits --epochs 15 --epoch_step '[8,12]' --overwrite

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet "setuptools<81" wheel
	.venv/bin/pip install --quiet --no-build-isolation -r requirements.txt pytest ruff tensorboard
	touch $@

.PHONY: demo test
demo: .venv/installed
	$(RUN) cifar.py --save logs/demo/teacher_16_2 $(DIGITS) --depth 16 --width 2
	$(RUN) cifar.py --save logs/demo/student_16_1 $(DIGITS)
	$(RUN) cifar.py --save logs/demo/at_16_1_16_2 $(DIGITS) --teacher_id demo/teacher_16_2 --beta 1e+3
	$(RUN) cifar.py --save logs/demo/kd_16_1_16_2 $(DIGITS) --teacher_id demo/teacher_16_2 --alpha 0.9
	$(RUN) cifar.py --save logs/demo/at_kd_16_1_16_2 $(DIGITS) --teacher_id demo/teacher_16_2 --alpha 0.9 --beta 1e+3 --beta_decay step
	@$(RUN) tables.py --runs logs/demo/*

test: .venv/installed
	.venv/bin/ruff check .
	$(RUN) -m pytest
