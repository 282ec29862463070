# Two commands are all a newcomer needs: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Accelerate's defaults, spelled out so that it need not warn about them.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
READY := .venv/.ready

.PHONY: quickstart fourm test test-slow test-faults lint bench clean

quickstart: $(READY)  ## set up, train the quick-start recipe, show what it learned
	$(LAUNCH) -m m3.train recipes/quickstart.yaml

TOKENS := runs/fourm_tokens
CODED := $(TOKENS)/.image_fsq $(TOKENS)/.depth_vq $(TOKENS)/.semantic_vq

fourm: runs/fourm_tiny/model/config.json  ## 4M in small: tokenizers, shards of codes, training; skips what is there

runs/fourm_tiny/model/config.json: $(CODED)
	$(LAUNCH) -m m3.train recipes/fourm_tiny.yaml data.root=$(TOKENS)

$(TOKENS)/.%: runs/tokenizer_%/model/config.json
	$(BIN)/m3 tokenize runs/tokenizer_$*/model fourm_tiny $(TOKENS) data.source=world data.samples=8192 $(COPIED)
	touch $@

$(TOKENS)/.image_fsq: COPIED := --copy rgb --copy caption --copy boxes

.PRECIOUS: runs/tokenizer_%/model/config.json
runs/tokenizer_%/model/config.json: | $(READY)
	$(LAUNCH) -m m3.train recipes/tokenizer_$*.yaml

test: $(READY)  ## everything that must pass, in a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(READY)  ## the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

test-faults: $(READY)  ## kill, starve and damage runs, let them go on, and count what is lost
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/memory.py

lint: $(READY)  ## format, rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(READY)  ## MAE's speed beside transformers' (BENCHMARKS.md has more)
	$(BIN)/m3 bench mae_vit_s --against transformers train.precision=fp32
	$(BIN)/m3 bench mae_vit_s --against transformers train.precision=bf16
	$(BIN)/m3 bench mae_vit_s --against transformers train.precision=fp32 train.compile=true --rounds 1
	$(BIN)/m3 bench mae_vit_s --against transformers train.precision=bf16 train.compile=true --rounds 1

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $(READY)

clean:  ## remove the environment and all runs
	rm -rf .venv runs build dist *.egg-info
