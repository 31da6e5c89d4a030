"""Fixtures that are expensive and therefore made once per session."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from hogwild import demo_model, openmp

# Before torch is imported: the workers of a run, and what they start, share the processors.
openmp.sleep_when_idle(os.environ)
# An engine that does its own work, as on a GPU. On a CPU vLLM takes "uni" for "mp" unless this is said, and starts a
# third process, which imports all of vLLM once more; that is what users have, so test_service.py has it too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402

import faults  # noqa: E402
import powercut  # noqa: E402
import systemd_machine  # noqa: E402
from world import World  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The real small chat model, as `hogwild demo` makes it; kept between runs, never written to."""
    return demo_model.build(REPOSITORY / ".demo" / "model")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a user gets it, built from this checkout without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [uv, "build", "-q", "--wheel", "--no-build-isolation", "--offline", "-o", folder, REPOSITORY],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A tiny model and a socket; what is started in it ends with the test."""
    world = World(tmp_path)
    yield world
    world.end()


@pytest.fixture(autouse=True)
def plain_log() -> Iterator[None]:
    """Whatever a test makes of the log, the next one finds it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    yield
    root.handlers, root.level = handlers, level
    sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
    structlog.reset_defaults()


LEFT_OUT = pytest.StashKey[list[str]]()
LEFT_OUT_BY_WORKER = "left_out"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that this machine cannot run are left out, not skipped, and named in the summary. Stories come first: a
    long one that came last would run alone."""
    marks = ("gpu", "jq", "promtool", "strace", "powercut", "systemd")
    said, kept = [], items
    for mark in marks:
        concerned = [item for item in kept if mark in item.keywords]
        if concerned and (why := _impossible(mark)):
            said.append(f"left out: {len(concerned)} tests marked {mark}: {why}")
            config.hook.pytest_deselected(items=concerned)
            kept = [item for item in kept if mark not in item.keywords]
    items[:] = sorted(kept, key=lambda item: not {"vllm", "systemd"} & set(item.keywords))
    config.stash[LEFT_OUT] = said


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What imports have made stays for good: a collection need not look at a million objects of torch each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries say at the end that they leak


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # one of several workers
        output[LEFT_OUT_BY_WORKER] = session.config.stash.get(LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Called where the summary is printed. All workers collect the same tests."""
    output = getattr(node, "workeroutput", {})  # a worker that died has none
    node.config.stash[LEFT_OUT] = output.get(LEFT_OUT_BY_WORKER, node.config.stash.get(LEFT_OUT, []))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(line)


def _impossible(mark: str) -> str:
    """Why tests with this mark cannot run here; "" if they can."""
    if mark == "gpu":
        return "" if torch.cuda.is_available() else "no CUDA device (`make gpu-check`)"
    if mark == "jq":
        return "" if shutil.which("jq") else "no program jq"
    if mark == "promtool":
        return "" if shutil.which("promtool") else "no program promtool (of Prometheus)"
    if mark == "strace":
        return faults.possible()
    if mark == "systemd":
        return systemd_machine.possible()
    return powercut.possible()
