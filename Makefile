# Every target does its own set-up: Python 3.11 or later, pip and make are all that is needed.
PYTHON ?= python3
PAPER ?= gpt3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

# Where there is no NVIDIA driver the CPU build of torch is a tenth of the size. An index that does not answer is passed over.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo --extra-index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 15)

.PHONY: run test check format results clean
.DEFAULT_GOAL := run

run: $(VENV)/.run  ## test a paper's claim here: make run PAPER=alibi
	$(BIN)/allyouneed run $(PAPER)

test: $(VENV)/.test  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile  # a file's tests share what they load

check: $(VENV)/.check  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the library into $(VENV) (once) ..."
	$(PIP) $(TORCH_INDEX) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[translate]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.check: $(VENV)/.run
	$(PIP) -e '.[test,check]'
	@touch $@
