#!/usr/bin/env bash
# make gpu-check: on a machine with a CUDA device, this package's dependencies, triton and cuda-bindings; vLLM is not
# needed. The tests marked gpu, then benchmarks/gpu.py, which writes docs/gpu-results.md. Arguments go to the latter.
# GPU_CHECK_S=590: for a device that is lent, as much of it as so many seconds allow; the tests have three fifths of them.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=daemon:kernels${PYTHONPATH:+:$PYTHONPATH}
failed=0 limit=${GPU_CHECK_S:-0}

# In so many hundredths of the time, each test said as it ends. One file that cannot be imported keeps no other from it.
tests() {
  timeout -k 10 $((limit * $1 / 100)) python3 -m pytest -v -m gpu --continue-on-collection-errors "${@:2}"
}

tests 25 tests/test_arena_cuda.py || failed=1 # alone: some of it watches the free memory of the device
tests 35 tests/test_kernels_cuda.py &
kernels=$!
# Found by their mark, so that none is forgotten; the others need packages that may be missing here.
mapfile -t others < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py | grep -v -e test_arena_cuda -e test_kernels_cuda)
tests 35 "${others[@]}" || failed=1
wait "$kernels" || failed=1
if ((limit)); then
  left=$((limit - SECONDS - 20)) # less what its last section may take beyond its time
  set -- --budget-s "$((left > 1 ? left : 1))" "$@"
fi
python3 benchmarks/gpu.py --json benchmarks/results/gpu.json --markdown docs/gpu-results.md "$@" || failed=1
exit "$failed"
