"""CUDA's Multi-Process Service for one section, if it can be started: with it, kernels of two processes overlap."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CONTROL = "nvidia-cuda-mps-control"
_CLIENT = """
from cuda.bindings import driver
for name, *arguments in (("cuInit", 0), ("cuDevicePrimaryCtxRetain", 0)):
    error = getattr(driver, name)(*arguments)[0]
    if error:
        raise SystemExit(f"{name}: {error!r}")
"""


@contextmanager
def serving(wanted: bool, device: torch.device) -> Iterator[str]:
    """Inside, processes that are started are its clients, if that is wanted. Gives why it cannot be had, or ""."""
    if not wanted:
        yield ""
        return
    if device.type != "cuda":
        yield "MPS is of a CUDA device"
        return
    if shutil.which(_CONTROL) is None:
        yield f"there is no {_CONTROL} here"
        return
    with tempfile.TemporaryDirectory(prefix="hogwild-mps-") as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(names, folder))
        try:
            started = subprocess.run(
                [_CONTROL, "-d"], capture_output=True, text=True, timeout=20, check=False
            )
            if started.returncode:
                yield f"{_CONTROL} does not start: {(started.stderr or started.stdout).strip()}"
            else:
                try:
                    yield _refused()
                finally:
                    _quit()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _refused() -> str:
    """Why a process cannot be its client, as in some containers; "" if it can."""
    tried = subprocess.run(
        [sys.executable, "-c", _CLIENT], capture_output=True, text=True, timeout=60, check=False
    )
    return "" if tried.returncode == 0 else f"a client of MPS fails: {tried.stderr.strip().splitlines()[-1:]}"


def _quit() -> None:
    """The one that was started above: it is found by its folder of pipes."""
    try:
        subprocess.run([_CONTROL], input="quit\n", text=True, capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        pass  # its clients are dead; it ends when it notices
