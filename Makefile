# On a machine with Python and pip, `make demo` and `make test` need nothing else.

export UV_PYTHON_DOWNLOADS ?= never
UV_HOME := .uv
UV := $(shell command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1 && echo uv || echo $(UV_HOME)/bin/uv)
RUN := $(UV) run --quiet
AOT := UV_PROJECT_ENVIRONMENT=.venv-aot JAX_PLATFORMS=cpu $(UV) run --quiet --group aot
# Most programs of a test run once: compiled without LLVM's optimisations, and kept for the next time.
TEST := JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 \
  JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  $(RUN) pytest -n 2 --dist worksteal
DATA ?=

.PHONY: demo test slow lint aot bench gpu clean

demo: .setup  ## data -> train -> publish -> filtered queries -> runs/quickstart*/report.html
	$(RUN) python -m experiments.quickstart $(if $(DATA),--data $(DATA))

test: .setup  ## what needs neither a GPU nor patience
	$(TEST) -m "not slow and not aot and not gpu"

slow: .setup  ## simulated kernels, whole experiments, large sizes
	$(TEST) -m "slow and not aot and not gpu"

lint: .setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

aot: $(UV_HOME)/ready  ## compile every kernel for an H200, without one; prints a table of them
	$(AOT) pytest -n 2 --dist worksteal --timeout 900 -m aot tests/aot tests/pallas_kernels

bench: .setup
	$(RUN) python -m experiments.bench_bloom
	$(RUN) python -m experiments.bench_filter
	$(RUN) --extra bench python -m experiments.bench_retrieval

gpu:  ## with a GPU and the machine's own Python packages: tests, then benchmarks
	python3 -m pytest tests/pallas_kernels -m gpu -o addopts="-ra" -p no:cacheprovider
	python3 -m experiments.bench_bloom && python3 -m experiments.bench_ivf
	python3 -m experiments.bench_codesign
	python3 -m experiments.bench_moe && python3 -m experiments.bench_attention
	python3 -m experiments.bench_training --record && python3 -m experiments.sm_tax

.setup: $(UV_HOME)/ready
	@$(UV) sync --quiet

# uv from the PATH if it works, else from a small environment of its own.
$(UV_HOME)/ready:
	@mkdir -p $(UV_HOME)
	@if [ "$(UV)" != uv ]; then \
	  python3 -m venv $(UV_HOME) && $(UV_HOME)/bin/python -m pip install --quiet --disable-pip-version-check uv; fi
	@touch $@

clean:
	rm -rf .uv .venv .venv-aot runs .cache .pytest_cache .ruff_cache .hypothesis
