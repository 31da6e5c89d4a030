"""Fixtures that are expensive and therefore made once per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hogwild import demo_model
from world import World

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The real small chat model, as `hogwild demo` makes it; kept between runs, never written to."""
    return demo_model.build(REPOSITORY / ".demo" / "model")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A tiny model and a socket; what is started in it ends with the test."""
    world = World(tmp_path)
    yield world
    world.end()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are for `make gpu-check`, on a machine with a device: left out, not skipped, elsewhere."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if "gpu" in item.keywords]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if "gpu" not in item.keywords]
