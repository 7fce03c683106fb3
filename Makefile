# Two commands: `make demo` and `make test`. The environment lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Benchmark data is optional: tests that need it skip with a reason where there is none.
export JAXCL_DATA ?= $(wildcard ../shared/data)

.PHONY: demo test slow lint parity clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/jaxcl demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not parity"

slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

$(VENV)/.oracle: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[dev,oracle]"
	touch $@

parity: $(VENV)/.oracle
	$(BIN)/jaxcl fetch smollm2-135m-instruct
	$(BIN)/pytest -m "parity and not slow"

clean:
	rm -rf $(VENV) build dist *.egg-info
