"""A short `make chaos`: the real vLLM, the real daemon, kills at random moments."""

from pathlib import Path

import pytest

from chaos import Chaos

pytestmark = pytest.mark.vllm

SEED = 20


def test_nothing_is_lost_and_nothing_is_served_that_should_not_be(tmp_path: Path, capsys):
    with capsys.disabled():
        tally = Chaos(tmp_path, SEED, say=lambda text: print(f"\n{text}")).run(
            kills=12, seconds=60, server_share=0.1
        )
    assert not tally.violations
    assert tally.server_starts[-1] != "0", "the last one came back alone, and served what was learned"
