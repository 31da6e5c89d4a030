"""Resuming is honest: a stop in the middle changes nothing, not one bit."""

from pathlib import Path
from typing import Any

import pytest

from hogwild import generation
from hogwild.errors import CheckpointError
from studio import Studio, model
from support import digest
from tiny import Child

EXAMPLES, PASSES = 60, 2


def daemon(pipe: Any, root: Path, upto: int | None, forget: bool = False) -> None:
    """One life of a daemon, in a process of its own: train up to a pass, stop, save."""
    studio = Studio(root, training__passes=PASSES, training__seed=11)
    if forget:
        studio.learner.optimizer.load({}, {})
    if studio.ledger.counts().files == 0:
        studio.drop("first", EXAMPLES // 2)
        studio.drop("second", EXAMPLES - EXAMPLES // 2)
    studio.train(None if upto is None else upto - studio.ledger.newest_pass())
    assert studio.learner.stop(60)
    studio.save()
    pipe.send(("passes", studio.ledger.newest_pass()))
    pipe.send(("states", studio.states()))
    studio.close()


def live(root: Path, *stops: int | None, forget: bool = False) -> dict[str, Any]:
    """Lives one after the other: passes and steps in all, the hashes of the last one's weights and optimizer state.

    forget: the last one begins without moments.
    """
    model(root / "model")
    for number, upto in enumerate(stops, 1):
        child = Child(daemon, root, upto, forget and number == len(stops))
        passes, states = child.hear("passes"), child.hear("states")
        child.process.join()
        assert child.process.exitcode == 0
    assert states == {"pending": 0, "trained": 0, "durable": EXAMPLES, "failed": 0, "undone": 0}
    assert passes > EXAMPLES * PASSES, "replay is part of it"
    folder = root / "state" / "checkpoints" / "current"
    files = {file: digest(folder / file) for file in ("model.safetensors", str(generation.OPTIMIZER))}
    return {"passes": passes, "step": generation.verify(folder)["step"], **files}


def test_straight_through_and_with_stops_in_between_are_bit_identical(tmp_path):
    """60 examples, two passes each, one thread, one seed, several projections long; stopped in the first pass, at its
    end, and in the second, and gone on in a new process with a new arena that the checkpoint is written into."""
    straight = live(tmp_path / "straight", None)
    assert live(tmp_path / "again", None) == straight, "otherwise the comparison would prove nothing"
    assert live(tmp_path / "stopped", 25, None) == straight
    assert live(tmp_path / "often", 7, EXAMPLES, EXAMPLES + 31, None) == straight
    assert live(tmp_path / "forgotten", 25, None, forget=True) != straight, "and it would notice lost moments"


@pytest.mark.parametrize(("key", "value"), [("training__seed", 3), ("optimizer__gap", 9)])
def test_moments_of_another_projection_are_not_taken_over_and_it_is_said(tmp_path, capsys, key, value):
    model(tmp_path / "model")
    studio = Studio(tmp_path)
    studio.drop("a", 3)
    studio.train()
    studio.save()
    moments = len(studio.learner.optimizer)
    weights = {name: bits for name, bits in studio.bits().items() if "/" not in name}
    studio.close()
    assert moments > 0

    studio = Studio(tmp_path, **{key: value})
    said = [line for line in capsys.readouterr().out.splitlines() if "optimizer.reset" in line]
    assert len(said) == 1
    assert key.replace("__", ".") in said[0]
    assert len(studio.learner.optimizer) == 0
    assert studio.bits() == weights, "the weights are what was learned, whatever the moments are"
    studio.drop("b", 2)
    studio.train()
    studio.save()
    studio.close()
    studio = Studio(tmp_path, **{key: value})
    assert len(studio.learner.optimizer) == moments, "saved and restored under the new setting"
    studio.close()


def test_another_rank_is_refused_as_the_moments_do_not_fit(tmp_path):
    model(tmp_path / "model")
    studio = Studio(tmp_path)
    studio.drop("a", 3)
    studio.train()
    studio.save()
    studio.close()
    with pytest.raises(CheckpointError, match=r"optimizer.rank than 4"):
        Studio(tmp_path, optimizer__rank=4)


def test_steps_on_the_models_own_texts_alone_do_not_make_a_living_arena_doubtful(tmp_path):
    """They leave no pass, and still have to add up with what the control page counts."""
    settings = {"replay__self_texts": 4, "replay__self_tokens": 8, "training__passes": 4}
    model(tmp_path / "model")
    studio = Studio(tmp_path, **settings)
    studio.learner.write_own_texts(tmp_path / "own.json", "base")
    studio.learner.wait_for_own_texts()
    studio.drop("one", 1)  # alone, and nothing was learned before: between its passes there is nothing else
    studio.train()
    assert int(studio.ledger.get_meta("arena_steps_without_pass")) > 0
    studio.save()
    steps = studio.arena.control.steps
    arena = studio.close()
    again = Studio(tmp_path, arena, **settings)
    assert again.restored is None, "the weights were kept"
    assert again.arena.control.steps == steps
    again.close()
