# Every command sets up what it needs; `make help` lists them.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PROTOC := .tools/protoc
CODE := stillhouse/__init__.py protos teacher_service student_trainer client examples benchmarks scripts tests
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export VLLM_NO_USAGE_STATS = 1
export DO_NOT_TRACK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-slow test-fuzz test-compat check lint lint-protos types imports locked drift protos reference fmt bench bench-teacher bench-soak soak-runs bench-distillation bench-acceptance bench-sparse bench-foreign bench-classification bench-cache bench-data bench-web lock hooks release clean

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

.PHONY: chromium
chromium: ## find the browser of the page's tests, or install Debian's where this is root on Debian
	@scripts/chromium.sh

setup: ## make the virtual environment (.venv) with everything in it
	@scripts/setup.sh

demo: setup ## distil a small model end to end, with all three programs
	@$(PY) -m examples.demo $(ARGS)

test: check-static-parallel chromium ## set up and run everything that CI runs; prints the coverage, unless ARGS chooses tests
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(or $(ARGS),--cov --cov-report=)

test-faults: setup ## every row of the fault matrix, injected into real processes; LONG=1 for the long forms
	LONG=$(LONG) STILLHOUSE_TEST_KILLS=$(or $(STILLHOUSE_TEST_KILLS),20) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m faults -p tests.faults.report $(ARGS)

test-slow: setup ## what `make test` leaves out for its time, but for faults and architectures
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not faults" --ignore tests/compat $(ARGS)

test-compat: setup ## every architecture of transformers through all stages, as a table; ARGS="-k mamba" for some
	$(PY) -m pytest -n 2 tests/compat $(ARGS)

test-fuzz: setup ## hostile bytes, messages, files and connections; LONG=1 for more than 100,000 cases, FUZZ_SEED=2 for others
	LONG=$(LONG) $(PY) -m pytest --timeout 3600 tests/fuzz $(ARGS)

check: check-static-parallel ## the static checks, and the tests that start no model
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not model and not slow" $(ARGS)

.PHONY: check-static check-static-parallel
check-static: lint lint-protos types imports drift locked docs

check-static-parallel: setup
	@$(MAKE) --no-print-directory -j2 --output-sync=target check-static

lint: setup ## ruff: style, and the formatter's opinion
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)

lint-protos: $(PROTOC)/.done ## buf lint, where node is present
	$(PROTOC)/bin/python scripts/protos.py lint

types: setup ## mypy --strict, over tests as well
	$(VENV)/bin/mypy

imports: setup ## import-linter: imports run one way
	$(VENV)/bin/lint-imports

locked: setup ## the lock names every package of the environment, at its version
	$(PY) scripts/lock.py check

drift: setup $(PROTOC)/.done ## the committed stubs and references are those of the contract and the code
	$(PROTOC)/bin/python scripts/protos.py drift
	$(PY) -m scripts.reference check

protos: $(PROTOC)/.done ## regenerate the stubs from the .proto files
	$(PROTOC)/bin/python scripts/protos.py generate

.PHONY: parity
parity: setup ## every row of docs/parity.md, shown on small real models; ARGS="--only A1,A31" for some
	@$(PY) -m examples.parity $(ARGS)

.PHONY: docs
docs: setup ## build the documentation's site into .site, without a network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

reference: setup ## regenerate docs/reference and the JSON Schema of run files from the code
	$(PY) -m scripts.reference generate

fmt: setup ## format, and fix what can be fixed
	$(VENV)/bin/ruff format $(CODE)
	$(VENV)/bin/ruff check --fix $(CODE)

bench: bench-teacher bench-student ## the benchmarks that print a ratio in one run

bench-teacher: setup ## the teacher's rates against its engine, vLLM's servers, TRL's client, transformers; JSON=FILE
	$(PY) -m benchmarks.teacher $(if $(JSON),--json $(JSON)) $(ARGS)

bench-student: setup ## a student's step, time and memory, against full logits, TRL and Liger; JSON=FILE
	$(PY) -m benchmarks.student $(if $(JSON),--json $(JSON)) $(ARGS)

.PHONY: bench-overlap
bench-overlap: setup ## what a teacher costs a student's step, a core for each, or with ARGS=--shared-cores on the same ones; JSON=FILE
	$(PY) -m benchmarks.overlap $(if $(JSON),--json $(JSON)) $(ARGS)

.PHONY: bench-on-policy bench-e2e bench-start
bench-on-policy: setup ## updates a minute and reverse KL of on-policy runs, beside TRL's trainers; JSON=FILE
	$(PY) -m benchmarks.on_policy $(if $(JSON),--json $(JSON)) $(ARGS)

bench-e2e: setup ## seconds to equal quality, online and cached, beside TRL's local and server teachers; VOCABULARY=4096, ARGS=--apart, JSON=FILE
	$(PY) -m benchmarks.end_to_end --vocabulary $(or $(VOCABULARY),32000) --work .bench/end-to-end-$(or $(VOCABULARY),32000) \
		$(if $(JSON),--json $(JSON)) $(ARGS)

bench-start: setup ## seconds from `run create` to the first step, and of a teacher to its first answer, by stage; JSON=FILE
	$(PY) -m benchmarks.start $(if $(JSON),--json $(JSON)) $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## conformance and speed on one GPU in ten minutes, installing nothing; its small form without one; JSON=FILE
	$(or $(GPU_PYTHON),$(PY)) -m benchmarks.gpu $(if $(JSON),--json $(JSON)) $(ARGS)

bench-soak: setup ## two trainers and a batch job on one teacher: fair shares, flat memory
	$(PY) -m benchmarks.soak $(ARGS)

soak-runs: setup ## 200 short runs through one run service that is killed ten times: each ends once, and nothing is lost
	$(PY) -m benchmarks.soak.runs $(ARGS)

bench-distillation: setup ## distilled against cross-entropy students; ARGS names teacher, student and data
	$(PY) -m benchmarks.distillation $(ARGS)

bench-acceptance: setup ## every way to learn, through the services, on languages whose truth is known; ARGS names a work folder; JSON=FILE
	$(PY) -m benchmarks.acceptance $(if $(JSON),--json $(JSON)) $(ARGS)

bench-sparse: setup ## the share of full distillation's gain that each sparse target keeps; ARGS names a text and a work folder; JSON=FILE
	$(PY) -m benchmarks.distillation.sparse_targets $(if $(JSON),--json $(JSON)) $(ARGS)

bench-foreign: setup ## what a student gains from a teacher with a foreign tokenizer; ARGS names a work folder; JSON=FILE
	$(PY) -m benchmarks.distillation.foreign $(if $(JSON),--json $(JSON)) $(ARGS)

bench-classification: setup ## a distilled classifier against one that learns labels alone, five seeds; JSON=FILE; ARGS names a work folder
	$(PY) -m benchmarks.classification $(if $(JSON),--json $(JSON)) $(ARGS)

bench-cache: setup ## what a cached token costs and loses, beside DistillKit's scheme; JSON=FILE; ARGS names teacher and text
	$(PY) -m benchmarks.cache $(if $(JSON),--json $(JSON)) $(ARGS)

.PHONY: bench-codec
bench-codec: setup ## bytes, loss and speed of distributions on the wire, on one core; JSON=FILE; ARGS="--model DIR" for a teacher's rows
	$(PY) -m benchmarks.codec $(if $(JSON),--json $(JSON)) $(ARGS)

bench-web: setup chromium ## what 200 readers of a run's events cost the run service; pages with 2,000 runs and with 1,000,000 metric points; JSON=FILE
	$(PY) -m benchmarks.web.watchers
	$(PY) -m benchmarks.web.pages $(if $(JSON),--json $(JSON)) $(ARGS)

bench-data: setup ## the preparation of a million rows, beside datasets.map, a second start, and memory at four times the rows; JSON=FILE
	$(PY) -m benchmarks.data $(if $(JSON),--json $(JSON)) $(ARGS)

lock: setup ## write requirements/dev-cpu.lock from this environment, which the tests have passed in
	$(PY) scripts/lock.py write

hooks: setup ## run the quick checks before each commit from now on
	$(VENV)/bin/pre-commit install

release: setup ## check changelog, version and tag, and build dist/; TAG=1 makes the tag here; nothing is pushed
	$(PY) scripts/release.py $(if $(TAG),--tag)

clean: ## remove what the commands made
	rm -rf $(VENV) .tools .demo .bench .site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info

# Version 1.80 emits code for protobuf 6.31, which every newer runtime accepts; later ones need protobuf 7.
$(PROTOC)/.done:
	python3 -m venv $(PROTOC)
	$(PROTOC)/bin/pip install -q --disable-pip-version-check grpcio-tools==1.80.0 mypy-protobuf==5.1.0 googleapis-common-protos==1.76.0
	touch $@
