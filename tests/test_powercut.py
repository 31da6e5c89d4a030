"""Power cuts on real file systems; `python tests/powercut.py` makes as many as one likes."""

import pytest

import powercut

pytestmark = pytest.mark.powercut


@pytest.mark.parametrize("kind", powercut.KINDS)
def test_nothing_acknowledged_is_lost_in_a_power_cut(kind):
    world = powercut.run(kind, cuts=2, seed=7)
    assert world.accepted
    assert world.saved
    assert not world.problems
