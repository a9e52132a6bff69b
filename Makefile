PYTHON ?= python3
EXTRAS ?= tensorboard
JOBS ?= 2
PY := .venv/bin/python
STAMP = .venv/ready-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$(EXTRAS)
export NO_ALBUMENTATIONS_UPDATE := 1
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## a virtual environment in .venv with pinned wheels; seconds when it is there already
	@test -f "$(STAMP)" -a "$(STAMP)" -nt setup.cfg -a "$(STAMP)" -nt constraints.txt || $(MAKE) --no-print-directory install

.PHONY: install
install:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "densepred needs Python 3.10, 3.11 or 3.12; $(PYTHON) is %d.%d: name another one, e.g. make setup PYTHON=python3.11" % v)'
	@test "$$($(PY) --version 2>&1)" = "$$($(PYTHON) --version 2>&1)" || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch "$(STAMP)"

demo: setup  ## write the Shapes set, train kMaX-DeepLab on it, evaluate, draw
	$(PY) datasets/prepare_shapes.py datasets/shapes
	$(PY) tools/train.py configs/kmax_r18_shapes.py --work-dir work_dirs/demo

test:  ## the whole suite, in JOBS processes of one thread each
	@$(MAKE) --no-print-directory setup EXTRAS=test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile

clean:  ## remove the environment and the run outputs
	rm -rf .venv work_dirs datasets/shapes
