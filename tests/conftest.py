"""Fixtures that are expensive and therefore made once per session."""

from pathlib import Path

import pytest
from hogwild import demo_model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The real small chat model, as `hogwild demo` makes it; kept between runs, never written to."""
    return demo_model.build(REPOSITORY / ".demo" / "model")
