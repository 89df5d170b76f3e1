# Everything runs in .venv, made here from requirements.lock. `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := client daemon tests tools bench

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench bench-search bench-real bench-proxy matrix ollama ray nightly man docs errors lock sbom clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## .venv with everything, at the tested versions

$(VENV)/.installed: pyproject.toml requirements.lock tools/install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh tools/install.sh
	@touch $@

demo: install ## the whole story on a model that refuses: recipe, job, answers before and after
	@$(BIN)/abliterated demo $(DEMO)

test: install ## all tests, the end-to-end story included
	@$(BIN)/python -m pytest $(TESTS)

lint: install ## ruff, mypy --strict
	@$(BIN)/ruff check $(PACKAGES)
	@$(BIN)/ruff format --check $(PACKAGES)
	@$(BIN)/mypy

format: install ## format the code
	@$(BIN)/ruff check --fix -q $(PACKAGES) || true
	@$(BIN)/ruff format $(PACKAGES)

bench: install ## figures as ratios, side by side in one run; bench/results.json
	@$(BIN)/python -m bench $(BENCH)
	@$(BIN)/python tools/figures.py

matrix: install ## tools and thinking, each family on each engine found; docs/reference/tool-matrix.md (CHAT_TEMPLATES_DIR=FOLDER for published templates)
	@$(BIN)/python tools/tool_matrix.py $(MATRIX)
	@$(BIN)/python tools/ollama_versions.py

bench-search: install ## the search beside the published Heretic on small models (BENCH="--model moe"); an hour for all of them
	@$(BIN)/python -m bench.search $(BENCH)

bench-real: install ## the same table for a model of yours, on your GPU: MODEL=folder of safetensors
	@$(BIN)/python -m bench.search --real "$(MODEL)" $(BENCH)

bench-proxy: install ## the proxy beside nginx and haproxy, restarts, a soak (BENCH="--soak 30": half an hour)
	@$(BIN)/python -m bench.proxy $(BENCH)

nightly: install ## the queue's proofs at full size (half an hour); bench/reliability.json, docs/reliability.md
	@PYTHONPATH=tests $(BIN)/python -m nightly $(NIGHTLY)

ollama: install ## a real Ollama for the tests, once, outside the clone (needs Go)
	@$(BIN)/python tools/install_ollama.py $(OLLAMA) || test $$? -eq 3

ray: ## a local Ray for the tests of `executor = "ray"`, once, outside the clone (400 MB)
	@$(PYTHON) -m venv "$$HOME/.cache/abliterated/ray"
	@"$$HOME/.cache/abliterated/ray/bin/pip" install -q "ray[default]==2.60.0"

man: install ## the man pages in docs/man and the reference pages that follow from the program
	@$(BIN)/python tools/man_pages.py
	@$(BIN)/python -m abliterate.reference > docs/reference/client.md
	@$(BIN)/python tools/reference.py

docs: install ## the site in site/, strictly: a dead link fails it (mkdocs-material)
	@$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

errors: install ## which of the product's error messages the tests provoke, and which none does (the suite, once)
	@$(BIN)/python tools/provoked.py $(TESTS)

lock: install ## requirements.lock: every file's hash, for all systems, at the versions of constraints.txt
	@printf 'hatchling>=1.27,<2\neditables\nuv\n' | $(BIN)/uv pip compile pyproject.toml - --extra pipeline --extra demo --extra dev \
		-c constraints.txt --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet -o requirements.lock

sbom: install ## what the lock consists of, as CycloneDX: dist/sbom.json
	@$(BIN)/python tools/sbom.py dist/sbom.json

clean: ## remove what was made here
	@rm -rf $(VENV) .demo site dist build .pytest_cache .mypy_cache .ruff_cache
