# Everything from a fresh clone: `make demo` trains, `make test` tests. Each sets up .venv first, with the versions that
# constraints.txt pins, and again only when that file or pyproject.toml changes.
#
#   make demo DEMO_FLAGS="--data 1 --pipeline 3"      make test PYTHON=/usr/bin/python3.12
#   make test PYTEST_FLAGS="tests/test_floors.py -x"  make demo PIP_FLAGS="--index-url …"   (another build of torch)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:  # a recipe is one script: what it activates lasts to its end
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-gpu campaign check docs clean

PYTHON ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?= --data 2 --pipeline 2

# A demo and a test report nothing to anyone: Ray's usage statistics are off unless you turn them on.
export RAY_USAGE_STATS_ENABLED ?= 0

VENV := .venv
INSTALLED := $(VENV)/installed
DIGITS := data/digits

help:
	@echo "make demo    train a CNN on handwritten digits, data- and pipeline-parallel, on a local Ray cluster"
	@echo "make test    run the tests (test-all: the slow ones too, as CI does; campaign: many random cases; test-gpu: on GPUs)"
	@echo "make check   ruff, strict mypy, the floors of the imports"
	@echo "make docs    build the site of docs/ into build/site"
	@echo "make clean   remove .venv, data/ and every cache"

demo: $(INSTALLED)
	@source $(VENV)/bin/activate
	python jobs/prepare_digits.py --out $(DIGITS)
	python jobs/train_digits.py $(DEMO_FLAGS)

# In two processes on two cores: one has the tests of real Ray, which mostly wait, the other one all others.
test test-all: $(INSTALLED)
	@source $(VENV)/bin/activate
	python -m pytest --numprocesses=auto --maxprocesses=4 -m '$(if $(filter test,$@),not slow and )not campaign' $(PYTEST_FLAGS)

test-gpu: $(INSTALLED)
	@source $(VENV)/bin/activate
	python -m pytest tests/gpu $(PYTEST_FLAGS)

campaign: $(INSTALLED)
	@source $(VENV)/bin/activate
	python -m pytest -m campaign $(PYTEST_FLAGS)

check: $(INSTALLED)
	@source $(VENV)/bin/activate
	set -x
	ruff check
	ruff format --check
	mypy raypar jobs
	python -m pytest -q tests/test_floors.py

docs: $(INSTALLED)
	@source $(VENV)/bin/activate
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# The stamp is written last, so that a set-up that was broken off is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@found= seen=
	for python in $(or $(PYTHON),python3 python3.12 python3.11); do
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
	  case $$version in
	    3.11|3.12) found=$$python; break ;;
	    *) seen="$$seen $$python ($$version)" ;;
	  esac
	done
	if [ -z "$$found" ]; then
	  echo "raypar needs Python 3.11 or 3.12; found:$${seen:- none}. Name one: make PYTHON=/path/to/python3.12 …" >&2
	  exit 1
	fi
	echo "Setting up $(VENV) with $$found ($$version) and the versions in constraints.txt; this takes a minute or more …"
	rm -rf $(VENV)
	$$found -m venv $(VENV)
	source $(VENV)/bin/activate
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	python -m pip install -qq $(PIP_FLAGS) --constraint constraints.txt setuptools
	python -m pip install -qq $(PIP_FLAGS) --constraint constraints.txt --no-build-isolation --editable '.[jobs,dev,docs]'
	touch $@
	echo "$(VENV) is ready: $$(python -c 'import ray, torch; print(f"torch {torch.__version__}, ray {ray.__version__}")')."

clean:
	rm -rf $(VENV) data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

