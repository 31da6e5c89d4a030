#!/usr/bin/env bash
# make gpu-check: on a machine with a CUDA device, this package's dependencies, triton and cuda-bindings; vLLM is not
# needed. The tests marked gpu, then benchmarks/gpu.py, which writes docs/gpu-results.md. Arguments go to the latter.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=daemon:kernels${PYTHONPATH:+:$PYTHONPATH}
failed=0

tests() { python3 -m pytest -m gpu "$@" || return 1; }

tests tests/test_arena_cuda.py || failed=1 # alone: some of it watches the free memory of the device
tests tests/test_kernels_cuda.py &
kernels=$!
# Found by their mark, so that none is forgotten; the others need packages that may be missing here.
mapfile -t others < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py | grep -v -e test_arena_cuda -e test_kernels_cuda)
tests "${others[@]}" || failed=1
wait "$kernels" || failed=1
python3 benchmarks/gpu.py --json benchmarks/results/gpu.json --markdown docs/gpu-results.md "$@" || failed=1
exit "$failed"
