PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
export OMP_NUM_THREADS ?= 1
# A test file stays with one process; tests with real processes have the machine to themselves.
PARALLEL := -n auto --dist loadfile

.PHONY: help env demo test quick clients quick-products lint format types layering proto check-proto configuration drawings docs-check docs verify check house mutants bench gpu-dry chaos hostile pictures clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

env: $(STAMP) ## Create .venv with everything in it

demo: $(STAMP) ## Start the service on the shipped model, stream one completion, stop
	$(BIN)/python -m benchmarks.demo

test: $(STAMP) ## All tests that need no GPU, those with real processes included
	$(BIN)/pytest -q $(PARALLEL) -m 'not gpu and not slow and not cluster and not clients'
	$(BIN)/pytest -q -m 'cluster and not gpu and not slow and not clients'

# Other people's clients have an environment of their own, as they do with those people.
$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q --disable-pip-version-check \
		-c tests/clients/constraints.txt -r tests/clients/requirements.txt
	@! command -v npm >/dev/null || cp tests/clients/package.json $(CLIENTS)
	@! command -v npm >/dev/null || (cd $(CLIENTS) && npm install --silent --no-audit --no-fund)
	@touch $@

clients: $(STAMP) $(CLIENTS)/.installed ## Other people's clients, a browser and lm-eval against the service
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[clients,eval]'
	$(BIN)/pytest -q -m clients
	$(BIN)/pytest -q -m 'not gpu and not slow' tests/evaluation tests/benchmarks/test_evaluate_shipped.py

quick: $(STAMP) ## Tests without real processes
	$(BIN)/pytest -q $(PARALLEL)

quick-products: $(STAMP) ## The same as on processors without bf16 products, and without oneDNN
	$(BIN)/pytest -q $(PARALLEL) --products=onednn_fp32
	$(BIN)/pytest -q $(PARALLEL) --products=plain

lint: $(STAMP) ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Rewrite files in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Strict types
	$(BIN)/mypy

layering: $(STAMP) ## Who may import whom
	$(BIN)/pytest -q tests/test_layering.py

proto: $(STAMP) ## Regenerate the code of protos/
	$(BIN)/python protos/generate.py

check-proto: $(STAMP) ## Fail if generated code is not what protos/ gives
	$(BIN)/python protos/generate.py --check

configuration: $(STAMP) ## Rewrite docs/configuration.md from the settings
	$(BIN)/python -m tools.configuration

drawings: $(STAMP) ## Redraw the pictures of docs/
	$(BIN)/python -m tools.drawing

docs-check: $(STAMP) ## Fail if pages or pictures are not what the source gives
	$(BIN)/python -m tools.configuration --check
	$(BIN)/python -m tools.drawing --check
	$(BIN)/python -m tools.house --check

docs: $(STAMP) ## The documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

verify: $(STAMP) ## Replay the recorded cases
	$(BIN)/twotower verify tests/golden/tiny_a
	$(BIN)/twotower verify tests/golden/tiny_b

check: lint types layering check-proto docs-check verify ## What CI runs besides test and demo

house: $(STAMP) ## Figures of the source, as the table of docs/architecture.md
	@$(BIN)/python -m tools.house

mutants: $(STAMP) ## Seed faults into a copy of the source: the tests must catch each
	$(BIN)/python -m tools.mutants

bench: $(STAMP) ## Speed and memory on this machine
	$(BIN)/twotower bench --preset tiny --out runs/bench.json
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.decode --model shipped --tokens 96
	$(BIN)/python -m benchmarks.state_memory
	$(BIN)/python -m benchmarks.scheduling
	$(BIN)/python -m benchmarks.long_prompt
	$(BIN)/python -m benchmarks.channel
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.concurrency
	$(BIN)/python -m benchmarks.overload
	$(BIN)/python -m benchmarks.big_prompts
	$(BIN)/python -m benchmarks.verified
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.quantization --prompts 200
	$(BIN)/python -m benchmarks.batch.throughput
	$(BIN)/python -m benchmarks.batch.pairs
	$(BIN)/python -m benchmarks.batch.bad_rows

gpu-dry: $(STAMP) ## Every stage of the GPU program, at tiny shapes on this CPU
	$(BIN)/python -m benchmarks.gpu_stages runs/gpu-dry/h200 --dry --plan h200
	$(BIN)/python -m benchmarks.gpu_stages runs/gpu-dry/h100 --dry --plan h100 --only speed-1-fp8 profile default-service
	$(BIN)/python -m benchmarks.gpu_stages runs/gpu-dry/two --dry --plan two --only nccl-channel

chaos: $(STAMP) ## Kill, hang, cut and slow everything under 30 streams
	$(BIN)/python -m benchmarks.chaos

hostile: $(STAMP) ## 10,000 hostile requests over both fronts, beside a client with manners
	$(BIN)/python -m benchmarks.hostile

pictures: $(STAMP) ## Redraw the README's pictures of the page; needs chromium and the extra `clients`
	$(BIN)/python -m tools.pictures

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
