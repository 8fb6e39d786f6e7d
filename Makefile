# What a developer runs. `make` alone lists it; every step is skipped when it has nothing to do.

PYTHON      ?= python3
CMAKE_FLAGS ?=
# about 1.5 GB for each compiler, or a small board swaps
JOBS        ?= $(shell awk -v n="$$(nproc)" '/MemAvailable/ { m = int($$2 / 1500000); print m < 1 ? 1 : m < n ? m : n }' /proc/meminfo)

PY          := .venv/bin/python
PIP         := $(PY) -m pip --disable-pip-version-check -q
PIP_INSTALL := $(PIP) install -c constraints.txt
GENERATOR   := $(if $(shell command -v ninja),-G Ninja)
CONFIGURE   := cmake -S . $(GENERATOR) --log-level=WARNING
COMPILE     := cmake --build

.DEFAULT_GOAL := help
.PHONY: help build demo test sanitize wheel stock bench bench-quick synth lint clean system-packages vendor native
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: native .venv/.spac-installed ## everything that `.venv/bin/spac` needs, with upstream compiled for this machine

demo: build ## a first run: the demo model, in less memory than it needs
	$(PY) scripts/demo.py

test: build ## native unit tests, pytest, and the unit tests again on an emulated ARM CPU; all run, and any failing fails
	@status=0; \
	ctest --test-dir build/native --output-on-failure --no-tests=error || status=1; \
	$(PY) -m pytest || status=1; \
	JOBS=$(JOBS) scripts/cross unit-tests || status=1; \
	exit $$status

sanitize: vendor ## native unit tests under ASan + UBSan, then under TSan
	@status=0; \
	$(MAKE) --no-print-directory sanitize-run DIRECTORY=build/asan SANITIZE=address,undefined || status=1; \
	$(MAKE) --no-print-directory sanitize-run DIRECTORY=build/tsan SANITIZE=thread || status=1; \
	exit $$status

# OpenMP's runtime is not instrumented and TSan would report it, so ggml uses its own threads here. TSan's runtime cannot
# start where address space randomisation is wider than it expects: without randomisation it can.
.PHONY: sanitize-run
sanitize-run:
	$(CONFIGURE) -B $(DIRECTORY) -DSPAC_SANITIZE=$(SANITIZE) -DGGML_OPENMP=OFF -DSPAC_TESTS=ON $(CMAKE_FLAGS)
	$(COMPILE) $(DIRECTORY) -j $(JOBS) --target spac-tests
	@fixed=""; if setarch -R true 2>/dev/null; then fixed="setarch -R"; fi; \
	$$fixed ctest --test-dir $(DIRECTORY) --output-on-failure --no-tests=error

wheel: vendor build/wheels/llama-cpp-python.stamp ## dist/: wheels that install elsewhere without a compiler
	rm -rf dist build/wheel
	mkdir -p dist
	cp build/wheels/*.whl dist/
	CMAKE_ARGS="$(CMAKE_FLAGS)" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) wheel --no-deps --no-build-isolation -w dist .
	@ls -l dist

stock: vendor ## build/stock/lib: upstream without patches, same flags: what benchmarks compare with
	@$(PY) scripts/vendor pristine build/stock/src
	$(CONFIGURE) -B build/stock/native -DSPAC_STOCK=ON -DSPAC_VENDOR_DIR=$(CURDIR)/build/stock/src -DSPAC_LIB_DESTINATION=lib $(CMAKE_FLAGS)
	$(COMPILE) build/stock/native -j $(JOBS)
	@cmake --install build/stock/native --component spac --prefix build/stock >/dev/null

# Built peers to measure beside: make bench PEERS="bigmoe=/path/to/bmoe-cli ik_llama=/path/to/llama-cli"
PEERS       ?=
BENCH_OUT   ?= build/bench
REPEATS     ?= 3
BENCH       := $(PY) -m spac bench
BENCH_FLAGS = --out $(BENCH_OUT) $(addprefix --peer ,$(PEERS))
LEARNED     := learned=build/demo/learned.npz
DRAFT       := draft=models/spac-demo-draft.gguf
LOOKAHEAD   := spac:$(DRAFT),$(LEARNED)

bench-quick: build stock .venv/.bench-installed build/demo/spac-demo-1g.gguf ## a look at speed beside llama.cpp, under 5 minutes
	$(BENCH) build/demo/spac-demo-1g.gguf --suite quick --repeats 2 $(BENCH_FLAGS)

bench: build stock .venv/.bench-installed build/demo/4g.gguf build/demo/learned.npz ## all suites that compare, hours; interrupted, it goes on where it was
	$(BENCH) build/demo/4g.gguf --suite full --name full --resume --repeats $(REPEATS) $(BENCH_FLAGS) --also $(LOOKAHEAD)
	$(BENCH) build/demo/4g.gguf --suite speed --name speed --resume --repeats $(REPEATS) $(BENCH_FLAGS)
	$(BENCH) build/demo/4g.gguf --suite lookahead --name lookahead --resume --repeats $(REPEATS) $(BENCH_FLAGS) --also $(LOOKAHEAD) \
	--also spac:signals=tokens,$(LEARNED) --also spac:signals=draft,$(DRAFT),$(LEARNED)
	$(BENCH) build/demo/4g.gguf --suite stock --name stock --resume --repeats $(REPEATS) $(BENCH_FLAGS)
	$(BENCH) build/demo/4g.gguf --suite latency --name latency --resume --repeats $(REPEATS) --prompts-per-run 5 $(BENCH_FLAGS)
	@if $(PY) -c 'import mlperf_loadgen' 2>/dev/null; then set -x; \
	$(BENCH) build/demo/4g.gguf --profile native --name loadgen --resume --loadgen --repeats 1 --prompts-per-run 5 --out $(BENCH_OUT); fi
	$(PY) scripts/measure_paging.py build/demo/4g.gguf --repeats $(REPEATS) --out $(BENCH_OUT)/paging
	$(PY) scripts/synth_study.py --out $(BENCH_OUT)/synth.md

synth: build ## synthetic models with the structure of known ones, up to 35B, run paged; some minutes, 4 GB of disk
	$(PY) scripts/synth_study.py --out docs/benchmarks/synth.md

build/demo/spac-demo-1g.gguf: | build
	@mkdir -p $(@D)
	$(PY) scripts/inflate models/spac-demo-moe.gguf $@ --size 1G --type Q4_0

build/demo/4g.gguf: | build
	@mkdir -p $(@D)
	$(PY) scripts/inflate models/spac-demo-moe.gguf $@ --size 4G --type Q4_0

build/demo/learned.npz: | build/demo/4g.gguf
	$(PY) scripts/learn_routing.py build/demo/4g.gguf $@

lint: .venv/.spac-installed ## ruff and mypy
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

clean: ## remove what was built; .venv and vendor/ stay
	rm -rf build dist spac/lib .mypy_cache .pytest_cache .ruff_cache
	find spac tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the steps of a build -------------------------------------------------------------------------------------------

system-packages:
	@PYTHON="$(PYTHON)" scripts/system-packages

.venv/.created: | system-packages
	$(PYTHON) -m venv .venv
	@touch $@

# The build backends, so that nothing is fetched for building in isolation.
.venv/.build-tools: constraints.txt .venv/.created
	$(PIP_INSTALL) pip scikit-build-core wheel
	@touch $@

vendor: .venv/.build-tools
	@$(PY) scripts/vendor fetch

# llama-cpp-python is used for its Python only: without its own copy of the libraries it is pure, whatever its tag says.
build/wheels/llama-cpp-python.stamp: vendor/llama.cpp.lock | vendor
	rm -rf build/wheels && mkdir -p build/wheels
	sdist=$$($(PY) scripts/vendor sdist) && \
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) wheel --no-deps --no-build-isolation --no-cache-dir -w build/wheels "$$sdist"
	@if $(PY) -m zipfile -l build/wheels/*.whl | grep -E '\.(so|a)\b'; then echo "llama-cpp-python's wheel is not pure" >&2; exit 1; fi
	$(PY) -m wheel tags --remove --platform-tag any build/wheels/*.whl
	@touch $@

.venv/.spac-installed: pyproject.toml constraints.txt build/wheels/llama-cpp-python.stamp .venv/.build-tools
	$(PIP_INSTALL) --force-reinstall --no-deps build/wheels/*.whl
	$(PIP_INSTALL) --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace -e ".[dev]"
	@touch $@

# Plots and a check by MLPerf's LoadGen; the tables need neither.
.venv/.bench-installed: pyproject.toml .venv/.spac-installed
	$(PIP_INSTALL) "matplotlib>=3.8" || echo "no matplotlib: tables without plots"
	$(PIP_INSTALL) "mlcommons-loadgen>=5" || echo "no LoadGen: its check is left out"
	@touch $@

# what scripts/cross asks for the tag of a wheel
.venv/.cross-installed: constraints.txt .venv/.build-tools
	$(PIP_INSTALL) "auditwheel>=6"
	@touch $@

native: vendor
	@test -f build/native/CMakeCache.txt || $(CONFIGURE) -B build/native $(CMAKE_FLAGS)
	@$(COMPILE) build/native -j $(JOBS)
	@cmake --install build/native --component spac --prefix . >/dev/null
