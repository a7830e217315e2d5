# make train: install, make the sample data and the tiny model, train both stages. make test: install, run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PYTHONWARNINGS=ignore $(BIN)/python
# Arguments for the two training commands, such as ARGS="trainer.max_steps=10".
ARGS ?=

.DEFAULT_GOAL := help

help: ## show this
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(VENV)/.installed ## only install, into .venv, with the pins of constraints.txt

# Where the interpreter already has a torch that sees a GPU, the environment is laid over it and keeps that build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    echo "Using the CUDA build of torch that $(PYTHON) has."; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    $(PYTHON) -m venv $(VENV); cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@

data: $(VENV)/.installed ## real pictures and a real clip from packages -> shards; a tiny random CogVideoX
	$(RUN) -m mm_lightning.prepare.samples --out data/samples
	$(RUN) -m mm_lightning.tiny data/tiny

train: data ## install, then train stage 1 (pictures) and stage 2 (video) with the tiny model
	$(RUN) train.py experiment=stage1_image debug=tiny $(ARGS)
	$(RUN) train.py experiment=stage2_video debug=tiny $(ARGS)
	@$(RUN) -m mm_lightning.config outputs

test: install ## run the tests below the slow marker
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: install ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove what was made here, not the environment
	rm -rf data/samples data/tiny outputs multirun .pytest_cache .ruff_cache

.PHONY: help install data train test lint clean
