# make demo   watch a real vLLM server learn a file while it serves
# make test   lint, types and every test, against one real vLLM server
# Both set up .venv first (a second run does not reinstall).
SHELL := /bin/bash
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin

.PHONY: setup demo test lint unit matrix special-cases gpu-check systemd chaos soak faults storms bench-update bench-learning bench-serving \
  bench-history bench-threads bench-forgetting bench-context bench-throughput bench-freshness bench-interference lock clean

setup:
	@scripts/setup.sh

demo: setup
	@$(BIN)/hogwild demo

# Files of tests side by side, for many a test waits. PYTEST_ARGS="-n 0": one by one.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest $(TWO) $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: setup   # the tests that need no server
	$(BIN)/python -m pytest $(TWO) -m "not vllm and not gpu" $(PYTEST_ARGS)

systemd: setup # the units in a real systemd, from install to uninstall; part of `make test` for root
	$(BIN)/python -m pytest -m systemd $(PYTEST_ARGS)

chaos: setup  # about 15 minutes: SIGKILL of daemon, server or both, 220 times, under a stream of drops; all accounted for
	$(BIN)/python tests/chaos.py $(CHAOS_ARGS)

soak: setup   # 20 minutes: requests, drops, checkpoints, rollbacks and restarts at once; memory and descriptors are watched
	$(BIN)/python tests/soak.py $(SOAK_ARGS)

faults: setup # SIGKILL, EIO, ENOSPC at every write, fsync, rename and unlink; power cuts. Root, strace, xfsprogs; an hour
	$(BIN)/python tests/faults.py $(FAULTS_ARGS)
	$(BIN)/python tests/powercut.py

matrix: setup # every architecture of tests/architectures.py through one vLLM, weight by weight; ten minutes. MATRIX_ARGS: names
	OMP_NUM_THREADS=1 $(BIN)/python tests/matrix.py $(MATRIX_ARGS)

special-cases: setup # the handling of each special case of docs/models.md taken out of a copy: a test must fail; half an hour
	$(BIN)/python tests/special_cases.py $(SPECIAL_ARGS)

gpu-check:    # on a machine with a CUDA device, this package's dependencies, triton and cuda-bindings; vLLM is not needed
	@scripts/gpu_check.sh $(GPU_ARGS)

bench-update: setup    # benchmarks/update.py: what one update costs, against the published form, AdamW and the floors
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/update.py

bench-learning: setup  # docs/learning.md: tables (i) to (iii) and their plots; about an hour of one core, wants apt-get
	for table in scratch rounding threads; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/learning.py $$table || exit; done

bench-threads: setup   # hogwild train as shipped with 1, 2 and 4 threads, SmolLM2-135M, three seeds; 20 minutes of two cores
	$(BIN)/python benchmarks/threads.py

bench-forgetting: setup  # 100 new facts in 10 drops: what is learned, what is forgotten; an hour or two of one core, goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/forgetting.py

bench-serving: setup   # stock vLLM against hogwild's, side by side
	$(BIN)/python benchmarks/serving.py

storms: setup          # tests/storms.py: 20,000 files under load, with and without events; 100,000 files; 1,000,000 lines
	for how in "" --silent "--kind python --files 5000" --large; do OMP_NUM_THREADS=1 $(BIN)/python tests/storms.py $$how || exit; done

bench-history: setup   # what a generation costs on disk and in time, and what training loses while a checkpoint runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/history.py

bench-context: setup   # frozen context against gradients through it: time and memory by length
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/context.py

bench-throughput: setup  # trained tokens per second, against a Hugging Face Trainer with AdamW
	$(BIN)/python benchmarks/throughput.py

bench-freshness: setup  # ten thousand requests across weight epochs: faults, and how much the prefix cache still gives
	$(BIN)/python benchmarks/freshness.py

bench-interference: setup  # what training costs those who are served, by the governor's policies; docs/interference.png
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/interference.py

# re-pin requirements.txt from pyproject.toml: names and versions only, whatever index or local folder they came from
LOCK_ARGS ?= --torch-backend cpu
lock: setup
	$(BIN)/uv pip compile -q --upgrade --python $(BIN)/python $(LOCK_ARGS) pyproject.toml --extra cpu --extra demo --extra dev \
	  --no-emit-package torch --no-header --no-annotate -o requirements.txt

clean:
	rm -rf .venv .demo dist
