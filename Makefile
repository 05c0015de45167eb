# Two commands do everything on a fresh machine with Python (3.10-3.13), pip and make:
#   make demo   set up, run a real model dense and sparse, draw score against measured sparsity
#   make test   set up, check style, run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
PROCESSES ?= 2

.PHONY: install demo test lint clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml lm_eval_sparse/__init__.py $(wildcard patches/*autoload*) patches/_lm_eval_sparse_hook.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[dev]'
	touch $@

SPARSE_HF := $(BIN)/lm_eval --model sparse-hf --tasks forced_frontier_niah_4k --apply_chat_template --limit 8
demo: install
	rm -rf $(DEMO)
	$(SPARSE_HF) --model_args method=dense,sparsity=0 --output_path $(DEMO)/results/dense
	$(SPARSE_HF) --model_args method=block_sparse,sparsity=0.9,backend=gather --output_path $(DEMO)/results/block_sparse_0.9
	$(BIN)/python examples/sparsity_curve.py --method block_sparse flexprefill --sparsity 0 0.8 0.9 --apply_chat_template --limit 8 --backend gather --answer 1 --output_path $(DEMO)/results
	$(BIN)/lm-eval-sparse plot $(DEMO)/results --output $(DEMO)/curve.png --output $(DEMO)/curve.html
	@echo "Look at $(DEMO)/curve.png or open $(DEMO)/curve.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO) dist build .pytest_cache .ruff_cache
