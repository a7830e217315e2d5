# make train: install, train both stages of the miniature, judge them on people never seen. make test: install, test.
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

data: $(VENV)/.installed ## the miniature's people -> shards with what the frozen networks say of them
	$(RUN) -m mm_lightning.miniature.world unpack
	$(RUN) -m mm_lightning.miniature.world queries --people data/miniature/people
	$(RUN) -m mm_lightning.miniature.cache --num-references 2

train: data ## install, then train the miniature's two stages and judge them on people never seen
	$(RUN) train.py experiment=miniature_stage1 scale=0.06 $(ARGS)
	$(RUN) train.py experiment=miniature_stage2 scale=0.06 $(ARGS)
	$(RUN) -m mm_lightning.miniature.table --adapter outputs/miniature_stage2/latest/adapter --log-dir outputs/miniature_table/tensorboard
	@$(RUN) -m mm_lightning.config outputs

tiny: $(VENV)/.installed ## the same with a tiny random model on real pictures: a minute, noise comes out
	$(RUN) -m mm_lightning.prepare.samples --out data/samples
	$(RUN) -m mm_lightning.tiny data/tiny
	$(RUN) train.py experiment=stage1_image debug=tiny $(ARGS)
	$(RUN) train.py experiment=stage2_video debug=tiny $(ARGS)

test: install ## run the tests below the slow marker, two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: install ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove what was made here, not the environment
	rm -rf data/samples data/tiny data/miniature outputs multirun .pytest_cache .ruff_cache

.PHONY: help install data train tiny test lint clean
