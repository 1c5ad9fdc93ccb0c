# The two main targets: `make quickstart` runs the complete pipeline, `make test` runs the tests of CI.
# Needs Python 3.11 or newer with venv and pip; `make docs` needs npm as well.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# The only script of the documentation site that no Python package contains.
MERMAID_VERSION := 11.17.2
MERMAID := build/mermaid/mermaid-$(MERMAID_VERSION).js
# make test PYTEST_ARGS="tests/store -x" runs part of the suite
PYTEST_ARGS ?=
# Two processes: one runs all tests on the shared Ray cluster (tests/conftest.py), the other one the rest.
WORKERS ?= -n 2 --dist loadgroup

.PHONY: help
help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.venv: $(STAMP)  ## create the virtual environment and install everything

# Bytecode is compiled on all cores, where pip would use one; rarely imported modules are compiled at their first import.
RARE := /tests?/|/transformers/models/|/moto/|/(pip|setuptools|mypy|mypyc|rllib)/|/pygments/lexers/|/torch/testing/|/sympy/physics/
# pip resolves the build of torch: for CPUs, or for CUDA if the package index offers that.
$(STAMP): pyproject.toml
	@echo "installing into .venv (once; a few minutes)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-compile -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 -x '$(RARE)' .venv/lib || true
	@touch $@

.PHONY: quickstart
quickstart: $(STAMP)  ## run data, training, ONNX, registry and HTTP on this machine; KEEP=1 keeps it serving
	@$(BIN)/maas-ray quickstart $(if $(KEEP),--keep)

.PHONY: lint
lint: $(STAMP)  ## check formatting, lint, types and the direction of imports
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary maas_ray
	@found=$$($(BIN)/lint-imports --no-logo --no-cache 2>&1) || { echo "$$found" >&2; exit 1; }

.PHONY: test
test: lint  ## run lint, then all tests of CI
	@$(call pytest,-m 'not fault and not machines and not soak and not bench')

.PHONY: test-fault
test-fault: $(STAMP)  ## run the long fault-injection suites
	@$(call pytest,-m 'fault and not machines')

.PHONY: test-cluster
test-cluster: $(STAMP)  ## test clusters of up to four hosts in network namespaces: needs root and iproute2, about an hour
	@$(call pytest,-m 'machines and not fault' -n 0)

.PHONY: test-cluster-fault
test-cluster-fault: $(STAMP)  ## measure the losses of three hosts under load, NEMESIS_TIMES (20) times each: hours
	@$(call pytest,-m 'machines and fault' -n 0)

.PHONY: docs
docs: docs-pages $(MERMAID) .venv/.docs-installed  ## build the documentation site in build/site; needs npm for the diagrams
	@$(BIN)/zensical build --clean --strict
	@cp $(MERMAID) build/site/assets/javascripts/mermaid.tiny.js
	@! grep -rE '<(script|link)[^>]+(src|href)="https?:' build/site --include=*.html  # no page may need the network

.PHONY: docs-pages
docs-pages: $(STAMP)  ## write the pages of docs/ that are generated from the code
	@$(BIN)/python docs/generate.py

.venv/.docs-installed: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -e '.[docs]'
	@touch $@

$(MERMAID):
	@mkdir -p $(@D)
	@npm pack --silent --pack-destination $(@D) @mermaid-js/tiny@$(MERMAID_VERSION) > /dev/null
	@tar -xzOf $(@D)/mermaid-js-tiny-$(MERMAID_VERSION).tgz package/dist/mermaid.tiny.js > $@.part
	@mv $@.part $@

.PHONY: bench-serving
bench-serving: $(STAMP)  ## measure serving against Triton and others; BENCH_ARGS="--quick --workloads tiny --peers triton"
	@$(BIN)/python -m benchmarks.serving $(BENCH_ARGS)

.PHONY: bench-training
bench-training: $(STAMP)  ## measure training against plain PyTorch; BENCH_ARGS="--sections text --text input.txt"
	@$(BIN)/python -m benchmarks.training $(BENCH_ARGS)

# All temporary files are in one directory. It is removed however the tests end, after the clusters that killed tests
# may have left running. Its name is short: it contains Ray's Unix sockets, whose paths have at most 107 bytes.
define pytest
	temp=$$(mktemp -d /tmp/mt-XXXXXX); \
	finish() { \
		for record in "$$temp"/*/cluster.json; do \
			test ! -e "$$record" || $(BIN)/maas-ray down --drain-timeout-s 0 --state-dir "$${record%/*}" >&2; \
		done; \
		rm -rf "$$temp"; \
	}; \
	trap finish EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	TMPDIR="$$temp" $(BIN)/python -B -m pytest -q -p no:cacheprovider --basetemp="$$temp/pytest" $(WORKERS) $(1) $(PYTEST_ARGS)
endef

.PHONY: clean
clean:  ## remove the environment and all caches, but no data
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
