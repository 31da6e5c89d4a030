"""Fixtures that are expensive and therefore made once per session."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import powercut
import systemd_machine
from hogwild import demo_model
from world import World

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


LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that this machine cannot run are left out, not skipped, and named in the summary."""
    wanted = {
        mark
        for mark in ("gpu", "jq", "promtool", "strace", "powercut", "systemd")
        if any(mark in item.keywords for item in items)
    }
    reasons = {mark: why for mark in sorted(wanted) if (why := _impossible(mark))}
    left_out = [item for item in items if reasons.keys() & set(item.keywords)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = [f"left out: tests marked {mark}: {why}" for mark, why in reasons.items()]


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
