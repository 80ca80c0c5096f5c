# Sets up, shows and checks qdefense. Each target is complete in itself where Python 3.11 or newer is installed.

VENV := .venv
BIN := $(VENV)/bin
# The first of these that is at least 3.11 makes the environment. Name your own: make PYTHON=/path/to/python3 demo
PYTHON := python3.11 python3.12 python3.13 python3.14 python3
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
MYPY := "$(abspath $(BIN))/mypy" --strict --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache"
PYPROJECT := import tomllib; table = tomllib.load(open("pyproject.toml", "rb"))
# Folders are among them: a deleted module changes only its folder.
SOURCES := $(shell find qdefense converters models -name __pycache__ -prune -o -print)

.DELETE_ON_ERROR:
.PHONY: install demo test test-real lint clean

install: $(VENV)/package.stamp

demo: install
	$(BIN)/qdefense demo

# Not `python -m pytest`, which would put this folder on the path: the tests are for the installed package.
# Two processes, and whole files to each: their fixtures train small networks.
test: install $(VENV)/dev.stamp
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-real: install $(VENV)/dev.stamp
	$(BIN)/pytest -m real --numprocesses 2 --dist worksteal

# The same arithmetic on every machine: the order of a float sum depends on the number of threads.
test test-real: export OMP_NUM_THREADS ?= 1
test test-real: export OMP_WAIT_POLICY ?= passive

# mypy and lint-imports look at their working folder first, where qdefense/ lacks converters/ and models/; the scripts of
# benchmarks/ import their neighbours.
lint: install $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd $(VENV) && bin/mypy --strict --config-file $(CURDIR)/pyproject.toml --package qdefense
	for folder in $(or $(sort $(dir $(shell find benchmarks -name '*.py'))),nowhere); do (cd $$folder && $(MYPY) *.py) || exit; done
	cd $(VENV) && bin/lint-imports --config $(CURDIR)/pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info

# pip comes last into a new environment: where it is, the environment is whole.
$(BIN)/pip:
	@for python in $(PYTHON); do \
		if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			$$python -m venv --clear $(VENV); \
			exit; \
		fi; \
	done; \
	echo "No Python 3.11 or newer with its venv module among: $(PYTHON)." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -c '$(PYPROJECT); print(*table["build-system"]["requires"], *table["project"]["dependencies"], sep="\n")' > $(VENV)/runtime.txt
	$(PIP_INSTALL) --requirement $(VENV)/runtime.txt
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(BIN)/python -c '$(PYPROJECT); print(*table["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/dev.txt
	$(PIP_INSTALL) --requirement $(VENV)/dev.txt
	touch $@

# setuptools puts what it finds in an old build/ into the new wheel, deleted modules too.
$(VENV)/package.stamp: $(VENV)/runtime.stamp $(SOURCES)
	rm -rf build *.egg-info
	$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build *.egg-info
	touch $@
