# Two commands do everything on a fresh machine with Python (3.10-3.13), pip and make:
#   make demo   set up, run the main job on a real model, draw score against measured sparsity
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

demo: install
	rm -rf $(DEMO)
	$(BIN)/lm_eval --model sparse-hf --model_args method=flexprefill,sparsity=0.9 --tasks frontier_niah_4k,forced_frontier_niah_4k --limit 5 --output_path $(DEMO)/main
	$(BIN)/python examples/sparsity_curve.py --method vertical_slash snapkv quest --sparsity 0 0.5 0.9 --limit 2 --backend gather --output_path $(DEMO)/sweep
	$(BIN)/lm-eval-sparse plot $(DEMO)/sweep --output $(DEMO)/curve.png --output $(DEMO)/curve.html
	@echo "Look at $(DEMO)/curve.png or open $(DEMO)/curve.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO) dist build .pytest_cache .ruff_cache
