# make demo: install and quantize the demo checkpoint; make test, make test-slow: what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The constraints hold for the build environment too.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP_AUDIT := 2.10.1
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl tests/kernels/native/*.cpp)

.PHONY: install dev demo lint test test-slow audit quality clean

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.installed

demo: install
	$(BIN)/python -m hswq.fast demo --output demo

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

test: lint
	$(BIN)/python -m pytest -m "not slow" --require-backends reference,cpp

test-slow: dev
	$(BIN)/python -m pytest -m slow --require-backends reference,cpp

# In an environment of its own: its packages are none of the project's.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit==$(PIP_AUDIT)
	$(PYTHON) .ci/audit.py $(VENV)-audit/bin/pip-audit constraints.txt $(wildcard $(BIN)/python)

quality: dev
	$(BIN)/python -m benchmarks.quality --plot docs/quality.svg

clean:
	rm -rf build dist *.egg-info demo hswq/kernels/_cpp*.so $(VENV) $(VENV)-audit
