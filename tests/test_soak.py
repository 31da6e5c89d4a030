"""A short `make soak`: too short for its verdict on memory, which lives of 90 s and more get; all else is judged."""

from pathlib import Path

import pytest

from soak import Soak

pytestmark = pytest.mark.vllm

SEED = 5


def test_an_ordinary_minute_harms_nothing(tmp_path: Path, capsys):
    with capsys.disabled():
        soak = Soak(tmp_path, SEED, say=lambda text: print(f"\n{text}"))
        violations = soak.run_for(60)
    assert not violations
    assert soak.done["restart of the daemon"]
    assert soak.done["restart of the server"]
